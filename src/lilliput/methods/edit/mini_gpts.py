"""Mini-GPTs: hidden channels leave that are hardly active on the text at hand; heads likewise.

A channel's score is the mean of |x_j| over the calibration tokens at the input of the down projection; a head's, the
mean over its channels at the input of the o projection. Text of one domain keeps what that domain uses.

Paper: Valicenti et al. 2023, arXiv 2312.12682. There fine-tuning follows; here `refit` or `distil` may.
Cost: one forward pass. Limits: looks at no weights, so a quiet channel with large weights leaves before a loud one with
none (`flap` sees both); with `uniform: false` blocks are compared by sizes that their norms have a part in.
"""

from __future__ import annotations

from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import (
    EditIO,
    EditScores,
    EditView,
    Thinning,
    by_reader,
    readers_of,
    thinned,
)


class Options(Thinning):
    """See the module's docstring."""


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The mean size of what every channel and head hands on."""
    block = view.anatomy
    scores = by_reader(block, lambda name: io.stats[block.linear(name).site].need("absmean"))
    columns = {key: sum(int((x >= 0).sum()) for x in owners.values()) for key, owners in readers_of(block).items()}
    return {key: tuple(x * len(values) / columns[key] for x in values) for key, values in scores.items()}


METHOD = Edit(
    paper="Valicenti et al. 2023, arXiv 2312.12682",
    options=Options,
    needs=("absmean",),
    covers={
        "mini-gpts": [{"method": "mini-gpts"}],
    },
    sizes=thinned,
    score=score,
)
