"""An MLP of which every token uses some groups of hidden channels: those that a small predictor, or a mask, chooses.

Where all tokens at hand use the same groups, as a single one does, only their rows and columns of plain linears are
read and multiplied. Several tokens with groups of their own take the whole product, with zeros in the others' place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lilliput.errors import SourceError
from lilliput.runtime.behaviours.state import Behaviours, share

WEIGHT, BIAS = "predictor.weight", "predictor.bias"  # below the MLP's name


@dataclass
class Gates:
    """rows, columns: the linears that make the hidden channels, and the one that reads them; weight [groups, inputs],
    bias [groups], float32: the predictor; masks: bool [groups] by name."""

    state: Behaviours
    name: str
    keep: float
    group_size: int
    rows: tuple[str, ...]
    columns: str
    width: int
    outputs: int
    weight: Tensor
    bias: Tensor
    masks: dict[str, Tensor] = field(default_factory=dict)
    current: Tensor | None = None  # bool, what the hidden channels are multiplied by
    inside: bool = False

    @property
    def groups(self) -> int:
        return -(-self.width // self.group_size)

    @property
    def count(self) -> int:
        """Groups that a token uses."""
        return share(self.keep, self.groups)

    def choose(self, x: Tensor) -> Tensor:
        """bool [groups] where all tokens of x [.., inputs] use the same, else [.., groups]: the `count` with the
        largest predictions; of equals any."""
        if self.state.mask is not None:
            return self.masks[self.state.mask].to(x.device)
        if self.weight.device != x.device:
            self.weight, self.bias = self.weight.to(x.device), self.bias.to(x.device)
        predicted = nn.functional.linear(x.float(), self.weight, self.bias)
        top = predicted.topk(self.count, dim=-1).indices
        gates = torch.zeros_like(predicted, dtype=torch.bool).scatter_(-1, top, True)
        return gates.reshape(-1) if gates.numel() == self.groups else gates

    def channels(self, gates: Tensor) -> Tensor:
        """Gates [.., groups] as channels [.., width]."""
        return gates.repeat_interleave(self.group_size, dim=-1)[..., : self.width]

    @property
    def each(self) -> int:
        """Weights that a channel has."""
        return len(self.rows) * self.weight.shape[1] + self.outputs

    def log(self, channels: Tensor, tokens: int) -> None:
        """Note what `tokens` tokens did not compute, and what the predictor took."""
        used = channels.sum() * (tokens if channels.dim() == 1 else 1)
        self.state.work.change((used - tokens * self.width) * self.each)
        if self.state.mask is None:
            self.state.work.change(tokens * self.groups * self.weight.shape[1])

    def expected(self, tokens: int) -> int:
        """What the predictor's choice will change of the work of so many tokens, where it chooses whole groups."""
        if self.count == self.groups:
            return 0
        used = min(self.width, self.count * self.group_size)
        return tokens * ((used - self.width) * self.each + self.groups * self.weight.shape[1])


class GatedMLP(nn.Module):
    """Mixed in before an MLP's own class by `gate_`."""

    gates: Gates

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        gates = self.gates
        if gates.inside or not gates.state.active or gates.state.recorder is not None:
            return super().forward(x, *args, **kwargs)
        if gates.state.mask is None and gates.count == gates.groups:
            return super().forward(x, *args, **kwargs)
        channels = gates.channels(gates.choose(x))
        gates.log(channels, x.numel() // x.shape[-1])
        gates.inside = True
        try:
            if channels.dim() == 1 and self._plain():
                return functional_call(self, self._parts(channels.nonzero()[:, 0]), (x, *args), kwargs)
            gates.current = channels
            return super().forward(x, *args, **kwargs)
        finally:
            gates.inside, gates.current = False, None

    def _plain(self) -> bool:
        return all(type(self.get_submodule(n)) is nn.Linear for n in (*self.gates.rows, self.gates.columns))

    def _parts(self, index: Tensor) -> dict[str, Tensor]:
        """The weights of some channels, by parameter."""
        parts: dict[str, Tensor] = {}
        for name in self.gates.rows:
            for key, value in self.get_submodule(name).named_parameters(recurse=False):
                parts[f"{name}.{key}"] = value.index_select(0, index)
        columns = self.gates.columns
        parts[f"{columns}.weight"] = self.get_parameter(f"{columns}.weight").index_select(1, index)
        return parts


def _zero(gates: Gates) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden: Tensor = inputs[0]
        if gates.state.recorder is not None:
            gates.state.recorder(gates, module, hidden)
        if gates.current is None:
            return None
        current = gates.current if gates.current.dim() == 1 else gates.current.reshape(hidden.shape)
        return hidden * current.to(hidden.dtype), *inputs[1:]

    return hook


def gate_(
    mlp: nn.Module, state: Behaviours, name: str, entry: Mapping[str, Any], rule: Mapping[str, Any], tensors: Any
) -> None:
    """Give an MLP gates, in place. entry: its linears; rule: `keep` and `group_size`; tensors: a stored tensor by name.

    Raises SourceError where the module has no such linears.
    """
    rows, columns = tuple(entry["rows"]), str(entry["columns"])
    modules = dict(mlp.named_modules())
    if missing := [x for x in (*rows, columns) if not isinstance(modules.get(x), nn.Linear)]:
        raise SourceError(f"'{name}' is to have gates, and {type(mlp).__name__} has no linear '{missing[0]}'")
    last: Any = modules[columns]
    gates = Gates(
        state=state,
        name=name,
        keep=float(rule["keep"]),
        group_size=int(rule["group_size"]),
        rows=rows,
        columns=columns,
        width=last.in_features,
        outputs=last.out_features,
        weight=tensors(f"{name}.{WEIGHT}").float(),
        bias=tensors(f"{name}.{BIAS}").float(),
    )
    mlp.__class__ = _subclass(type(mlp))  # type: ignore[arg-type]
    mlp.__dict__["gates"] = gates
    mlp.__dict__["gates_hook"] = last.register_forward_pre_hook(_zero(gates))


def ungate_(mlp: nn.Module) -> None:
    """Undo `gate_`."""
    mlp.__dict__.pop("gates_hook").remove()
    del mlp.__dict__["gates"]
    mlp.__class__ = type(mlp).__mro__[2]


def gated(model: nn.Module) -> Sequence[GatedMLP]:
    """The MLPs with gates of a model."""
    return [x for x in model.modules() if isinstance(x, GatedMLP)]


@functools.cache
def _subclass(kind: type) -> type:
    return type(f"Gated{kind.__name__}", (GatedMLP, kind), {"__module__": kind.__module__})
