"""docs/models.md is what the registry and the survey say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from rolloutd.models.registry import NATIVE_ARCHITECTURES


@pytest.fixture(scope="module")
def script() -> dict[str, object]:
    return runpy.run_path(str(Path(__file__).parents[2] / "docs" / "models_page.py"))


def test_the_page_is_the_generated_one(root: Path, script: dict[str, object]) -> None:
    page = script["page"]
    assert callable(page)
    assert (root / "docs" / "models.md").read_text(encoding="utf-8") == page(), "run: python docs/models_page.py"


def test_every_native_architecture_has_a_sentence(script: dict[str, object]) -> None:
    families = script["FAMILIES"]
    assert isinstance(families, dict)
    assert set(NATIVE_ARCHITECTURES) <= set(families)
    assert all(sentence.endswith(".") and len(sentence) > 20 for sentence in families.values())


def test_the_survey_found_no_wrong_numbers_and_no_defect(root: Path) -> None:
    survey = json.loads((root / "docs" / "models_survey.json").read_text(encoding="utf-8"))
    outcomes = {name: result["outcome"] for name, result in survey["architectures"].items()}
    assert set(outcomes.values()) == {"runs", "refused", "untested"}
    assert set(NATIVE_ARCHITECTURES) <= {name for name, outcome in outcomes.items() if outcome == "runs"}
    assert all(result["difference"] <= 2e-5 for result in survey["architectures"].values() if "difference" in result)
