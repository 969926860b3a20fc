"""What the interface is told beside model and recipe, as the few objects that travel from there to where they count."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

HELD_OUT = "docs:library"  # the text to measure on: another half of `docs` than the one that is calibrated on
JUDGE_KEY = "LILLIPUT_JUDGE_KEY"  # the variable of the environment that holds the key of a judge's server


@dataclass(frozen=True)
class Calibration:
    """What methods see of text: `samples` windows of `tokens` tokens of `data`, from its start, or where `seed` draws
    them."""

    data: str = "docs"
    samples: int = 128
    tokens: int = 512
    seed: int | None = None


@dataclass(frozen=True)
class Limits:
    """The most bytes: of RAM above the imported package, and of the written folder. None: no limit is stated. context:
    tokens of a sequence whose keys and values count in the size."""

    memory: int | None = None
    size: int | None = None
    context: int | None = None


@dataclass(frozen=True)
class Decoding:
    """The most seconds that a decoding step of one sequence may be predicted to take on a device of `efficiency`."""

    seconds: float
    device: str


@dataclass(frozen=True)
class Fit:
    """What a composition is searched for: the most bytes of the written folder or file, the average of stored bits over
    the linears of the blocks, or the time of a decoding step; `context`: tokens of a sequence whose keys and values
    count in the size; `menu`: a name of `budget.menu`, or grids, none for the
    usual one; `to`: the container that takes the place of the folder; `fit_blocks`: fit the chosen codes of each block
    to its outputs afterwards."""

    size: int | None = None
    bits: float | None = None
    decoding: Decoding | None = None
    menu: tuple[str, ...] = ()
    to: str | None = None
    fit_blocks: bool = False
    context: int | None = None


@dataclass(frozen=True)
class Compute:
    """How a model is run: dtype and device by name, and the folder for what lies on disk meanwhile, None for the usual
    place."""

    dtype: str = "auto"
    device: str = "auto"
    work: Path | None = None


@dataclass(frozen=True)
class Text:
    """What is measured on: of each text `windows` windows of `tokens` tokens (None: 1,024, or all positions that the
    model knows) that begin `stride` tokens apart (None: side by side). A model that stores keys and values compressed
    reads `chunk` tokens at a time."""

    data: tuple[str, ...] = (HELD_OUT,)
    windows: int = 8
    tokens: int | None = None
    stride: int | None = None
    chunk: int = 128


@dataclass(frozen=True)
class Judge:
    """Who compares answers to instructions. url: what comes before /chat/completions, such as http://localhost:8000/v1;
    model: its name on that server; key: of the server, if it asks for one; wait: seconds before the first repetition of
    a request that failed."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    wait: float = 1.0


@dataclass(frozen=True)
class Parts:
    """What is measured beside text.

    tasks: names, or NAME=FILE, with at most `limit` items each and `shots` examples before each item (None: all, and
    the task's own number); prompts: how many to continue greedily; where: find the blocks and linears that the loss
    comes from; speed: time both models; roofline: predict times on named devices; judge: who compares the answers to
    instructions; adapter: folder of one that the model computes with, on text alone.
    """

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    shots: int | None = None
    prompts: int = 0
    where: bool = False
    speed: bool = False
    roofline: bool = False
    judge: Judge | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class Gates:
    """What a measurement must keep to: the most KL divergence in nats, the largest rise of perplexity as a share, the
    least share of equal first choices. None: no gate."""

    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_agreement: float | None = None
