"""INT2.1: a low-rank product beside frozen codes is trained, and stays beside them.

    What = Q + B A,    Q the codes as gptq has left them,    B [out, r] and A [r, in] trained,    L = CE + l KL(p || q).

The product is the part that a step of the same recipe has made: eora, lorc, or loftq with its codes, whose start
repairs what the rounding has lost. The loss is logit-kd's with `soft` = l / (1 + l), up to a factor. Factors are
rounded to what a file holds, and gradients pass that.

Paper: Chai et al. 2023, arXiv 2306.08162. Cost: what the codes stand for in float32, and optimizer states for
r (out + in) numbers. Limits: factors in a float type; the product is computed beside the codes in every use.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lilliput.errors import LilliputError
from lilliput.formats.rounding import through
from lilliput.parts.dense import DensePart, DenseSpec
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import LowRankPart, LowRankSpec
from lilliput.parts.part import Part
from lilliput.parts.scheme import Scheme
from lilliput.parts.transform import turn_back
from lilliput.verbs.spec import Steps
from lilliput.verbs.train import Train, TrainOptions
from lilliput.verbs.trained import Trained


class Options(TrainOptions):
    """See the module's docstring."""


def place(scheme: Scheme) -> int | None:
    """The number of the last part that is a product of factors in float types; None: there is none."""
    found = [
        n
        for n, x in enumerate(scheme.parts)
        if isinstance(x, LowRankSpec) and isinstance(x.left, DenseSpec) and isinstance(x.right, DenseSpec)
    ]
    return found[-1] if found else None


class Product(Trained):
    """Both factors, float32, and what the other parts add up to."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        at = place(Scheme(tuple(x.spec for x in layer.parts)))
        spec = None if at is None else layer.parts[at].spec
        if at is None or not isinstance(spec, LowRankSpec):
            raise RuntimeError(f"{layer.name} has no product, which admits() should have refused")
        if not isinstance(spec.left, DenseSpec) or not isinstance(spec.right, DenseSpec):
            raise RuntimeError(f"the factors of {layer.name} are codes, which admits() should have refused")
        self.layer, self.at = layer, at
        self.dtypes = spec.left.dtype, spec.right.dtype
        rows, width = layer.weight.shape
        left, right = spec.factors(layer.parts[at].pack().__getitem__, rows, width, torch.empty(0))
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        for n, part in enumerate(layer.parts):
            self.register_buffer(f"part_{n}", None if n == at else part.decode())

    def _factors(self) -> tuple[Tensor, Tensor]:
        """As a file holds them."""
        left, right = self.left.detach().to(self.dtypes[0]), self.right.detach().to(self.dtypes[1])
        return through(self.left, left.float()), through(self.right, right.float())

    def weight(self) -> Tensor:
        left, right = self._factors()
        total: Tensor | None = None
        for n in range(len(self.layer.parts)):
            term = left @ right if n == self.at else self._buffers[f"part_{n}"]
            if term is None:
                raise RuntimeError(f"part {n} of {self.layer.name} is not there")
            total = term if total is None else total + term
        if total is None:
            raise RuntimeError(f"{self.layer.name} has no parts")
        return turn_back(total, self.layer.inputs, self.layer.outputs)

    def finish(self) -> Layer:
        left, right = (x.detach() for x in (self.left, self.right))
        part: Part = LowRankPart(
            DensePart(left.to(self.dtypes[0]).contiguous(), self.dtypes[0]),
            DensePart(right.to(self.dtypes[1]).contiguous(), self.dtypes[1]),
        )
        if not bool(part.decode().isfinite().all()):
            raise LilliputError(f"the factors of {self.layer.name} are not finite after training: lower lr")
        parts = (*self.layer.parts[: self.at], part, *self.layer.parts[self.at + 1 :])
        return Layer(
            self.layer.name,
            self.layer.weight,
            parts,
            inputs=self.layer.inputs,
            outputs=self.layer.outputs,
            activation=self.layer.activation,
        )


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The last product of the layer."""
    return Product(layer)


def admits(scheme: Scheme, o: Options) -> str | None:
    """A product of factors in float types, beside codes or alone."""
    if place(scheme) is not None:
        return None
    if any(isinstance(x, LowRankSpec) for x in scheme.parts):
        return f"it is {scheme.describe()}, and factors are trained in float types: set `factors` of that step"
    what = f"stored as {scheme.describe()}" if scheme.parts else "a plain linear"
    return f"it is {what}, without a product to train: put a step before it that adds one, such as eora"


STEPS: Steps = [
    {"method": "gptq", "target": {"bits": 2, "group_size": 64, "symmetric": False}},
    {"method": "eora", "target": {"rank": 16}, "options": {"factors": "float16"}},
    {"method": "int2-1", "options": {"objective_options": {"soft": 0.5}}},
]

METHOD = Train(
    paper="Chai et al. 2023, arXiv 2306.08162",
    options=Options,
    covers={"int2-1": STEPS},
    recipe=STEPS,
    begin=begin,
    admits=admits,
    copies=2,
)
