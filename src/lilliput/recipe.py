"""What the user wants: an ordered list of steps. YAML that a person can read, or these objects."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lilliput.errors import PlanError


class Strict(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Target(Strict):
    """What is wanted of a layer. None means: not asked for."""

    bits: int | None = Field(None, ge=2, le=8, description="bits of a weight")
    group_size: int | Literal["auto", "channel", "tensor"] = Field(
        "auto", description="inputs that share a scale; auto: the largest of 128, 64, 32 that divides every width"
    )
    symmetric: bool = Field(True, description="no zero points")
    sparsity: float | None = Field(None, ge=0.0, le=1.0, description="share of weights that become zero")
    pattern: str | None = Field(None, description='"N:M" keeps N of every M inputs; None is unstructured')

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("a group has at least one input: give a positive number, 'channel' or 'tensor'")
        return value

    @field_validator("pattern")
    @classmethod
    def _n_of_m(cls, value: str | None) -> str | None:
        if value is not None:
            n, _, m = value.partition(":")
            if not (n.isdigit() and m.isdigit() and 0 < int(n) <= int(m)):
                raise ValueError(f"a pattern is written N:M with 0 < N <= M, such as 2:4, not {value!r}")
        return value


class Where(Strict):
    """Which linears a step touches: shell-style patterns over names and roles; `exclude` wins."""

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("lm_head", "router")


class Step(Strict):
    """One method with its target and options, and where it applies."""

    method: str
    target: Target = Target()
    options: Mapping[str, Any] = Field(default_factory=dict)
    where: Where = Where()


class Recipe(Strict):
    """Steps in order, and the layout to write (auto: an engine's own where it holds the result exactly)."""

    steps: tuple[Step, ...] = Field(min_length=1)
    name: str = "custom"
    export: Literal["auto", "compressed-tensors", "lilliput"] = "auto"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: ' Did you mean ...?' or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(names)}."
