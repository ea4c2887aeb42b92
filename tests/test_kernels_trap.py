"""Our folder kernels/ must never answer for the published package `kernels`, which transformers looks for by name.

Where the working directory is first on the path (`python -c`, `-m`, a notebook), a top-level folder kernels/ with an
`__init__.py` would be imported in its place, and break transformers, peft and trl.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What transformers, peft and trl do at import, in this order, and who then answers to the name.
IMPORTS = """
import importlib.util
from transformers import AutoModelForCausalLM
from transformers.utils import import_utils
from trl import GRPOTrainer
import peft
spec = importlib.util.find_spec("kernels")
print("origin", spec.origin if spec else None)
print("available", import_utils.is_kernels_available())
"""

STAND_IN = '''
"""Stands for the published package: classes that take anything, decorators that change nothing."""

__version__ = "0.18.9"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].islower():
        return lambda *args, **keywords: lambda decorated: decorated
    return type(name, (), {"__init__": lambda self, *args, **keywords: None})
'''


def python(code: str, *, cwd: Path, path: list[Path]) -> str:
    """Return what a child started with `python -c` prints; its working directory is first on its path."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder for the path that holds a `kernels` 0.18.9 distribution."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(STAND_IN, encoding="utf-8")
    info = site / "kernels-0.18.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.9\n", encoding="utf-8")
    (info / "RECORD").write_text("kernels/__init__.py,,\n", encoding="utf-8")
    return site


@pytest.mark.parametrize("folder", ["kernels", "integrations"])
def test_the_folders_are_no_packages_of_their_own(root: Path, folder: str) -> None:
    assert (root / folder).is_dir()
    assert not (root / folder / "__init__.py").exists()
    for source in (root / folder).glob("*.py"):
        text = source.read_text(encoding="utf-8")
        assert "__version__ =" not in text
        assert "__main__" not in text or folder == "integrations", f"{source.name} would be run by path"
    assert not (root / "conftest.py").exists(), "a conftest.py here puts this folder first on pytest's path"


def test_the_libraries_import_at_the_root_without_the_published_package(root: Path) -> None:
    output = python(IMPORTS, cwd=root, path=[])
    assert "origin None" in output, "a namespace folder has no origin"
    assert "available False" in output


def test_the_libraries_import_at_the_root_beside_the_published_package(root: Path, stand_in: Path) -> None:
    output = python(IMPORTS, cwd=root, path=[stand_in])
    assert f"origin {stand_in}" in output
    assert "available True" in output


def test_an_init_file_would_spring_the_trap(tmp_path: Path, stand_in: Path) -> None:
    (tmp_path / "root" / "kernels").mkdir(parents=True)
    (tmp_path / "root" / "kernels" / "__init__.py").touch()
    code = "import importlib.util; print(importlib.util.find_spec('kernels').origin)"
    assert python(code, cwd=tmp_path / "root", path=[stand_in]).startswith(str(tmp_path / "root"))


def test_our_kernels_import_from_elsewhere(root: Path, tmp_path: Path, stand_in: Path) -> None:
    code = """
import kernels, rolloutd.kernels.store_kv, rolloutd.kernels.add_rms_norm
print(kernels.__file__)
print(rolloutd.kernels.store_kv.__file__)
"""
    published, ours = python(code, cwd=tmp_path, path=[stand_in, root]).split()
    assert published.startswith(str(stand_in))
    assert ours == str(root / "kernels" / "store_kv.py")
