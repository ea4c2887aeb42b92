"""Checkpoints from a local directory or a hub id: config, safetensors (sharded too), tokenizer, stop ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rolloutd.errors import ModelNotFound, ModelUnsupported

from .locate import local_path

INDEX = "model.safetensors.index.json"
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve(model: str, revision: str | None) -> Path:
    """Return the directory that holds the checkpoint, downloading a hub id if need be; `ModelNotFound` otherwise."""
    return local_path(model) or _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS))
    except HFValidationError:
        raise ModelNotFound(f"{model!r} is neither a directory nor a valid hub id. Check --model.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"{model!r} is not a local directory and cannot be had from the hub ({type(error).__name__}). "
            "Check the name and the network, or download it and pass the directory."
        ) from None


@dataclass(frozen=True)
class Checkpoint:
    """A resolved model directory."""

    path: Path

    def config_dict(self) -> dict[str, Any]:
        """Return config.json."""
        return _read_json(self.path / "config.json")

    def architectures(self) -> list[str] | None:
        """Return what config.json names as the model's classes."""
        names: list[str] | None = self.config_dict().get("architectures")
        return names

    def hf_config(self) -> Any:
        """Return transformers' config object, with its family's defaults filled in."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path)
        except (KeyError, ValueError, TypeError) as error:
            raise ModelUnsupported(f"config.json is refused by transformers ({error}). Correct it.") from None

    def tensors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of every stored tensor, one file open at a time.

        What is stored wider than `dtype` is rounded to it, as a trainer's model is when it is loaded in that dtype.
        """
        narrows = dtype != torch.float32
        for file in self._files():
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118  (not a dict: it has no iterator)
                        tensor = handle.get_tensor(name)
                        yield name, tensor.to(dtype) if narrows and tensor.is_floating_point() else tensor
            except SafetensorError as error:
                raise ModelUnsupported(f"{file.name} cannot be read: {error}. Download or save it again.") from None

    def _files(self) -> list[Path]:
        index = self.path / INDEX
        if index.is_file():
            names = sorted(set(_read_json(index)["weight_map"].values()))
            files = [self.path / Path(name).name for name in names]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ModelNotFound(
                    f"{self.path.name} lacks {', '.join(missing[:3])}, which its index names. Fetch them."
                )
            return files
        files = sorted(self.path.glob("model*.safetensors")) or sorted(self.path.glob("*.safetensors"))
        if not files:
            raise ModelNotFound(
                f"{str(self.path)!r} holds no *.safetensors. Convert it: model.save_pretrained(DIR) writes them."
            )
        return files

    def eos_token_ids(self, tokenizer: Any | None) -> tuple[int, ...]:
        """Return the stop ids of tokenizer and generation config, or of config.json where those name none."""
        found: set[int] = set()
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            found.add(int(tokenizer.eos_token_id))
        generation = self.path / "generation_config.json"
        if generation.is_file():
            found.update(_ids(_read_json(generation).get("eos_token_id")))
        return tuple(sorted(found or _ids(self.config_dict().get("eos_token_id"))))


def load_tokenizer(path: Path, explicit: str | None, revision: str | None) -> Any | None:
    """Return the tokenizer, or None where the model directory holds none; an explicit one must load."""
    from transformers import AutoTokenizer

    if explicit is not None:
        try:
            return AutoTokenizer.from_pretrained(explicit, revision=revision)
        except (OSError, ValueError) as error:
            raise ModelNotFound(
                f"tokenizer {explicit!r} cannot be loaded ({type(error).__name__}). Check --tokenizer."
            ) from None
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return AutoTokenizer.from_pretrained(path)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelUnsupported(f"{file.name} is not valid JSON ({error}). Download or save it again.") from None
    if not isinstance(content, dict):
        raise ModelUnsupported(f"{file.name} holds no JSON object. Download or save it again.")
    return content


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(item) for item in value} if isinstance(value, list) else {int(value)}
