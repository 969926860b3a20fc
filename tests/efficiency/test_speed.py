import json
from itertools import count

import pytest
import torch

from lilliput.efficiency import runner
from lilliput.efficiency import speed as timed
from lilliput.efficiency.runner import Runner
from lilliput.efficiency.speed import Rounds, interleave, measure_speed, speedup, timing
from lilliput.errors import DataError, SourceError


class Clock:
    """Seconds that only pass when something is said to have run."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Fake:
    def __init__(self, clock, log, name, prefill, decode):
        self.clock, self.log, self.name, self.took = clock, log, name, {"prefill": prefill, "decode": decode}

    def _run(self, phase):
        self.log.append(self.name + phase[0])
        self.clock.now += self.took[phase]

    def prefill(self):
        self._run("prefill")

    def decode(self, lap):
        self._run("decode")
        lap()
        self.clock.now += 0.5
        lap()


def test_rounds_are_interleaved_and_warm_up_is_left_out():
    clock, log = Clock(), []
    runners = [Fake(clock, log, "A", 2.0, 1.0), Fake(clock, log, "B", 4.0, 3.0)]
    found = interleave(runners, runs=3, warmup=2, clock=clock)
    assert log == ["Ap", "Ad", "Bp", "Bd"] * 5
    assert found == [Rounds((2.0,) * 3, ((1.0, 0.5),) * 3), Rounds((4.0,) * 3, ((3.0, 0.5),) * 3)]
    assert found[0].token == [0.75] * 3
    with pytest.raises(DataError, match="1 runs"):
        interleave(runners, runs=1, warmup=0, clock=clock)


def test_median_and_tail_of_known_times():
    found = timing([float(x) for x in range(101, 0, -1)])
    assert (found.median, found.p90, found.p95, found.best) == (51.0, 91.0, 96.0, 1.0)


def test_percentiles_are_of_tokens_not_of_rounds(folder, monkeypatch):
    """One slow token in ten is in the 95th percentile, though every round has the same mean."""
    clock = Clock()

    def decode(self, lap):
        for i in range(self.new):
            clock.now += 10.0 if i == 0 else 1.0
            lap()

    def prefill(self):
        clock.now += 2.0

    monkeypatch.setattr(Runner, "decode", decode)
    monkeypatch.setattr(Runner, "prefill", prefill)
    monkeypatch.setattr(timed, "matmul_peak", lambda *_, **__: 1.0)
    found = measure_speed(folder("llama"), prompt=4, new=10, runs=3, warmup=0, memory=False, clock=clock)
    assert (found.decode.seconds.median, found.decode.seconds.p95) == (1.0, 10.0)
    assert found.throughput == pytest.approx(1 / 1.9)
    assert (found.prefill.seconds.median, found.prefill.seconds.p90) == (2.0, 2.0)


def test_drift_that_meets_both_leaves_the_ratio():
    base, own = [2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 4.0, 8.0]
    found = speedup(base, own)
    assert (found.value, found.low, found.high) == (pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0))
    with pytest.raises(DataError, match="no measurable time"):
        speedup([0.0, 1.0], [1.0, 1.0])


def test_the_cached_steps_are_those_of_one_long_pass(folder):
    runner = Runner(folder("llama"), prompt=6, new=4)
    seen = []
    runner.model.register_forward_hook(lambda _, __, out: seen.append(out.logits))
    runner.prefill()
    runner.decode()
    assert [x.shape[1] for x in seen] == [1] * 5  # logits at the last token only
    with torch.no_grad():
        whole = runner.model(runner.ids).logits[0]
    torch.testing.assert_close(torch.cat([x[0] for x in seen[:5]]), whole[5:], rtol=1e-4, atol=1e-4)
    runner.prefill()  # each round begins anew
    runner.decode()
    torch.testing.assert_close(torch.cat(seen[6:]), torch.cat(seen[:5]), rtol=0, atol=0)


def test_a_model_beside_itself(folder):
    ticks = count()
    found = measure_speed(
        folder("llama"),
        folder("llama"),
        prompt=8,
        new=2,
        runs=3,
        warmup=1,
        memory=False,
        clock=lambda: float(next(ticks)),
    )
    # every prefill and every decoded token takes one tick; so does the matrix product
    assert found.prefill.speedup.to_json() == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found.decode.seconds.median == 1.0
    assert (found.throughput, found.base_throughput) == (1.0, 1.0)
    assert found.mfu == found.base_mfu == pytest.approx((8 * 2 * 15360 + 2 * 8192 + 2 * 4 * 32 * 36) / found.peak_flops)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    keys = {"runs", "prefill", "decode", "throughput", "peak_rss_bytes", "base_peak_rss_bytes", "mfu", "peak_flops"}
    assert keys <= plain.keys()
    assert plain["decode"]["base_seconds"] == {"median": 1.0, "p90": 1.0, "p95": 1.0, "best": 1.0}
    assert plain["peak_rss_bytes"] is None


def test_a_model_alone_and_by_the_real_clock(folder):
    found = measure_speed(folder("gpt2"), prompt=4, new=1, runs=2, warmup=0, memory=False)
    assert found.prefill.base_seconds is found.decode.speedup is found.base_mfu is None
    assert found.throughput > 0


def test_bad_settings_are_refused(folder, monkeypatch):
    with pytest.raises(DataError, match="64 positions"):
        measure_speed(folder("llama"), prompt=64, new=1)
    with pytest.raises(DataError, match="prompt 0"):
        measure_speed(folder("llama"), prompt=0)
    kept = Runner.__init__

    def other(self, path, **options):
        kept(self, path, **{**options, "dtype": torch.bfloat16 if "gpt2" in str(path) else None})

    monkeypatch.setattr(runner.Runner, "__init__", other)
    with pytest.raises(SourceError, match="compare dtypes"):
        measure_speed(folder("gpt2"), folder("llama"), prompt=4, new=1, memory=False)


@pytest.mark.parametrize(
    ("asked", "positions", "expected"),
    [
        ((None, None), [], (512, 32)),
        ((None, None), [2048, 543], (511, 32)),
        ((None, None), [64, 2048], (60, 4)),
        ((None, None), [2], (1, 1)),
        ((100, None), [110], (100, 10)),
        ((None, 20), [110], (90, 20)),
        ((7, 3), [5], (7, 3)),  # what is asked for is not changed, but refused
    ],
)
def test_lengths_fit_the_positions(asked, positions, expected):
    assert timed._lengths(*asked, positions) == expected


def test_a_model_of_few_positions_is_measured(folder):
    found = measure_speed(folder("llama"), runs=2, warmup=0, memory=False)
    assert (found.prefill.tokens, found.decode.tokens) == (60, 4)
