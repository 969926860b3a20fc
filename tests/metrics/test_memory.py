import pytest

from lilliput.machine.memory import trim
from lilliput.metrics.memory import peak_rss, reset_peak


def test_the_peak_remembers_what_was_freed_and_can_be_reset():
    trim()  # or the block may lie in what others have freed
    resets = reset_peak()  # what ran before in this process may have taken more
    before = peak_rss()
    block = bytearray(b"x") * (256 << 20)
    peak = peak_rss()
    assert peak >= before
    assert peak >= 256 << 20
    del block
    trim()
    # The kernel keeps its counts per thread and sums them up now and then: exact to a few pages only.
    assert abs(peak_rss() - peak) < 4 << 20
    if not resets or not reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    assert peak_rss() < peak - (200 << 20)
