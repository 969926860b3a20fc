"""A written folder as a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lilliput.anatomy.wrapper import opener

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The transformers model in `folder`, ready to run; folders in the native format included."""
    from transformers import AutoConfig

    auto = opener(AutoConfig.from_pretrained(folder))
    loaded: PreTrainedModel = auto.from_pretrained(folder, dtype=dtype or "auto").eval()
    return loaded
