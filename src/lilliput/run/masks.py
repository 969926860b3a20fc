"""Recording a mask: which groups of hidden channels a text uses most, in a folder whose MLPs have gates."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from lilliput.algebra import contributions
from lilliput.data import load_tokens
from lilliput.errors import LilliputError, PlanError
from lilliput.metrics import slices
from lilliput.model.stored import open_model
from lilliput.progress import Progress
from lilliput.runtime import behaviours
from lilliput.runtime.behaviours import masks
from lilliput.runtime.behaviours.gates import Gates, gated
from lilliput.runtime.behaviours.state import share
from lilliput.streaming.walk import last_hidden


class Recorder:
    """Sums, by MLP, the contributions of its groups over all tokens that it sees."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self._gram: tuple[str, Tensor] | None = None  # of the MLP that is running

    def __call__(self, gates: Gates, last: nn.Module, hidden: Tensor) -> None:
        if self._gram is None or self._gram[0] != gates.name:
            weight: Tensor = last.weight  # type: ignore[assignment]
            self._gram = gates.name, contributions.grams(weight.detach(), gates.group_size)
        found = contributions.norms(hidden.flatten(0, -2), self._gram[1]).sum(0, dtype=torch.float64).cpu()
        self.totals[gates.name] = self.totals.get(gates.name, torch.zeros_like(found)) + found


def record(
    folder: Path,
    name: str,
    data: str,
    *,
    windows: int,
    tokens: int | None,
    keep: float | None,
    progress: Progress | None = None,
) -> Path:
    """Write the mask `name` of a folder: of each MLP, the groups with the largest mean contribution on a text.

    keep: share of the groups (None: that of the folder's gates). One block is in memory at a time. Raises LilliputError
    for a folder without gates.
    """
    masks.path_of(folder, name)
    if keep is not None and not 0.0 < keep <= 1.0:
        raise PlanError(f"a mask that keeps {keep} of the groups: give more than 0 and at most 1")
    model = open_model(folder)
    mlps = {x.gates.name: x.gates for x in gated(model.skeleton.model)}
    if not mlps:
        raise LilliputError(f"{folder} has no gates: record masks of folders that dynamic-pruning has written")
    state = behaviours.require(model.skeleton.model)
    length = slices.tokens([model], tokens)
    text = load_tokens(data, model.source.tokenizer(), samples=windows, tokens=length, vocabulary=model.vocabulary)
    state.recorder = recorder = Recorder()
    try:
        with behaviours.paused(model.skeleton.model), tempfile.TemporaryDirectory(prefix="lilliput-mask-") as place:
            last_hidden(model, text.ids, Path(place), batch=1, progress=progress).delete()
    finally:
        state.recorder = None
    groups = {}
    for mlp, gates in mlps.items():
        count = gates.count if keep is None else share(keep, gates.groups)
        order = recorder.totals[mlp].argsort(descending=True, stable=True)[:count]
        groups[mlp] = order.sort().values.tolist()
    return masks.write(folder, name, groups, {"data": text.fingerprint, "windows": windows, "tokens": length})
