from itertools import count

import pytest
import torch

from lilliput.efficiency.devices import device, devices, matmul_peak, measure_device, memory_bandwidth, pass_overhead
from lilliput.errors import PlanError


def test_the_named_devices_are_whole_and_plausible():
    found = {x.name: x for x in devices()}
    assert set(found) == {"h100", "h200", "a100", "rtx4090", "phone"}
    for x in found.values():
        assert {"fp32", "bf16", "fp16", "int8"} <= set(x.peaks)
        assert x.peaks["fp32"] < x.peaks["bf16"] <= x.peaks["int8"]
        assert 1e9 < x.memory < x.bandwidth < x.peaks["fp32"]
        assert x.runtime == "kernels"
    assert found["h200"].peaks == found["h100"].peaks
    assert found["h200"].bandwidth > found["h100"].bandwidth


def test_missing_arithmetic_is_widened():
    a100 = device("a100")
    assert (a100.arithmetic("int8"), a100.arithmetic("fp8"), a100.arithmetic("fp32")) == ("int8", "bf16", "fp32")
    with pytest.raises(PlanError, match="no peak for int3"):
        a100.arithmetic("int3")
    with pytest.raises(PlanError, match=r"unknown device 'h10'.*h100"):
        device("h10")


def test_rates_follow_from_the_clock():
    ticks = count()  # every look at the clock is a second later: each run takes one

    def clock():
        return float(next(ticks))

    assert matmul_peak(torch.float32, side=8, repeats=2, clock=clock) == 2 * 8**3
    assert memory_bandwidth(64, repeats=2, clock=clock) == 128  # a copy reads and writes
    with pytest.raises(PlanError, match="clock did not advance"):
        matmul_peak(torch.float32, side=8, repeats=1, clock=lambda: 0.0)


def test_this_machine_is_measured():
    found = measure_device(side=32, buffer=1 << 16, repeats=1)
    assert found.name == "this-cpu"
    assert set(found.peaks) == {"fp32", "bf16"}
    assert min(*found.peaks.values(), found.bandwidth, found.memory) > 0
    assert found.runtime == "transformers"
    assert found.overhead[1] >= 0


def test_overhead_is_the_line_through_two_depths():
    once, each = pass_overhead(repeats=5)
    assert once + each > 0
    ticks = count()
    # Every step takes one tick, whatever its depth: all of it comes once.
    assert pass_overhead(repeats=2, clock=lambda: float(next(ticks))) == (1.0, 0.0)
