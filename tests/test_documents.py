"""The documents say what the code says: settings, files, folders and links."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from hierbd3lm.settings_hierbd3lm import GenerationSettings

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))


def settings_table():
    """The table of generation settings, from the fields that declare them."""
    rows = [(f"`{item.name}`", f"`{item.default}`", item.metadata["help"]) for item in fields(GenerationSettings)]
    rows = [("setting", "default", "meaning"), ("---", "---", "---"), *rows]
    return "\n".join("|" + "|".join(row).replace("<|end|>", r"`<\|end\|>`") + "|" for row in rows)


def test_the_readme_has_the_generation_settings_as_they_are_declared():
    assert settings_table() in (ROOT / "README.md").read_text()


def test_the_readme_is_short_and_activates_the_environment_first():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1000
    first = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].splitlines()
    assert first[0] == "python3 -m venv .venv" and first[1].startswith("source .venv/bin/activate")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_recipes_that_are_named_exist(document):
    named = re.findall(r"(?:hierbd3lm train|-m hierbd3lm\.train) ([\w.]+)\b", document.read_text())
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml")} | {"topics.yaml", "configs"}
    assert set(named) - recipes == set()


def test_every_recipe_is_documented():
    text = (ROOT / "docs" / "training.md").read_text()
    assert [path.stem for path in (ROOT / "configs").glob("*.yaml") if f"`{path.stem}`" not in text] == []


def test_each_test_that_the_table_of_calls_names_exists():
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`test_" in line]
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(rows) > 30 and named - defined == set()
