import torch

from lilliput.metrics.flips import flips


def test_flips_count_both_directions() -> None:
    right = torch.tensor([[True, False, True, True], [True, True, False, False]])
    reference = torch.tensor([[True, True, False, True], [True, True, False, False]])
    found = flips(right, reference)
    assert found.value == 0.25
    assert found.low == 0.0
    assert flips(right, right).value == 0.0
