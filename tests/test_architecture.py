"""The house's rules, read from the source: who may import whom, what is public, how long things may get."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

import rolloutd

V = TypeVar("V")

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "rolloutd": ROOT / "rolloutd",
    "rolloutd.kernels": ROOT / "kernels",
    "rolloutd.integrations": ROOT / "integrations",
    "rolloutd.benchmarks": ROOT / "benchmarks",
}

# Longest prefix wins. A module imports its own level or one below; within level 2, see SEPARATE.
LEVELS = {
    "rolloutd": 7,
    "rolloutd.cli": 6,
    "rolloutd.integrations": 5,
    "rolloutd.check": 5,
    "rolloutd.benchmarks": 5,
    "rolloutd.serve": 4,
    "rolloutd.llm": 4,
    "rolloutd.engine.engine": 3,
    "rolloutd.engine": 2,
    "rolloutd.runtime": 2,
    "rolloutd.models": 2,
    "rolloutd.weights": 2,
    "rolloutd.kernels": 1,
    "rolloutd.errors": 0,
    "rolloutd.config": 0,
    "rolloutd.sampling_params": 0,
    "rolloutd.outputs": 0,
    "rolloutd.parity": 0,
    "rolloutd.prompts": 0,
    "rolloutd.version": 0,
}

COMPUTE = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"}
THIRD_PARTY: dict[str, set[str]] = {
    "rolloutd": set(),  # level 0 and the public names
    "rolloutd.prompts": {"tqdm"},
    "rolloutd.kernels": {"torch", "triton"},
    "rolloutd.engine": set(),
    "rolloutd.engine.engine": COMPUTE,
    "rolloutd.runtime": COMPUTE,
    "rolloutd.models": COMPUTE,
    "rolloutd.weights": COMPUTE,
    "rolloutd.weights.manifest": {"numpy"},
    "rolloutd.weights.digest": {"numpy"},
    "rolloutd.weights.names": set(),
    "rolloutd.weights.shared_memory": set(),
    "rolloutd.llm": {"torch", "tqdm"},
    "rolloutd.check": {"torch", "transformers", "numpy"},  # holds LLM against transformers' own forward
    "rolloutd.serve": {"torch", "numpy", "zmq", "msgspec", "tqdm"},
    "rolloutd.serve.front": {"zmq", "msgspec"},
    "rolloutd.serve.protocol": {"msgspec", "numpy"},
    "rolloutd.integrations": {"torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed", "numpy"},
    "rolloutd.benchmarks": {"torch", "transformers", "safetensors", "matplotlib", "vllm"},  # peers, and plots
    "rolloutd.cli": {"click", "yaml"},
}

# Rooms that stay apart although their level would allow it: the first may import of the second only what is named.
SEPARATE: list[tuple[str, str, set[str]]] = [
    ("rolloutd.engine", "rolloutd.runtime", set()),
    ("rolloutd.engine", "rolloutd.models", set()),
    ("rolloutd.engine", "rolloutd.weights", set()),
    ("rolloutd.runtime", "rolloutd.engine", {"rolloutd.engine.sequence"}),  # reads a Batch
    ("rolloutd.models", "rolloutd.engine", set()),
    ("rolloutd.weights", "rolloutd.engine", set()),
    ("rolloutd.weights", "rolloutd.runtime", set()),
    ("rolloutd.llm", "rolloutd.serve", set()),  # scripts and notebooks need no sockets
]

# What these import when they start, all the way down, holds neither torch nor transformers.
STARTS_WITHOUT_TORCH = ["rolloutd", "rolloutd.cli.main", "rolloutd.serve.front", "rolloutd.serve.engine_process"]
HEAVY = {"torch", "transformers", "triton", "trl", "accelerate", "peft", "datasets"}

MAX_FUNCTION_LINES = 100
MAX_FILE_LINES = 600


@dataclass(frozen=True)
class Import:
    """One import statement's target: a module of ours, or the top name of somebody else's."""

    target: str
    line: int
    at_start: bool
    """False inside a function."""
    typing_only: bool


def module_files() -> dict[str, Path]:
    """Return every module of the package with its file."""
    files: dict[str, Path] = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            files[".".join(part for part in parts if part != "__init__")] = path
    return files


FILES = module_files()
SOURCES = {module: path.read_text(encoding="utf-8") for module, path in FILES.items()}


def setting(table: Mapping[str, V], module: str) -> V:
    """Return the table's entry of the longest prefix of the module's name."""
    while module not in table:
        module = module.rpartition(".")[0]
    return table[module]


def in_room(module: str, room: str) -> bool:
    """Return whether the module is the room or lies in it; engine.engine is a room of its own."""
    if room == "rolloutd.engine" and module == "rolloutd.engine.engine":
        return False
    return module == room or module.startswith(room + ".")


def imports_of(module: str, source: str, *, is_package: bool) -> Iterator[Import]:
    """Yield the imports of a module's source, relative ones resolved."""

    def visit(node: ast.AST, at_start: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, at_start, typing_only)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = module.split(".") if is_package else module.split(".")[:-1]
                    base = ".".join([*parents[: len(parents) - child.level + 1], *filter(None, [child.module])])
                for alias in child.names:
                    target = f"{base}.{alias.name}"
                    yield Import(target if target in FILES else base, child.lineno, at_start, typing_only)
            else:
                in_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                guard = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
                yield from visit(child, at_start and not in_function, typing_only or guard)

    yield from visit(ast.parse(source), True, False)


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Return what the module's imports break, one line each."""
    found = []
    level, third_party = setting(LEVELS, module), setting(THIRD_PARTY, module)
    for item in imports_of(module, source, is_package=is_package):
        top = item.target.partition(".")[0]
        where = f"{module}:{item.line} imports {item.target}"
        if top == "rolloutd":
            if module == "rolloutd":
                continue  # the public names come from everywhere
            if item.target == "rolloutd" or setting(LEVELS, item.target) > level:
                found.append(f"{where}, which is above it")
            for room, other, allowed in SEPARATE:
                if in_room(module, room) and in_room(item.target, other) and item.target not in allowed:
                    found.append(f"{where}; {room} stays apart from {other}")
        elif not item.typing_only and top not in sys.stdlib_module_names | third_party:
            found.append(f"{where}, which its room does not use")
        if (
            module.startswith("rolloutd.kernels.")
            and top == "rolloutd"
            and not in_room(item.target, "rolloutd.kernels")
        ):
            found.append(f"{where}; kernels import nothing of ours")
    return found


def loaded_at_start(module: str) -> dict[str, str]:
    """Return what importing the module loads, all the way down: each name with the module that imports it."""
    loaded: dict[str, str] = {}
    todo = [(module, "the test")]
    while todo:
        name, importer = todo.pop()
        if name in loaded:
            continue
        loaded[name] = importer
        if name in FILES:
            todo.append((name.rpartition(".")[0] or name, name))
            items = imports_of(name, SOURCES[name], is_package=FILES[name].name == "__init__.py")
            todo.extend((item.target, name) for item in items if item.at_start and not item.typing_only)
    return loaded


def test_imports_point_down() -> None:
    found = [
        line
        for module, source in SOURCES.items()
        for line in violations(module, source, is_package=FILES[module].name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rolloutd.engine.scheduler", "import torch"),
        ("rolloutd.engine.scheduler", "from rolloutd.runtime.kv_cache import KVCache"),
        ("rolloutd.engine.scheduler", "from .engine import Engine"),
        ("rolloutd.engine.scheduler", "def late() -> None:\n    import numpy"),
        ("rolloutd.runtime.sampler", "from rolloutd.engine.scheduler import Scheduler"),
        ("rolloutd.runtime.sampler", "import zmq"),
        ("rolloutd.weights.digest", "from torch import Tensor"),
        ("rolloutd.weights.staging", "from msgspec import json"),
        ("rolloutd.models.decoder", "import trl.trainer"),
        ("rolloutd.kernels.store_kv", "from rolloutd.errors import ConfigError"),
        ("rolloutd.kernels.store_kv", "from ..errors import ConfigError"),
        ("rolloutd.errors", "from .config import EngineConfig\nimport rolloutd.llm"),
        ("rolloutd.config", "import yaml"),
        ("rolloutd.llm", "from .serve.client import RolloutClient"),
        ("rolloutd.serve.client", "from rolloutd.integrations.trl import GRPOTrainer"),
        ("rolloutd.serve.client", "import peft"),
        ("rolloutd.serve.front", "import torch"),
        ("rolloutd.integrations.trl", "from rolloutd.cli.main import main"),
        ("rolloutd.integrations.trl", "from rolloutd import LLM"),
    ],
)
def test_a_planted_import_is_seen(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rolloutd.engine.engine", "import torch\nfrom rolloutd.runtime.model_runner import ModelRunner"),
        ("rolloutd.runtime.inputs", "import os\nfrom rolloutd.engine.sequence import Batch"),
        ("rolloutd.engine.stop", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("rolloutd.integrations.trl", "import trl\nfrom rolloutd.serve.client import RolloutClient"),
        ("rolloutd.kernels.store_kv", "from .launch import check\nimport triton"),
    ],
)
def test_sound_imports_pass(module: str, source: str) -> None:
    assert not violations(module, source)


@pytest.mark.parametrize("module", [name for name in STARTS_WITHOUT_TORCH if name in FILES])
def test_the_front_and_the_command_start_without_torch(module: str) -> None:
    loaded = loaded_at_start(module)
    heavy = {name: importer for name, importer in loaded.items() if name.partition(".")[0] in HEAVY}
    assert not heavy, f"{module} loads {heavy}"


def test_the_walk_of_start_imports_sees_torch_where_it_is() -> None:
    assert "torch" in loaded_at_start("rolloutd.runtime.kv_cache")
    assert "rolloutd.errors" in loaded_at_start("rolloutd.config")


def test_public_names_equal_all() -> None:
    tree = ast.parse(SOURCES["rolloutd"])
    bound = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert bound - {"__version__"} == set(rolloutd.__all__)
    assert list(rolloutd.__all__) == sorted(rolloutd.__all__, key=lambda name: (not name.isupper(), name))
    for name in rolloutd.__all__:
        assert getattr(rolloutd, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        rolloutd.Engine  # noqa: B018


def test_functions_and_files_stay_readable() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {len(SOURCES[module].splitlines())} lines"
        for module, path in FILES.items()
        if len(SOURCES[module].splitlines()) > MAX_FILE_LINES
    ]
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(SOURCES[module])):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {num_lines} lines")
    assert not long, "\n".join(long)


def test_every_module_says_what_it_is() -> None:
    silent = [name for name, source in SOURCES.items() if not ast.get_docstring(ast.parse(source))]
    assert not silent


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    build = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = build.partition("\ndependencies = [")[2].partition("]")[0]
    declared = {line.split('"')[1].partition(">=")[0] for line in block.splitlines() if '"' in line}
    distributions = {"zmq": "pyzmq", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    imported = {
        distributions.get(top, top)
        for module, source in SOURCES.items()
        if not module.startswith(("rolloutd.integrations", "rolloutd.kernels", "rolloutd.benchmarks"))
        for item in imports_of(module, source, is_package=FILES[module].name == "__init__.py")
        if (top := item.target.partition(".")[0]) not in sys.stdlib_module_names | {"rolloutd"}
    }
    assert imported == declared


def test_every_package_is_named_in_the_build() -> None:
    build = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for module, path in FILES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        assert f'"{package}"' in build, f"{package} is missing from [tool.setuptools] packages"
