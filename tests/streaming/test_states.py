from pathlib import Path

import pytest
import torch

from lilliput.errors import LilliputError
from lilliput.streaming.states import Activations, raw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(5, 3, 4).to(dtype)
    with Activations(tmp_path / "a.bin", (5, 3, 4), dtype, create=True) as store:
        store.write(3, values[3:])
        store.write(0, values[:3].transpose(1, 2).contiguous().transpose(1, 2))  # not contiguous
        assert len(store) == 5
        assert torch.equal(store.read(0, 5), values)
        assert torch.equal(store.read(2, 4), values[2:4])
        assert store.read(1, 2).dtype == dtype
        before = store.checksum()
    assert (tmp_path / "a.bin").stat().st_size == 5 * 3 * 4 * dtype.itemsize
    with Activations(tmp_path / "a.bin", (5, 3, 4), dtype, create=False) as again:
        assert torch.equal(again.read(0, 5), values)
        assert again.checksum() == before
        again.write(4, -values[4:])
        assert again.checksum() != before


def test_values_are_cast_and_a_fresh_file_is_zero(tmp_path: Path) -> None:
    store = Activations(tmp_path / "a.bin", (2, 1, 2), torch.bfloat16, create=True)
    assert torch.equal(store.read(0, 2), torch.zeros(2, 1, 2, dtype=torch.bfloat16))
    store.write(1, torch.tensor([[[1.0, 257.0]]], requires_grad=True))
    assert store.read(1, 2).flatten().tolist() == [1.0, 256.0]
    store.delete()
    store.delete()
    assert not (tmp_path / "a.bin").exists()


def test_creating_empties(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 100)
    Activations(path, (1, 1, 2), torch.float32, create=True).close()
    assert path.read_bytes() == bytes(8)


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(LilliputError, match=r"is missing.*start again"):
        Activations(path, (1, 1, 2), torch.float32, create=False)
    path.write_bytes(bytes(7))
    with pytest.raises(LilliputError, match=r"is shorter than its 8 bytes.*start again"):
        Activations(path, (1, 1, 2), torch.float32, create=False)
    with pytest.raises(FileNotFoundError):
        Activations(tmp_path / "no" / "a.bin", (1, 1, 2), torch.float32, create=True)


def test_raw_is_a_view() -> None:
    x = torch.zeros(2, 2)
    x[0, 0] = 1.0
    assert bytes(raw(x)) == b"\x00\x00\x80\x3f" + bytes(12)
    raw(x)[0:4] = bytes(4)
    assert float(x.sum()) == 0.0
