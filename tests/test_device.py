import pytest
import torch

from lilliput import device
from lilliput.errors import PlanError


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two accelerators, as torch tells of them; the list takes those that were chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_one_process_takes_what_it_is_given(accelerators: list[int]) -> None:
    assert [device.choose(x) for x in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    with pytest.raises(PlanError, match="there are 2 accelerators"):
        device.choose("cuda:2")
    assert accelerators == []


def test_each_of_several_takes_its_own(accelerators: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "5", "RANK": "4", "LOCAL_RANK": "1"}
    for key, value in known.items():
        monkeypatch.setenv(key, value)
    assert [device.choose(x) for x in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert accelerators == [1, 1]
    with pytest.raises(PlanError, match="an accelerator of its own"):
        device.choose("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(PlanError, match="start at most so many processes"):
        device.choose("auto")


def test_what_there_is_not() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(PlanError, match="sees no such accelerator"):
            device.choose("cuda")
    with pytest.raises(PlanError, match="choose auto, cpu or cuda"):
        device.choose("abacus")
