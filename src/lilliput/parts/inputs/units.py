"""Which inputs share a scale.

A target's `group_size` says it for inputs as for weights: "channel" is one scale for a token's inputs (a row of what
enters the linear, as it is a row of a weight), which a static scale cannot be, so that it is one for all; "tensor" is
one for all; a number is one for each group of so many inputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.target import Target

Granularity = Literal["token", "tensor", "group", "channel"]


def of(target: Target, dynamic: bool) -> tuple[Granularity, int]:
    """The granularity that a target asks for, and its group size (0: no groups)."""
    size = target.group_size
    if size in ("channel", "auto", -1):
        return ("token" if dynamic else "tensor"), 0
    return ("tensor", 0) if size in ("tensor", 0) else ("group", int(size))


def check(granularity: Granularity, group_size: int, dynamic: bool) -> None:
    """Raises PlanError for what cannot be."""
    if dynamic and granularity == "channel":
        raise PlanError(
            "inputs cannot have a scale for each channel that is found while the model runs, since a channel's "
            "range is known only from text: take static scales, or granularity token"
        )
    if not dynamic and granularity == "token":
        raise PlanError("static scales cannot differ by token: take granularity tensor, group or channel")
    if (granularity == "group") != (group_size > 0):
        raise PlanError("granularity group takes a positive group_size, and no other granularity takes one")


def count(granularity: Granularity, group_size: int, width: int) -> int:
    """Static scales of a linear with `width` inputs. Raises PlanError for groups that do not divide them."""
    if granularity == "group" and width % group_size:
        raise PlanError(
            f"groups of {group_size} do not divide {width} inputs: choose a group_size that does, or granularity token"
        )
    return {"tensor": 1, "channel": width}.get(granularity, width // max(group_size, 1))


def extremes(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Least and largest of the inputs that share a dynamic scale: of all of x, or along its last dimension, which
    stays. Along a dimension torch.aminmax takes seven times as long as both."""
    if granularity == "tensor":
        low, high = torch.aminmax(x)
        return low, high
    return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)


def describe(granularity: Granularity, group_size: int) -> str:
    """For tables: "token", "g32"."""
    return f"g{group_size}" if granularity == "group" else granularity
