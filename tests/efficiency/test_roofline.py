import json
from dataclasses import replace

import pytest
import torch

from lilliput.efficiency.devices import device as named
from lilliput.efficiency.roofline import operators, rooflines, workload
from lilliput.efficiency.serving import sparse, w8a8, weight_only
from lilliput.errors import PlanError


def by_name(found):
    return {x.name: x for x in found}


def test_decode_and_prefill_by_hand(folder, device, opened):
    work = workload(opened(folder("llama")), device)
    assert work.dtype == torch.bfloat16  # engines with kernels serve 16 bits
    found = by_name(operators(work, device, "decode", 3, 10))
    gate = found["gate"]
    assert gate.flops == 3 * 2 * 2 * 32 * 48
    assert gate.bytes == 2 * (2 * 32 * 48 + 3 * 2 * (32 + 48))  # weights once, inputs and outputs of 3 tokens
    assert (gate.seconds, gate.bound) == (gate.bytes / 10, "memory")
    assert found["attention"].flops == 3 * 2 * 4 * 4 * 8 * 10
    assert found["kv cache"].bytes == 2 * 2 * (3 * 32 + 3 * 10 * 32)
    assert found["head"].bytes == 2 * 256 * 32 + 3 * 2 * (32 + 256)
    prefill = by_name(operators(work, device, "prefill", 3, 10))
    assert prefill["gate"].flops == 10 * gate.flops
    assert prefill["attention"].flops == 3 * 2 * 4 * 4 * 8 * 55
    assert prefill["head"] == found["head"]  # logits at the last token only
    fast = replace(device, bandwidth=1e9)
    gate = by_name(operators(work, fast, "prefill", 3, 10))["gate"]
    assert (gate.seconds, gate.bound) == (pytest.approx(gate.flops / 1000), "arithmetic")


def test_overhead_comes_on_top_once_and_for_each_block(folder, device, opened):
    model = opened(folder("llama"))
    work = workload(model, device)
    bare = operators(work, device, "decode", 1, 10)
    slow = replace(device, overhead=(1e4, 1e6))
    *same, besides = operators(work, slow, "decode", 1, 10)
    assert tuple(same) == bare
    assert (besides.seconds, besides.bound, besides.flops) == (1e4 + work.shapes.blocks * 1e6, "overhead", 0)
    (row,) = [x for x in rooflines(model, model, [slow], batches=(1,), contexts=(10,)) if x.phase == "decode"]
    assert (row.bound, row.speedup) == ("overhead", 1.0)
    assert row.seconds == pytest.approx(sum(x.seconds for x in bare) + besides.seconds)


def test_formats_change_bytes_and_arithmetic(folder, packed, device, opened):
    base = opened(folder("llama"))

    def gate(what_if=None, model=base, runtime="kernels"):
        work = workload(model, replace(device, runtime=runtime), dtype=torch.bfloat16, what_if=what_if)
        return by_name(operators(work, device, "decode", 1, 10))["gate"], work

    (plain, before), weights = gate(), 2 * 32 * 48
    through = 2 * 2 * (32 + 48)
    assert plain.bytes == 2 * weights + through
    four, after = gate(weight_only(4, 16, torch.bfloat16))
    assert (four.bytes, four.flops) == (weights * 5 / 8 + through, plain.flops)
    assert after.memory < before.memory
    assert gate(sparse(2, 4, torch.bfloat16))[0].flops == plain.flops / 2
    eight = gate(w8a8())[0]
    assert eight.bytes == weights + 2 * (32 + 2 * 48)
    # decoded once at load: as if it had never been packed; decoded in each pass: both forms move
    once = opened(packed("compressed-tensors"))
    assert gate(model=once, runtime="transformers")[0] == plain
    assert gate(model=once)[0].bytes < plain.bytes
    native = opened(packed("lilliput"))
    assert gate(model=native)[0].bytes == weights * (6 / 8 + 4) + through


def test_int8_runs_at_the_int8_peak_where_there_is_one(folder, device, opened):
    base = opened(folder("llama"))
    fast = replace(device, bandwidth=1e12)
    work = workload(base, fast, what_if=w8a8())
    gate = by_name(operators(work, fast, "prefill", 1, 32))["gate"]
    assert gate.seconds == pytest.approx(gate.flops / 2000)
    without = replace(fast, peaks={"bf16": 1000.0})
    assert by_name(operators(work, without, "prefill", 1, 32))["gate"].seconds == pytest.approx(gate.flops / 1000)


def test_experts_are_read_as_far_as_tokens_choose_them(folder, device, opened):
    work = workload(opened(folder("mixtral")), device)
    weights = 2 * 4 * 32 * 48
    for batch in (1, 2, 50):
        found = by_name(operators(work, device, "decode", batch, 10))["gate"]
        assert found.flops == batch * weights  # 2 of 4 experts: half of 2 * weights
        through = 2 * 2 * batch * 2 * (32 + 48)
        assert found.bytes == pytest.approx(2 * weights * (1 - 0.5**batch) + through)


def test_rows_are_complete_and_plain(folder, packed, opened):
    base, model = opened(folder("llama")), opened(packed("compressed-tensors"))
    rows = rooflines(model, base, [named("h100"), named("phone")], batches=(1, 16), contexts=(32, 4096))
    assert len(rows) == 2 * 2 * 1 * 2  # the model has 64 positions
    for row in rows:
        plain = json.loads(json.dumps(row.to_json(), allow_nan=False))
        assert {"device", "batch", "context", "phase", "base_seconds", "seconds", "speedup", "bound"} <= plain.keys()
        assert plain["seconds"] == pytest.approx(sum(x["seconds"] for x in plain["operators"]))
        assert plain["speedup"] == pytest.approx(row.base_seconds / row.seconds)
        assert 1 <= plain["speedup"] < 16 / 6
        assert plain["sentence"].startswith("On a")
    alone = rooflines(base, None, [named("h100")], batches=(1,), contexts=(32,))
    assert [x.base_seconds for x in alone] == [None, None]
    assert all("tokens a second at best" in x.sentence for x in alone)


def test_a_model_against_itself_is_as_fast_as_itself(folder, opened):
    base = opened(folder("gemma"))
    for row in rooflines(base, base, [named("a100")], contexts=(16,)):
        assert row.speedup == 1.0
        assert "nothing that takes time differs" in row.sentence


def test_bad_settings_are_refused(folder, opened):
    base = opened(folder("llama"))
    with pytest.raises(PlanError, match="has 64 positions"):
        rooflines(base, None, [named("h100")], contexts=(4096,))
    with pytest.raises(PlanError, match="1 or more"):
        rooflines(base, None, [named("h100")], batches=(0,), contexts=(8,))
