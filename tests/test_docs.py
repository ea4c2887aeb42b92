"""What the pages say exists: linked files, imported names, options of the command, targets of the Makefile."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from rolloutd import EngineConfig, ServerConfig
from rolloutd.cli.bench import bench
from rolloutd.config import CheckConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")
OPTIONS = {
    field.name.replace("_", "-")
    for cls in (EngineConfig, ServerConfig, CheckConfig)
    for field in dataclasses.fields(cls)
} | {"version", "help", "json", "config"}
OPTIONS |= {option.removeprefix("--") for param in bench.params for option in param.opts}

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def blocks(path: Path, *languages: str) -> list[str]:
    """Return the page's code blocks in one of the languages."""
    return [body for language, body in BLOCK.findall(path.read_text(encoding="utf-8")) if language in languages]


def test_there_are_pages() -> None:
    assert {"README.md", "architecture.md", "errors.md", "quickstart.md"} <= {path.name for path in PAGES}


@page
def test_links_lead_somewhere(path: Path) -> None:
    broken = [link for link in LINK.findall(path.read_text(encoding="utf-8")) if not (path.parent / link).exists()]
    assert not broken


@page
def test_python_blocks_parse_and_import_what_exists(path: Path) -> None:
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rolloutd"):
                module = importlib.import_module(node.module or "")
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {missing}"


@page
def test_commands_take_the_options_that_are_shown(path: Path) -> None:
    shown = [line for block in blocks(path, "console", "bash") for line in block.splitlines() if "rolloutd -" in line]
    for line in shown:
        unknown = set(re.findall(r"(?<=\s)--([a-z0-9-]+)", line)) - OPTIONS
        assert not unknown, line


@page
def test_subcommands_that_are_shown_exist(path: Path) -> None:
    from rolloutd.cli.main import cli

    text = path.read_text(encoding="utf-8")
    shown = set(re.findall(r"(?:^\$ (?:[^#\n]* )?|`)rolloutd ([a-z]+)\b", text, re.MULTILINE))
    assert shown <= set(cli.commands)


@page
def test_options_named_in_the_text_exist(path: Path) -> None:
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    unknown = set(re.findall(r"`--([a-z0-9-]+)", text)) - OPTIONS
    assert not unknown


@page
def test_make_has_the_targets_that_are_shown(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for block in blocks(path, "console", "bash"):
        for line in block.splitlines():
            command = line.partition("#")[0].split()
            if command[:2] == ["$", "make"]:
                assert {word for word in command[2:] if word.isalpha()} <= targets, line
