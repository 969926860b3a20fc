"""LoRA: a product of two thin factors is trained beside each linear, whose codes or weights stay as they are.

    y = W x + (alpha / r) B A x,    A [r, in] random, B [out, r] = 0 at first,

so that training begins at the folder as it is. W stays packed: it is decoded while it runs, forward and back, and
gradients pass through it to the factors alone. With a base of NormalFloat of 4 bits whose scales are quantized too this
is QLoRA, whose paper takes rank 64 for LLaMA.

`start: loftq` begins at the best product for what the folder has lost of the original: B A = SVD_r(W_original - W),
which is LoftQ with one turn. Further turns would change the codes, which stay: the method `loftq` takes them before,
and stores its product in the folder. The original is the teacher.

Paper: Hu et al. 2021, arXiv 2106.09685; QLoRA: Dettmers et al. 2023, arXiv 2305.14314; LoftQ: Li et al. 2023, arXiv
2310.08659. Made with peft, which loads what is written. Cost: r (out + in) numbers for each linear with their gradients
and moments; a step decodes every linear twice, or three times with checkpointing. Limits: what is trained cannot be
merged into codes without quantizing anew, see `qa-lora`.
"""

from __future__ import annotations

import torch
from pydantic import Field

from lilliput.algebra.lowrank import spectrum
from lilliput.target import Target
from lilliput.training import borrowed, lowrank
from lilliput.training.lowrank import LowRank, LowRankOptions, Start, alpha_of, rank_of
from lilliput.verbs.adapt import Adapt, Adapter, AdaptIO


class Options(LowRankOptions):
    """See the module's docstring."""

    start: Start = Field("zero", description="zero: the folder as it is; loftq: the best product for what it has lost")


def attach(io: AdaptIO, target: Target, o: Options) -> Adapter:
    """Products that add nothing, or what is lost."""
    adapter = LowRank(borrowed.wrapped(io.skeleton.model, lowrank.config(io, target, o)))
    if o.start == "loftq":
        rank, scaling = rank_of(target), alpha_of(target, o) / rank_of(target)
        for x in io.linears:
            lost = x.original() - x.decoded()
            found = spectrum(lost)
            up, size = found.basis[:, :rank], found.energy[:rank].sqrt()
            down = (up.T @ lost.double()) / size.clamp_min(torch.finfo(size.dtype).tiny)[:, None]
            root = (size / scaling).sqrt()
            adapter.begin_at(x.name, root[:, None] * down, up * root)
    return adapter


_NF4 = {"method": "rtn", "target": {"format": "nf4", "group_size": 64, "scale_dtype": "int8/256"}}

METHOD = Adapt(
    paper="Hu et al. 2021, arXiv 2106.09685",
    options=Options,
    default={"rank": 16},
    covers={
        "lora": [{"method": "lora"}],
        "qlora": [
            _NF4,
            {"method": "lora", "target": {"rank": 16}, "options": {"alpha": 16, "dropout": 0.1, "lr": 2e-4}},
        ],
    },
    attach=attach,
    admits=lowrank.admits,
    parameters=lowrank.parameters,
    restarts=lambda o: "zero" if o.start == "loftq" else None,
)
