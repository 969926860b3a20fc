import itertools

import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats import groups, known
from lilliput.formats.ternary import TernaryFormat, from_target, pack_ternary, unpack_ternary
from lilliput.parts.linear import LinearSpec, decode
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import quantized
from lilliput.target import Target


def _weight(rows: int = 7, width: int = 33, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("weighted", [False, True])
def test_the_scale_is_the_best_of_all_codes(weighted: bool) -> None:
    """Against every assignment of -1, 0, 1 to a group of 7, each with its least-squares scale."""
    w = _weight(6, 7)
    h = torch.rand(6, 7, generator=torch.Generator().manual_seed(2)) ** 2 if weighted else torch.ones(6, 7)
    form = TernaryFormat(-1, torch.float32)
    grid = form.fit(w, importance=h if weighted else None)
    ours = ((form.decode(form.encode(w, grid), grid) - w).square() * h).sum(1).double()
    codes = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=7))).double()
    top, bottom = (h * w).double() @ codes.T, h.double() @ codes.square().T
    best = (h * w.square()).double().sum(1) - torch.where(bottom > 0, top.square() / bottom, 0.0).amax(1)
    torch.testing.assert_close(ours, best, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("width", [1, 4, 5, 33])
def test_five_codes_a_byte(width: int) -> None:
    codes = torch.randint(-1, 2, (6, width), generator=torch.Generator().manual_seed(width)).to(torch.int8)
    packed = pack_ternary(codes)
    assert packed.shape == (6, -(-width // 5))
    first = codes[0, :5].tolist()
    assert int(packed[0, 0]) == sum((c + 1) * 3**i for i, c in enumerate(first))
    assert torch.equal(unpack_ternary(packed, width), codes)


@pytest.mark.parametrize("size", [-1, 8, 50])
def test_bytes_sizes_and_reading(size: int) -> None:
    form, w = TernaryFormat(size), _weight()
    grid = form.fit(w)
    part = QuantizedPart(form, form.encode(w, grid), grid)
    packed = part.pack()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in packed.items()} == form.stored(7, 33)
    assert part.bits() == 8 * sum(t.numel() * t.element_size() for t in packed.values())
    assert part.bits() == 7 * 7 * 8 + 7 * groups.count(33, form.group_size) * 16
    read = decode(
        LinearSpec("x", "x", 7, 33, quantized(form)), {"x.weight" + n: t for n, t in packed.items()}.__getitem__
    )
    assert torch.equal(read, part.decode())
    assert torch.equal(part.rows(2, 5).decode(), part.decode()[2:5])
    assert known.from_plain(form.plain()) == form
    assert torch.equal(form.levels(grid)[:, 0, 2], grid.scale[:, 0].float())


def test_ternary_values_stay() -> None:
    w = torch.tensor([[0.5, 0.0, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    form = TernaryFormat(-1)
    grid = form.fit(w)
    assert torch.equal(form.decode(form.encode(w, grid), grid), w)


def test_bad_formats_and_values_are_refused() -> None:
    for size, dtype in ((0, torch.float16), (-2, torch.float16), (4, torch.int8)):
        with pytest.raises(PlanError):
            TernaryFormat(size, dtype)
    assert from_target(Target(format="ternary", group_size=16)) == TernaryFormat(16)
    with pytest.raises(PlanError, match="per row"):
        from_target(Target(format="ternary", group_size="tensor"))
    with pytest.raises(LilliputError, match="NaN"):
        TernaryFormat(-1).fit(_weight() / 0)
    with pytest.raises(LilliputError, match="float32"):
        TernaryFormat(-1).fit(_weight() * 1e9)
