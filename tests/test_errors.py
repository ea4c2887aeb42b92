"""The exception tree: codes, the way over the wire, and the page that documents them."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

from rolloutd import errors
from rolloutd.errors import ERROR_BY_CODE, RolloutdError, did_you_mean, error_from_wire

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RolloutdError)]


def test_every_code_belongs_to_one_class() -> None:
    own = [cls.code for cls in CLASSES if "code" in vars(cls) and cls is not RolloutdError]
    assert len(own) == len(set(own)) == len(ERROR_BY_CODE)
    for code, cls in ERROR_BY_CODE.items():
        assert cls.code == code
        assert code == code.upper().replace("-", "_")


def test_the_tree_at_the_head_of_the_file_is_the_tree() -> None:
    drawn = (errors.__doc__ or "").splitlines()
    for cls in CLASSES:
        line = next((line for line in drawn if cls.__name__ in line.split()), None)
        assert line is not None, f"{cls.__name__} is not drawn"
        if "code" in vars(cls) and cls is not RolloutdError:
            assert cls.code in line.split(), line
        if cls is not RolloutdError:
            depth = {RolloutdError: 1}.get(cls.__bases__[0], 2)
            assert line.index(cls.__name__) == 4 + 4 * depth, f"{cls.__name__} hangs from the wrong branch"


def test_errors_outside_the_file_are_not_defined(root: Path) -> None:
    names = {cls.__name__ for cls in CLASSES}
    for folder in ("rolloutd", "integrations"):
        for path in (root / folder).rglob("*.py"):
            if path.name == "errors.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                bases = (
                    {ast.unparse(base).split(".")[-1] for base in node.bases}
                    if isinstance(node, ast.ClassDef)
                    else set()
                )
                assert not bases & names, f"{path.name}:{node} has no code that a peer could know"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_says_its_code_and_its_message(cls: type[RolloutdError]) -> None:
    error = cls("max_model_len=9 is too long. Use 8.")
    assert str(error) == f"{cls.code}: max_model_len=9 is too long. Use 8."
    assert error.message == "max_model_len=9 is too long. Use 8."
    assert isinstance(error.retryable, bool)


@pytest.mark.parametrize("code", sorted(ERROR_BY_CODE))
def test_an_error_survives_the_wire(code: str) -> None:
    sent = ERROR_BY_CODE[code]("what happened")
    received = error_from_wire(sent.code, sent.message)
    assert type(received) is type(sent)
    assert str(received) == str(sent)
    assert received.retryable == sent.retryable


def test_a_code_of_a_newer_peer_is_kept_in_the_text() -> None:
    error = error_from_wire("FROM_THE_FUTURE", "hm")
    assert type(error) is RolloutdError
    assert "FROM_THE_FUTURE: hm" in str(error)


def test_what_may_be_tried_again() -> None:
    assert errors.EngineDied.retryable
    assert errors.QueueFull.retryable
    assert errors.DigestMismatch.retryable
    for cls in (errors.ConfigError, errors.RequestError, errors.ManifestMismatch, errors.ProtocolError):
        assert not cls.retryable


def test_the_nearest_name_is_offered() -> None:
    assert did_you_mean("temprature", ["temperature", "top_p"]) == " Did you mean 'temperature'?"
    assert did_you_mean("zzz", ["temperature", "top_p"]) == ""
    assert did_you_mean("x", []) == ""


def test_the_page_of_errors_is_the_generated_one(root: Path) -> None:
    page = runpy.run_path(str(root / "docs" / "errors_page.py"))["page"]()
    assert (root / "docs" / "errors.md").read_text(encoding="utf-8") == page, "run: python docs/errors_page.py"
    for code in ERROR_BY_CODE:
        assert f"`{code}`" in page


def test_every_error_has_a_remedy_and_no_remedy_is_left_over(root: Path) -> None:
    remedies = runpy.run_path(str(root / "docs" / "errors_page.py"))["REMEDIES"]
    assert set(remedies) == set(ERROR_BY_CODE)
    for code, remedy in remedies.items():
        assert len(remedy) > 20, code
        assert remedy.endswith("."), code
