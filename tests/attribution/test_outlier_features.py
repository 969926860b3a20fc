"""Outlier channels, counted from inputs that are kept whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lilliput.attribution.outlier_features import Channels, Outliers, measured
from lilliput.model.stored import open_model
from lilliput.stats import fold

Tiny = Callable[[str], Path]


@pytest.mark.slow
def test_it_counts_what_single_inputs_show(tiny: Tiny, tmp_path: Path) -> None:
    import transformers as tf

    ids = torch.arange(3, 43).view(2, 20)
    alpha = 1.5
    found = measured(open_model(tiny("llama")), ids, tmp_path, alpha, batch=1)
    whole = tf.AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    seen: dict[str, Tensor] = {}
    for name, module in whole.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
    with torch.no_grad():
        whole(ids)
    rows = {(row["site"], row["channel"]): row for row in found.to_json()["channels"]}
    assert rows
    for (site, channel), row in rows.items():
        own = [x.reshape(-1, x.shape[-1])[:, channel].abs() for name, x in seen.items() if name.endswith(f".{site}")]
        assert row["blocks"] == sum(bool((x >= alpha).any()) for x in own)
        assert row["share_of_tokens"] == pytest.approx(max(float((x >= alpha).float().mean()) for x in own))
        assert row["absmax"] == pytest.approx(max(float(x.max()) for x in own), rel=1e-4)
    assert not list(tmp_path.iterdir())


def test_a_quarter_of_the_blocks_and_a_share_of_the_tokens_make_it_systematic() -> None:
    channels = Channels(3)
    for block in range(8):
        x = torch.zeros(100, 3)
        x[:10, 0] = 7.0 if block < 2 else 0.0  # two of eight blocks, a tenth of the tokens
        x[:2, 1] = 8.0  # all blocks, few tokens
        hits = (x.abs() >= 6).sum(0).float()
        channels.add(hits, fold.update(fold.init(3, ("absmax",)), x))
    plain = Outliers(6.0, {}, {("q_proj", 3): channels}).to_json()
    assert (plain["hit"], plain["systematic"], plain["of"]) == (2, 1, 3)
    assert [(x["channel"], x["blocks"], x["systematic"]) for x in plain["channels"]] == [(0, 2, True), (1, 8, False)]
    assert plain["channels"][0]["share_of_tokens"] == pytest.approx(0.1)
