"""What the user wants: an ordered list of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

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


class Recipe(Strict):
    """Steps in order, and the layout to write (auto: an engine's own where it holds the result exactly)."""

    steps: tuple[Step, ...] = Field(min_length=1)
    name: str = "custom"
    export: Literal["auto", "compressed-tensors", "lilliput"] = "auto"
