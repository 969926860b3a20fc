from dataclasses import replace

import pytest
import torch

from lilliput.efficiency.roofline import rooflines
from lilliput.efficiency.serving import sparse, w8a8, weight_only

FOUR = weight_only(4, 128, torch.bfloat16)


@pytest.fixture
def say(folder, packed, device, opened):
    base = opened(folder("llama"))

    def find(what_if=None, *, phase="decode", model=None, batch=1, context=32, **changes):
        other = base if model is None else opened(packed(model))
        one = replace(device, **changes)
        rows = rooflines(other, base, [one], batches=(batch,), contexts=(context,), what_if=what_if)
        return next(x for x in rows if x.phase == phase).sentence

    return find


def test_fewer_bytes_help_where_memory_binds(say):
    assert say(FOUR).startswith("On a toy at batch 1 and 32 tokens decode is bound by memory: moving ")
    assert "times as fast" in say(FOUR)


def test_weights_alone_do_not_help_where_arithmetic_binds(say):
    fast = {"bandwidth": 1e9}
    said = say(FOUR, phase="prefill", batch=4, **fast)
    assert said == (
        "On a toy at batch 4 and 32 tokens prefill is bound by arithmetic: 4-bit weights will not make it faster."
    )
    assert "fewer operations can make it up to" in say(sparse(2, 4, torch.bfloat16), phase="prefill", **fast)
    assert "8-bit weights and inputs can make it up to" in say(w8a8(), phase="prefill", **fast)
    slow = {"bf16": 1000.0}
    assert "will not make it faster, for the device has no int8" in say(w8a8(), phase="prefill", peaks=slow, **fast)


def test_what_the_engine_does_with_the_file_is_said(say):
    once = say(model="compressed-tensors", runtime="transformers", peaks={"fp32": 500.0})
    assert "decodes the 6-bit weights when it loads them and runs dense" in once
    assert "anew in each pass, which makes it slower" in say(model="lilliput")
    assert "bytes" in say(model="compressed-tensors")


def test_overhead_is_said_to_be_what_takes_the_time(say):
    said = say(FOUR, overhead=(0.0, 1e9))
    assert "decode is bound by Python and launches of operators: 4-bit weights will not make it faster" in said
    assert "100% of the time goes to those" in said


def test_what_else_fills_the_bandwidth_is_named(say):
    said = say(FOUR, batch=1000, memory=1e9)
    assert "4-bit weights will not make it faster" in said
    assert "of the bytes moved go to the kv cache" in said


def test_a_model_that_does_not_fit_is_said_not_to(say):
    assert "the model does not fit: weights and cache take" in say(FOUR, memory=1000.0)
    assert "Only the compressed model fits" in say(FOUR, memory=60_000.0)
