"""What the user wants: an ordered list of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from lilliput.target import Strict, Target


class Where(Strict):
    """Which linears a step touches: shell-style patterns over names and roles; `exclude` wins.

    The token embedding and the head are touched only where `include` names them, [embed, lm_head], not by "*".
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("lm_head", "router")


class Step(Strict):
    """One method with its target and options, and where it applies."""

    method: str
    target: Target = Target()
    options: Mapping[str, Any] = Field(default_factory=dict)
    where: Where = Where()

    @field_validator("target")
    @classmethod
    def _leaves_something(cls, target: Target) -> Target:
        """A single linear may become 0 where sparsity is divided, but nobody means to remove all."""
        if target.sparsity == 1.0:
            raise ValueError("sparsity 1 leaves no weight at all: give less than 1")
        return target


class Recipe(Strict):
    """Steps in order, and the layout to write (auto: an engine's own where it holds the result exactly)."""

    steps: tuple[Step, ...] = Field(min_length=1)
    name: str = "custom"
    export: Literal["auto", "compressed-tensors", "lilliput"] = "auto"
