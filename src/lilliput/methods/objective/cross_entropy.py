"""Cross-entropy with the text: what language models are trained by, without a teacher.

    L = -log q(y)

of each token y that counts, after those before it. With text that another model has written it is distillation from a
model whose probabilities, or whose vocabulary, are not those of the student.

Paper: Kim and Rush 2016 (text written by a teacher), arXiv 1606.07947. Cost: no teacher is opened. Limits: the text
decides; a model that is recovered on little of it forgets the rest.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from lilliput.target import Strict
from lilliput.verbs.objective import Objective, TokenIO


class Options(Strict):
    """See the module's docstring."""

    smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of the target that all tokens have alike")


def loss(io: TokenIO, o: Options) -> Tensor:
    """Of each token, float32 [n]."""
    log_q = io.logits.log_softmax(-1)
    hard = -log_q.gather(1, io.labels[:, None])[:, 0]
    return hard if o.smoothing == 0 else (1 - o.smoothing) * hard - o.smoothing * log_q.mean(-1)


METHOD = Objective(
    paper="Kim and Rush 2016, arXiv 1606.07947",
    options=Options,
    covers={},
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=loss,
    teaches=False,
)
