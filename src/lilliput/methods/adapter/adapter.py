"""Bottleneck adapters: a small network behind the attention and behind the MLP of each block is trained.

    h + U act(D h + c) + d,   D [m, hidden] random, U [hidden, m] = 0 at first, h what leaves the sub-layer,

so that training begins at the folder as it is. `skip` leaves the first blocks without (AdapterDrop); `keep` sets the
smallest weights of D and as many random ones of U to 0 before training, where they stay (SparseAdapter).

Paper: Houlsby et al. 2019, arXiv 1902.00751; AdapterDrop: Rueckle et al. 2020, arXiv 2010.11918 (always the
same blocks); SparseAdapter: He et al. 2022, arXiv 2210.04284 (by magnitude). Cost: 2 m hidden numbers behind
each sub-layer, and their products at every token. Limits: peft has none of this kind, so what is written is a small
layout of our own, which `lilliput.use_adapter` loads; nothing can be merged. Experts have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lilliput.anatomy.model import Linear
from lilliput.parts.scheme import Scheme
from lilliput.runtime import bottleneck
from lilliput.runtime.bottleneck import Bottleneck
from lilliput.target import Target
from lilliput.verbs.adapt import Adapt, Adapter, AdapterOptions, AdaptIO

_ENDS = ("o", "down")  # roles of the linears that sub-layers end with


class Options(AdapterOptions):
    """See the module's docstring."""

    width: int = Field(16, ge=1, description="m, channels of each network")
    between: Literal["relu", "gelu", "silu"] = Field("gelu", description="function between its two layers")
    skip: int = Field(0, ge=0, description="blocks without an adapter, from the first on")
    keep: float = Field(1.0, gt=0.0, le=1.0, description="share of the weights that there are; the others stay 0")


class Networks(Adapter):
    """Networks by the names of the linears behind which they are."""

    def __init__(self, networks: Mapping[str, Bottleneck], o: Options) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks.values())
        self._named, self._o = dict(networks), o
        self._masks: dict[str, tuple[Tensor, Tensor]] = {}
        if o.keep < 1.0:
            for name, x in networks.items():
                self._masks[name] = _largest(x.down.weight, o.keep), torch.rand(x.up.weight.shape) < o.keep
            self._prune()

    @torch.no_grad()
    def _prune(self) -> None:
        for name, (down, up) in self._masks.items():
            self._named[name].down.weight.mul_(down.to(self._named[name].down.weight.device))
            self._named[name].up.weight.mul_(up.to(self._named[name].up.weight.device))

    def after_step(self, rate: float) -> None:
        self._prune()

    def save(self, folder: Path) -> None:
        bottleneck.save(folder, self._named, self._o.between)


def _largest(weight: Tensor, share: float) -> Tensor:
    """The places of a share of the weights, those of largest magnitude."""
    count = max(1, round(share * weight.numel()))
    least = weight.detach().abs().flatten().topk(count).values[-1]
    return weight.detach().abs() >= least


def ends(linear: Linear, o: Options) -> bool:
    """Whether a sub-layer ends with it."""
    return linear.role in _ENDS and linear.expert is None


def attach(io: AdaptIO, target: Target, o: Options) -> Adapter:
    """Networks that add nothing."""
    networks: dict[str, Bottleneck] = {}
    for x in io.linears:
        if x.block >= o.skip:
            network = Bottleneck(x.linear.out_features, o.width, o.between).to(io.skeleton.device)
            bottleneck.put(io.skeleton.model.get_submodule(x.name), network)
            networks[x.name] = network
    return Networks(networks, o)


def admits(linear: Linear, scheme: Scheme, target: Target, o: Options) -> str | None:
    """A network is narrower than what it is behind."""
    if o.width > linear.out_features:
        return f"a network of {o.width} channels behind {linear.out_features} is no bottleneck: ask for at most so many"
    return None


def parameters(linears: Sequence[Linear], target: Target, o: Options) -> int:
    """Both layers with their biases."""
    return sum(2 * o.width * x.out_features + o.width + x.out_features for x in linears)


def refuses(config: Any, o: Options) -> str | None:
    """Some block has to be left."""
    count = getattr(config, "num_hidden_layers", None)
    if isinstance(count, int) and o.skip >= count:
        return f"the model has {count} blocks, and {o.skip} are skipped: skip fewer"
    return None


METHOD = Adapt(
    paper="Houlsby et al. 2019, arXiv 1902.00751",
    options=Options,
    covers={
        "adapter": [{"method": "adapter"}],
        "adapterdrop": [{"method": "adapter", "options": {"skip": 1}}],
        "sparseadapter": [{"method": "adapter", "options": {"width": 32, "keep": 0.5}}],
    },
    attach=attach,
    admits=admits,
    parameters=parameters,
    refuses=refuses,
    on=ends,
    borrows=False,
)
