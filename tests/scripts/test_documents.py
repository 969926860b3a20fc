"""Documents: links lead somewhere, and the recipes that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lilliput.recipe.load import load, named

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/methods/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_named_recipe_is_documented() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in named() if f"`{name}`" not in text] == []


def test_the_recipe_in_the_document_is_one() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    recipes = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert recipes
    for recipe in recipes:
        assert load(recipe).steps
