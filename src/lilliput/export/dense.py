"""Which linears of a written model stay dense, by the names that engines match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from lilliput.anatomy.wrapper import file_names, module_name, skeleton, text_prefix
from lilliput.export.outcome import Outcome

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def dense_linears(outcomes: Sequence[Outcome], config: PretrainedConfig) -> list[str]:
    """Every linear that stays dense, by module name and, where it differs, by file name; routers included. Sorted."""
    model = skeleton(config)
    prefix = text_prefix(model, config)
    modules = dict(model.named_modules())
    quantized = {module_name(x.name, modules, prefix) for x in outcomes if x.codes is not None}
    linears = {n for n, m in modules.items() if isinstance(m, nn.Linear) and n not in quantized}
    names = {x.stored for x in outcomes if x.codes is None and not x.expert}
    return sorted(linears | file_names(model, linears) | names)
