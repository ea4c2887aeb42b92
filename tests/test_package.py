"""What users install: the files of wheel and sdist, and the wheel at work away from the checkout."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import rolloutd

BANNED_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "multiprocessing"}
BANNED_NAMES = {"eval", "exec"}
BANNED_ATTRIBUTES = {"recv_pyobj", "send_pyobj", "allow_pickle"}
BANNED_CALLS = {"torch.load", "torch.save", "np.load", "numpy.load"}


@dataclass(frozen=True)
class Built:
    """One build of the checkout, and the wheel installed beside nothing else."""

    wheel: Path
    sdist: Path
    site: Path


def run(command: list[str], *, cwd: Path, path: Path | None = None, timeout: int = 170) -> str:
    """Return what a child prints; `path` alone is on its PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build sdist, and from it the wheel, as `python -m build` does; nothing comes from an index."""
    dist, site = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("site")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(root)], cwd=dist)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], cwd=dist)
    return Built(wheel, sdist, site)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working directory that knows nothing of the checkout."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def banned(source: str) -> Iterator[str]:
    """Yield each use of what runs code from its input."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] in BANNED_MODULES or name in BANNED_CALLS:
                yield f"{node.lineno}: import of {name}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BANNED_NAMES:
            yield f"{node.lineno}: call of {node.func.id}"
        if isinstance(node, ast.Attribute) and node.attr in BANNED_ATTRIBUTES | BANNED_NAMES and node.attr != "eval":
            yield f"{node.lineno}: {node.attr}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in BANNED_CALLS:
            yield f"{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.keyword) and node.arg in BANNED_ATTRIBUTES:
            yield f"{node.value.lineno}: {node.arg}"


def test_the_wheel_holds_the_whole_package_and_nothing_else(built: Built, root: Path) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    expected = {f"rolloutd/{path.relative_to(root / 'rolloutd')}" for path in (root / "rolloutd").rglob("*.py")}
    for folder in ("benchmarks", "kernels", "integrations"):
        expected |= {f"rolloutd/{folder}/{path.name}" for path in (root / folder).glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected
    in_c = {f"rolloutd/runtime/{path.name}" for path in (root / "rolloutd" / "runtime").glob("*.[ch]")}
    in_c |= {f"rolloutd/kernels/{path.name}" for path in (root / "kernels").glob("*.[ch]")}
    assert len(in_c) > 5
    assert {name for name in names if name.endswith((".c", ".h"))} == in_c
    assert "rolloutd/py.typed" in names
    info = f"rolloutd-{rolloutd.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in names
    assert {name.partition("/")[0] for name in names} == {"rolloutd", info}


def test_the_metadata_says_what_users_need(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        info = f"rolloutd-{rolloutd.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "# rolloutd" in metadata, "the README"
    assert "rolloutd = rolloutd.cli.main:main" in entry_points
    required = [line.split()[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert not [requirement for requirement in required if "==" in requirement or "<" in requirement], "no upper pins"


def test_the_sdist_builds_again_and_leaves_the_tests_at_home(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "rolloutd/__init__.py", "kernels/store_kv.py"} <= names
    assert not [name for name in names if name.startswith(("tests/test_", "tests/conftest", ".venv", ".ci", "build/"))]


def test_the_installed_package_imports_from_elsewhere(built: Built, elsewhere: Path) -> None:
    code = """
import sys, rolloutd
import rolloutd.kernels.store_kv
print(rolloutd.__file__, rolloutd.kernels.store_kv.__file__, rolloutd.__version__, len(rolloutd.__path__))
"""
    package, kernel, version, num_paths = run([sys.executable, "-c", code], cwd=elsewhere, path=built.site).split()
    assert package == str(built.site / "rolloutd" / "__init__.py")
    assert kernel == str(built.site / "rolloutd" / "kernels" / "store_kv.py")
    assert version == rolloutd.__version__
    assert num_paths == "1", "only a checkout adds its root"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(["--version"], rolloutd.__version__), (["--help"], "serve"), (["serve", "--help"], "--max-model-len")],
)
def test_the_command_answers(built: Built, elsewhere: Path, arguments: list[str], shown: str) -> None:
    command = built.site / "bin" / "rolloutd"
    assert shown in run([sys.executable, str(command), *arguments], cwd=elsewhere, path=built.site)


def test_the_installed_package_generates(built: Built, elsewhere: Path, tiny_model: Callable[..., Path]) -> None:
    code = """
import sys
from rolloutd import LLM, SamplingParams
with LLM(model=sys.argv[1], device="cpu", max_num_seqs=4) as llm:
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(n=2, max_tokens=3, ignore_eos=True, seed=1), use_tqdm=False)
    print([len(completion.token_ids) for completion in output.outputs])
"""
    output = run([sys.executable, "-c", code, str(tiny_model("qwen2"))], cwd=elsewhere, path=built.site)
    assert output.strip() == "[3, 3]"


def test_nothing_in_the_wheel_runs_code_from_its_input(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        sources = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
    found = [f"{name}:{use}" for name, source in sources.items() for use in banned(source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def late():\n    from pickle import loads",
        "import multiprocessing.shared_memory",
        "from torch import load",
        "torch.load(path)",
        "np.load(path)",
        "np.frombuffer(data, allow_pickle=True)",
        "socket.recv_pyobj()",
        "send = socket.send_pyobj",
        "eval(text)",
        "exec(text)",
        "builtins.exec(text)",
    ],
)
def test_the_scan_sees_each_of_them(source: str) -> None:
    assert list(banned(source))


@pytest.mark.parametrize(
    "source", ["model.eval()", "text = 'pickle'", "json.load(file)", "from .load import eval_step"]
)
def test_the_scan_lets_others_pass(source: str) -> None:
    assert not list(banned(source))
