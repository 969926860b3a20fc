"""BitFit: a bias is trained beside each linear, and nothing else; linears without one get one.

    y = W x + b + db,   db [out] = 0 at first.

Paper: Ben-Zaken et al. 2021, arXiv 2106.10199 (the biases of linears; those of norms stay). Made with peft (its kind
BEFT, in all linears). Cost: a number for each output. Limits: peft has none for linears that are stored as [in, out],
as in GPT-2.
"""

from __future__ import annotations

from collections.abc import Sequence

from lilliput.anatomy.model import Linear
from lilliput.parts.scheme import Scheme
from lilliput.target import Target
from lilliput.training import borrowed
from lilliput.training.borrowed import Borrowed
from lilliput.verbs.adapt import Adapt, Adapter, AdapterOptions, AdaptIO


class Options(AdapterOptions):
    """See the module's docstring."""


def attach(io: AdaptIO, target: Target, o: Options) -> Adapter:
    """Biases that are 0."""
    config = borrowed.peft().BeftConfig(target_modules=borrowed.names(io.linears), task_type="CAUSAL_LM")
    return Borrowed(borrowed.wrapped(io.skeleton.model, config))


def admits(linear: Linear, scheme: Scheme, target: Target, o: Options) -> str | None:
    """Linears that are stored as [out, in]."""
    if linear.transposed:
        return (
            "it is stored as [in, out], beside which peft has no bias: leave it out with `where`, or train a `lora` of "
            "rank 1"
        )
    return None


def parameters(linears: Sequence[Linear], target: Target, o: Options) -> int:
    """One for each output."""
    return sum(x.out_features for x in linears)


METHOD = Adapt(
    paper="Ben-Zaken et al. 2021, arXiv 2106.10199",
    options=Options,
    covers={"bitfit": [{"method": "bitfit"}]},
    attach=attach,
    admits=admits,
    parameters=parameters,
)
