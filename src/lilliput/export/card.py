"""The model card: README.md of a written folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData, metadata_load

LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Figure:
    """A measured figure, as the table shows it."""

    name: str
    compressed: str
    original: str = ""


@dataclass(frozen=True)
class Card:
    """What the card tells.

    `licence`: license, license_name and license_link of the source's card, if any; `datasets`: those of the hub that
    the model was calibrated on; `opener`: the class of transformers that opens the folder; `use`: lines of code that
    open it, in place of those.
    """

    title: str
    base_model: str
    layout: str
    recipe: str
    figures: tuple[Figure, ...] = ()
    licence: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    opener: str = "AutoModelForCausalLM"
    use: tuple[str, ...] = ()


def read_licence(folder: Path) -> dict[str, str]:
    """Licence entries of the source's README.md front matter; empty where it has none or cannot be parsed."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        front = metadata_load(path) or {}
    # A stranger's card may hold anything, and what cannot be read raises whatever the hub's reader meets.
    except Exception:
        return {}
    return {key: str(front[key]) for key in LICENCE_KEYS if front.get(key)}


def render(card: Card) -> str:
    """The card as Markdown with front matter. A base model that is no hub id is named in the text only."""
    tags = ["lilliput"] if card.layout in ("dense", "lilliput") else ["lilliput", card.layout]
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=list(card.datasets) or None,
    )
    for key, value in (card.licence or {}).items():
        front[key] = value
    if re.fullmatch(r"[\w.-]+/[\w.-]+", card.base_model) and not card.base_model.startswith("."):
        front["base_model"] = card.base_model
        if card.layout != "dense":
            front["base_model_relation"] = "quantized"
    lines = ["---", front.to_yaml(), "---", "", f"# {card.title}", ""]
    lines += [f"Compressed from `{card.base_model}` with Lilliput.", ""]
    if not card.licence:
        lines += ["The source gives no licence; the licence of the base model applies.", ""]
    lines += ["## Use", "", "```python", *(card.use or _usage(card.layout, card.opener)), "```", ""]
    if card.figures:
        lines += ["## Measured", "", "| | compressed | original |", "| --- | --- | --- |"]
        lines += [f"| {f.name} | {f.compressed} | {f.original or '-'} |" for f in card.figures]
        lines += [""]
    lines += ["## Recipe", "", "```yaml", card.recipe.strip(), "```", ""]
    if card.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in card.notes), ""]
    lines += ["`lilliput.json` lists bits, error and hash of every tensor; `lilliput verify DIR` checks them.", ""]
    return "\n".join(lines)


def _usage(layout: str, opener: str) -> list[str]:
    lines = ["import lilliput  # registers the layout"] if layout == "lilliput" else []
    return [
        *lines,
        f"from transformers import {opener}",
        "",
        f'model = {opener}.from_pretrained("DIR")',
    ]
