"""What passes over the blocks of a model take with one block resident: upper bounds from shapes, fitted to measured
peaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lilliput.anatomy.model import Block, Linear
from lilliput.machine.cost import Cost
from lilliput.model.weights import TABLE_ROWS
from lilliput.streaming.backward import LOGITS


@dataclass(frozen=True)
class Run:
    """The numbers that peaks depend on beside the linears at work.

    blocks: of the whole model; hidden: width of the residual stream; vocabulary: rows of the embedding; samples,
    tokens: calibration samples, and tokens in each; itemsize: bytes of a number in the dtype of the passes; stored: in
    the checkpoint; batch: samples in one forward pass; before: the same of the model before anything left it, where
    steps edit it; processes: that share the run.
    """

    blocks: Sequence[Block]
    hidden: int
    vocabulary: int
    samples: int
    tokens: int
    itemsize: int
    stored: int
    batch: int = 1
    before: Run | None = None
    processes: int = 1

    @property
    def kinds(self) -> tuple[Block, ...]:
        """One block of each kind."""
        return tuple({id(block): block for block in self.blocks}.values())

    @property
    def weights(self) -> int:
        """Weights of all linears of all blocks."""
        return sum(x.parameters for block in self.blocks for x in block.linears)


def of_embedding(run: Run) -> Cost:
    """The rows of the embedding that the samples use, and a slab of the table as it is read."""
    rows = min(run.vocabulary, run.samples * run.tokens)
    return Cost(ram=(rows * run.itemsize + TABLE_ROWS * (run.stored + 4)) * run.hidden)


def of_resident(run: Run, block: Block, *, grams: bool, lockstep: bool) -> Cost:
    """What stays while a pass is at `block`: its weights, all suspended forward passes in lockstep, and the Gram
    matrices of all its sites where `grams`."""
    ram = sum(x.parameters for x in block.linears) * run.itemsize
    if lockstep:
        ram += run.samples * run.tokens * live_per_token(block, run.hidden) * run.itemsize
    if grams:
        ram += sum(4 * site.width**2 for site in block.sites)
    return Cost(ram=ram)


def of_forward(run: Run, block: Block, *, gram: bool) -> Cost:
    """A batch that runs through `block`, in float32 where it is folded; `gram`: and the Gram matrix that takes it."""
    widest = max(max(x.out_features, x.in_features) for x in block.linears)
    tokens = run.batch * run.tokens
    ram = tokens * (4 * widest + 6 * run.hidden) * run.itemsize + tokens * widest * 4
    return Cost(ram=ram + gram * 4 * max(site.width for site in block.sites) ** 2)


def live_per_token(block: Block, hidden: int) -> int:
    """Elements per token that a suspended forward pass holds at its fullest pause."""
    fullest = 0
    ran: list[Linear] = []
    for site in block.sites:
        names = set(site.linears)
        before = [x for x in ran if x.name.rsplit(".", 1)[0] == site.linears[0].rsplit(".", 1)[0]]
        # An activation function has merged gate and up by the time the down projection runs.
        outputs = sum(x.out_features for x in before if x.role in {"q", "k", "v", "qkv"})
        # The block's input, what is added to it after the attention, and that sum normalised.
        fullest = max(fullest, 3 * hidden + site.width + outputs)
        ran += [x for x in block.linears if x.name in names]
    return fullest


def of_rotation(run: Run) -> Cost:
    """A rotation of the residual stream, which stays: in float64 to compose it, in float32 to apply it."""
    return Cost(ram=12 * run.hidden**2)


def of_gradients(run: Run, *, outside: bool = True) -> Cost:
    """What a backward pass holds at its fullest, beyond what is always there.

    `outside`: whether gradients of the final tensors and the head are wanted too.
    """
    widest = 0
    for block in run.kinds:
        weights = sum(x.parameters for x in block.linears)
        largest = max(x.parameters for x in block.linears)
        widths = sum(x.out_features + x.in_features for x in block.linears if x.expert is None or x.expert < 2)
        states = 3 * run.tokens * (widths + 8 * run.hidden) * 4
        widest = max(widest, weights * (run.itemsize + 4) + 12 * largest + states)
    logits = min(max(LOGITS, run.vocabulary), run.tokens * run.vocabulary)
    head = run.vocabulary * run.hidden * (2 * run.itemsize + (10 if outside else 4))
    return Cost(ram=max(widest, head + 4 * 4 * logits + 8 * run.tokens * run.hidden * 4))


def of_loss(run: Run, beside: int) -> Cost:
    """What a loss without gradients holds at its fullest; `beside`: what making a weight takes meanwhile."""
    widest = 0
    for block in run.kinds:
        weights = sum(x.parameters for x in block.linears) * run.itemsize
        states = max(x.out_features + x.in_features for x in block.linears)
        widest = max(widest, weights + max(beside, 3 * run.tokens * (states + 4 * run.hidden) * 4))
    logits = min(max(LOGITS, run.vocabulary), run.tokens * run.vocabulary)
    head = run.vocabulary * run.hidden * (run.itemsize + max(run.itemsize, run.stored))
    return Cost(ram=max(widest, head + 3 * 4 * logits + 4 * run.tokens * run.hidden * 4))


def of_decomposing(linears: Sequence[Linear]) -> Cost:
    """The largest of the linears while it is decomposed in float64 beside its own weight and Gram matrix (measured)."""
    worst = 0
    for x in linears:
        side = min(x.out_features, x.in_features)
        beside = 4 * (x.parameters + x.in_features**2)
        worst = max(worst, beside + 8 * (6 * x.parameters + 5 * side**2) + 12 * x.in_features**2)
    return Cost(ram=worst)


def of_solving(linears: Sequence[Linear], *, gram: bool, squares: bool = False) -> Cost:
    """Linears of one site while they are compressed: their weights with a solver's copies, and their Gram matrix
    likewise where there is one (`gram`); `squares`: squared gradients lie beside the weights."""
    weights = 4 * sum(x.parameters for x in linears)
    width = 4 * max(x.in_features for x in linears) ** 2
    # A Gram matrix is factored while the weights lie still, and written out when one copy of it is left.
    ram = max(2 * weights + 3 * width, 4 * weights + 2 * width) if gram else 4 * weights + width
    return Cost(ram=ram + 2 * weights * squares)
