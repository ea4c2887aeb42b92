"""Local model directories, told from hub ids without torch."""

from __future__ import annotations

from pathlib import Path

from rolloutd.errors import ModelNotFound


def local_path(model: str) -> Path | None:
    """Return the directory that `model` names, None for what can only be a hub id; `ModelNotFound` for a wrong path."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"{model!r} is a directory without config.json. Pass a folder of save_pretrained().")
        return path
    if path.exists():
        raise ModelNotFound(f"{model!r} is a file. Pass the directory that holds config.json and safetensors.")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ModelNotFound(
            f"the directory {model!r} does not exist. Check the path, or pass a hub id such as org/name."
        )
    return None
