import pytest
import torch

from lilliput.errors import PlanError
from lilliput.formats import clip
from lilliput.methods.weight import rtn
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def _weight(rows: int = 6, width: int = 512) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=g)


@pytest.mark.parametrize("size", [-1, 0, 64, 100])
def test_percentile_is_that_of_each_group(size: int) -> None:
    w = _weight()
    assert torch.equal(clip.percentile(w, size, 100.0), w)
    cut = clip.percentile(w, size, 90.0)
    step = {0: 512, -1: 512}.get(size, size)
    for a in range(0, 512, step):
        group = w[:, a : a + step]
        some = group.reshape(1, -1) if size == 0 else group
        limit = some.abs().double().quantile(0.9, dim=1, keepdim=True).float()
        torch.testing.assert_close(cut[:, a : a + step], group.clamp(-limit, limit), rtol=1e-6, atol=1e-6)


def test_percentile_of_mostly_zeros_is_no_range_of_nothing() -> None:
    w = torch.zeros(1, 100)
    w[0, 3] = 1.0
    assert torch.equal(clip.percentile(w, -1, 50.0), w)


def test_divergence_cuts_far_outliers_and_leaves_even_weights() -> None:
    levels = torch.arange(8.0)
    even = torch.linspace(-1, 1, 4096).expand(2, -1).contiguous()
    assert torch.equal(clip.divergence(even, -1, levels, 20), even)
    w = _weight(4, 4096)
    w[:, 0] = 60.0
    cut = clip.divergence(w, -1, levels, 20)
    assert bool((cut[:, 0] < 30).all())
    assert float((cut - w)[:, 1:].abs().max()) < float(w[:, 1:].abs().max())


@pytest.mark.parametrize(("form", "size"), [*((f, s) for f in ("int", "nf4") for s in (-1, 0, 64)), ("mxfp4", 64)])
def test_rtn_takes_every_range(form: str, size: int) -> None:
    """Percentile 100 is min-max, less is another grid."""
    named: int | str = {-1: "channel", 0: "tensor"}.get(size, size)
    more = {"bits": 4} if form == "int" else {}
    target = Target.model_validate({"format": form, **({} if form == "mxfp4" else {"group_size": named}), **more})
    w = _weight()
    w[:, 3] *= 20

    def run(**options: object) -> torch.Tensor:
        return rtn.compress(Layer("x", w), SiteStats(512, 0), target, rtn.Options.model_validate(options)).decode()

    plain = run(search="minmax")
    assert torch.equal(run(search="percentile", percentile=100.0), plain)
    assert not torch.equal(run(search="percentile", percentile=97.0), plain)
    cut = run(search="kl")
    assert bool(torch.isfinite(cut).all())
    if size != 64:  # most groups have no outlier there, and the row's one share stays whole
        assert not torch.equal(cut, plain)


def test_ranges_that_a_format_does_not_have_are_refused() -> None:
    with pytest.raises(PlanError, match="signed_scale"):
        rtn.scheme(Target(format="nf4", bits=4, group_size=16), rtn.Options(signed_scale=True), 8, 64)
