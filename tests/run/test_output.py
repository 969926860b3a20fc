"""Files that are written tensor by tensor are those that the safetensors library writes from all tensors at once."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.plan.tensors import METADATA
from lilliput.run.output import PART, Output

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def values() -> dict[str, Tensor]:
    """Tensors of many dtypes, a scalar and an empty one among them, in an order that is not that of the file."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (5, 24), dtype=torch.uint8, generator=g)
    kinds = [torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.int32, torch.float32,
             torch.int64, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint16,
             torch.uint32, torch.uint64, torch.complex64]  # fmt: skip
    made = {f"é{n * 7 % 5}.{n}.weight": bits.clone().view(kind) for n, kind in enumerate(kinds)}
    return {
        **made,
        'quoted "\\\n': torch.ones(3, dtype=torch.bool),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "flipped": torch.rand(4, 6, generator=g).T,
        "b.bias": torch.rand(7, generator=g),
    }


def described(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}


def rows(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.split(2) if tensor.dim() else [tensor]


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture
def split() -> dict[str, dict[str, Tensor]]:
    """Tensors of two files."""
    everything = values()
    names = list(everything)
    return {ONE: {n: everything[n] for n in names[::2]}, TWO: {n: everything[n] for n in names[1::2]}}


@pytest.fixture
def made(split: dict[str, dict[str, Tensor]], tmp_path: Path) -> Output:
    """Both files, laid out."""
    folder = tmp_path / "model"
    folder.mkdir()
    out = Output(folder, {file: described(held) for file, held in split.items()})
    out.lay_out()
    return out


@pytest.mark.parametrize("whole", [True, False])
def test_the_bytes_are_the_librarys(
    made: Output, split: dict[str, dict[str, Tensor]], tmp_path: Path, whole: bool
) -> None:
    tensors = {name: x for held in split.values() for name, x in held.items()}
    names = sorted(tensors)
    hashes: dict[str, str] = {}
    for some in (names[3:9], names[:3], names[9:]):
        hashes |= made.write(some, lambda name: [tensors[name]] if whole else rows(tensors[name]))
    assert hashes == {name: sha256(x) for name, x in tensors.items()}
    made.finish()
    assert sorted(os.listdir(tmp_path / "model")) == [ONE, TWO]
    for file, held in split.items():
        save_file({n: x.contiguous() for n, x in held.items()}, tmp_path / "expected", METADATA)
        assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "expected").read_bytes()
        assert set(load_file(tmp_path / "model" / file)) == set(held)


def test_the_disk_holds_the_space_from_the_beginning(made: Output, tmp_path: Path) -> None:
    for path in (tmp_path / "model").iterdir():
        assert path.suffix == PART
        assert path.stat().st_blocks * 512 >= path.stat().st_size > 100


def test_what_was_left_before_the_first_tensor_is_made_anew(
    made: Output, split: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    fresh = {x.name: x.read_bytes() for x in (tmp_path / "model").iterdir()}
    (tmp_path / "model" / (ONE + PART)).write_bytes(b"half")
    (tmp_path / "model" / f"model-00001-of-00007.safetensors{PART}").write_bytes(b"of other files")
    made.lay_out()
    assert {x.name: x.read_bytes() for x in (tmp_path / "model").iterdir()} == fresh


def test_finished_tensors_are_taken_up(made: Output, split: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    files = {file: described(held) for file, held in split.items()}
    hashes = made.write(split[ONE], lambda name: [split[ONE][name]])
    (tmp_path / "model" / (ONE + PART)).rename(tmp_path / "model" / ONE)  # killed between two names
    again = Output(tmp_path / "model", files)
    again.take_up(hashes)
    again.write(split[TWO], lambda name: [split[TWO][name]])
    again.finish()
    again.finish()
    for file, held in split.items():
        found = load_file(tmp_path / "model" / file)
        assert {n: sha256(x) for n, x in found.items()} == {n: sha256(x) for n, x in held.items()}
    Output(tmp_path / "model", files).take_up({n: sha256(x) for held in split.values() for n, x in held.items()})


def test_files_that_are_not_what_was_written_are_noticed(
    made: Output, split: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    files = {file: described(held) for file, held in split.items()}
    hashes = made.write(split[ONE], lambda name: [split[ONE][name]])
    path = tmp_path / "model" / (ONE + PART)
    good = path.read_bytes()
    for bad in (good[:-1], good + b"x", good[:9] + b"x" + good[10:], b"", good[:-1] + bytes([good[-1] ^ 1])):
        path.write_bytes(bad)
        with pytest.raises(LilliputError, match=r"is not what the unfinished run wrote.*start again"):
            Output(tmp_path / "model", files).take_up(hashes)
    path.unlink()
    with pytest.raises(LilliputError, match=rf"{ONE}.* and is missing"):
        Output(tmp_path / "model", files).take_up(hashes)


def test_a_tensor_that_is_not_as_planned_harms_no_other(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(4, 3), "b": torch.ones(4, 3)}
    out = Output(tmp_path, {ONE: described(tensors)})
    out.lay_out()
    hashes = out.write(["b"], lambda name: [tensors[name]])
    others = [torch.ones(4, 4), torch.ones(3, 4), torch.ones(3, 3), torch.ones(12), torch.ones(4, 3).double()]
    for pieces in (*([x] for x in others), [tensors["a"], tensors["a"]], []):
        with pytest.raises(RuntimeError, match="a is planned as"):
            out.write(["a"], partial(lambda held, _: held, pieces))
    Output(tmp_path, {ONE: described(tensors)}).take_up(hashes)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tensors = {"a": torch.ones(4, 3)}
    out = Output(tmp_path, {ONE: described(tensors)})
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match=ONE) as error:
            out.lay_out()
        assert error.value.errno == errno.ENOSPC
    out.lay_out()
    if call != "posix_fallocate":
        monkeypatch.setattr(os, call, full)
        with pytest.raises(OSError, match=ONE) as error:
            out.write(tensors, lambda name: [tensors[name]])
        assert error.value.errno == errno.ENOSPC


def test_an_error_of_the_source_does_not_name_the_output(tmp_path: Path) -> None:
    def unreadable(_: str) -> Iterator[Tensor]:
        yield torch.ones(2, 3)
        raise OSError(errno.EIO, "broken", "source")

    out = Output(tmp_path, {ONE: {"a": (torch.float32, (4, 3))}})
    out.lay_out()
    with pytest.raises(OSError, match="source"):
        out.write(["a"], unreadable)
