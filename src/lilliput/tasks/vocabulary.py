"""A model in memory that reads and predicts some of its tokens alone, for comparing it with one that has no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lilliput.anatomy.token_ids import numbering, renumbered
from lilliput.errors import DataError


def narrow_(model: Any, kept: Sequence[int], name: str) -> None:
    """Leave a model of transformers the rows of these token ids (ascending) in embedding and head, in place, and number
    the ids that its generation config names anew. Probabilities are then divided among these tokens.

    Raises DataError, with the model's name, for packed tables and for tokens that are named and not kept.
    """
    rows = torch.tensor(list(kept))
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    before = tables[0].weight.shape[0]
    cut: dict[int, nn.Parameter] = {}
    for table in tables:
        whole = None if table is None else table._parameters.get("weight")
        if whole is None or whole.shape[0] != before:
            raise DataError(
                f"{name} cannot be compared on some of its tokens alone: its embedding or head is packed, or they have "
                "other rows than the tokens. Compare with the original of which the smaller vocabulary was made."
            )
        index = rows.to(whole.device)
        if id(whole) not in cut:
            cut[id(whole)] = nn.Parameter(whole.detach()[index], requires_grad=False)
        table.weight = cut[id(whole)]
        bias = table._parameters.get("bias")
        if bias is not None:
            table.bias = nn.Parameter(bias.detach()[index], requires_grad=False)
    tables[0].num_embeddings = tables[1].out_features = len(kept)
    tables[0].padding_idx = None
    config = model.config.get_text_config()
    config.vocab_size = len(kept)
    generation = model.generation_config
    for key, value in renumbered(generation.to_dict(), numbering(kept), before, f"{name}'s generation config").items():
        setattr(generation, key, value)
