"""Rounded inputs of a linear, in transformers' model and in our own skeleton alike: one hook in front of its forward
pass.

Where the scheme transforms inputs before they are rounded, the hook transforms them back, and the weight is the
decoded one, between no transforms: W T^-1 round(T x) with any W that the module has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lilliput.parts import transform
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.linear import LinearSpec
from lilliput.parts.part import below
from lilliput.parts.scheme import ACTIVATION
from lilliput.parts.transform import Transform

_HANDLE, _ROUNDING = "_lilliput_inputs_hook", "_lilliput_inputs"


@dataclass(frozen=True)
class Rounding:
    """What happens to the inputs [.., width] of a linear."""

    grid: InputGrid
    transforms: Sequence[Transform] = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.of(args[0]), *args[1:])

    def of(self, x: Tensor) -> Tensor:
        """The inputs as the linear sees them, in their own dtype."""
        if not self.transforms:
            return self.grid.round(x)
        turned = x.float()
        for t in self.transforms:
            turned = t.apply(turned)
        turned = self.grid.round(turned)
        for t in reversed(self.transforms):
            turned = t.undo(turned)
        return turned.to(x.dtype)


def attach(module: nn.Module, rounding: Rounding) -> None:
    """Let a linear round its inputs from now on, in place of what it did to them before."""
    detach(module)
    module.__dict__[_HANDLE] = module.register_forward_pre_hook(rounding)
    module.__dict__[_ROUNDING] = rounding


def of(module: nn.Module) -> Rounding | None:
    """How a linear rounds its inputs; None: it does not."""
    found: Rounding | None = module.__dict__.get(_ROUNDING)
    return found


def detach(module: nn.Module) -> None:
    """Let a linear see its inputs as they are."""
    handle = module.__dict__.pop(_HANDLE, None)
    module.__dict__.pop(_ROUNDING, None)
    if handle is not None:
        handle.remove()


def described(spec: LinearSpec, get: Callable[[str], Tensor]) -> Rounding | None:
    """What a folder says of a linear's inputs; None: nothing. `get` returns a stored tensor by its name."""
    activation = spec.scheme.activation
    if activation is None:
        return None
    stored = below(get, spec.payload)
    tensors = {suffix: stored(f"{ACTIVATION}{suffix}") for suffix in activation.stored(spec.in_features)}
    return Rounding(InputGrid(activation, tensors), transform.load("in", spec.scheme.inputs, spec.in_features, stored))
