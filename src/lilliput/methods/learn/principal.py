"""Principal directions: the residual stream is turned so that its first channels hold the most; the function stays.

R = the eigenvectors of the sum of X^T X over everything that reads the residual stream through a norm, X the normalised
stream there, largest eigenvalue first, in float64. Readers W <- W R, writers W <- RT W, embedding E <- E R, head
W <- W R.

Paper: Ashkboos et al. 2024 (SliceGPT), arXiv 2401.15024, with one basis for the whole model.
Cost: one forward pass of the calibration samples and one eigendecomposition. Limits: RMS norms without post-norms only;
a tied head is untied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from lilliput.algebra.rotations import principal
from lilliput.errors import LilliputError
from lilliput.folds.kinds import ResidualRotation
from lilliput.streaming.backward import Samples
from lilliput.target import Strict, Target
from lilliput.verbs.learn import Learn

if TYPE_CHECKING:
    from lilliput.model.rotated import RotatedModel  # which imports transformers


class Options(Strict):
    """See the module's docstring."""

    samples: int = Field(128, ge=1, description="calibration samples that are looked at, at most")


def sequences(o: Options, samples: int) -> int:
    """Samples, of so many."""
    return min(samples, o.samples)


def learn(
    model: RotatedModel, samples: Samples | None, targets: Mapping[str, Target], o: Options
) -> Sequence[ResidualRotation]:
    """The rotation to principal directions. Raises LilliputError where nothing was seen."""
    from lilliput.streaming.collect import statistics
    from lilliput.streaming.states import Activations

    if samples is None:
        raise RuntimeError("principal directions were planned without samples")
    ids, width = samples.ids[: o.samples], model.skeleton.hidden_size
    readers = [{name for _, names in block.residual_readers for name in names} for block in model.anatomy().blocks]
    total = torch.zeros(width, width, dtype=torch.float64)
    shape = (len(ids), ids.shape[1], width)
    states = Activations(samples.folder / "principal.bin", shape, model.skeleton.dtype, create=True)
    try:
        with torch.no_grad():
            for number, stats in statistics(model, ids, 1, states, frozenset({"gram"})):
                for site in model.anatomy().blocks[number].sites:
                    if set(site.linears) & readers[number] and stats[site.name].count:
                        gram = stats[site.name].need("gram")
                        total += gram.double().cpu() / float(gram.diagonal().mean().clamp_min(1e-30))
                if samples.progress is not None:
                    samples.progress.step(number + 1, len(readers), "principal directions")
    finally:
        states.delete()
    if not float(total.diagonal().sum()) > 0.0:
        raise LilliputError("nothing enters the blocks that reads the residual stream: check the calibration data")
    return (ResidualRotation(principal(total)),)


METHOD = Learn(
    paper="Ashkboos et al. 2024, arXiv 2401.15024",
    options=Options,
    needs=(),
    covers={},
    run=learn,
    sequences=sequences,
)
