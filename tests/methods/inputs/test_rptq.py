"""Clusters of channels and their ranges, beside loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.inputs.act_static_dynamic import Options as PlainOptions
from lilliput.methods.inputs.act_static_dynamic import inputs as plain
from lilliput.methods.inputs.rptq import Options, inputs, kmeans, slices, spec
from lilliput.parts.inputs.clusters import CLUSTER, ClusterInput
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import SCALE, ZERO
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.target import Target

WIDTH = 24
LAYER = Layer("x", torch.zeros(4, WIDTH))


def drawn(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 1.0, 8.0]).repeat(WIDTH // 3)
    return torch.randn(3, 100, WIDTH, generator=draw) * spread + 0.5 * spread


def seen(x: Tensor) -> SiteStats:
    return fold.finish(fold.update(fold.init(WIDTH, fold.NAMES), x))


def made(x: Tensor, **options: object) -> InputGrid:
    target = Target(bits=8, symmetric=False, group_size="channel")
    return inputs(LAYER, seen(x), target, Options(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("by", "clusters"), list(itertools.product(["kmeans", "range"], [1, 3, 8, WIDTH])))
def test_rounding_is_that_of_each_channels_cluster(by: str, clusters: int) -> None:
    x = drawn()
    grid = made(x, by=by, clusters=clusters)
    place = grid.tensors[CLUSTER].tolist()
    flat = x.view(-1, WIDTH).double()
    expected = torch.zeros_like(flat)
    for cluster in set(place):
        own = [j for j in range(WIDTH) if place[j] == cluster]
        low, high = min(0.0, float(flat[:, own].min())), max(0.0, float(flat[:, own].max()))
        scale = (high - low) / 255
        zero = round(-128 - low / scale)
        codes = ((flat[:, own] / scale).round() + zero).clamp(-128, 127)
        expected[:, own] = (codes - zero) * scale
        assert float(grid.tensors[SCALE][cluster]) == pytest.approx(scale, rel=1e-5)
        assert int(grid.tensors[ZERO][cluster]) == zero
    close = (grid.round(x).view(-1, WIDTH).double() - expected).abs() < 1e-4
    assert float(close.double().mean()) > 0.99


@pytest.mark.parametrize("by", ["kmeans", "range"])
def test_one_cluster_is_a_tensor_and_one_for_each_is_a_channel(by: str) -> None:
    x = drawn()
    target = Target(bits=8, symmetric=False, group_size="tensor")
    for clusters, channels in ((1, False), (WIDTH, True)):
        other = plain(LAYER, seen(x), target, PlainOptions(dynamic=False, channels=channels))
        assert torch.equal(made(x, by=by, clusters=clusters).round(x), other.round(x))


def test_kmeans_finds_what_is_apart_and_no_move_is_better() -> None:
    x = drawn()
    stats = seen(x)
    points = torch.stack([stats.need("low"), stats.need("high")], 1)
    found = kmeans(points, 3).tolist()
    assert [len({found[j] for j in range(k, WIDTH, 3)}) for k in range(3)] == [1, 1, 1]
    assert len(set(found)) == 3
    place = kmeans(points, 5)
    centres = torch.stack([points[place == c].mean(0) for c in range(5) if bool((place == c).any())])
    nearest = torch.cdist(points, centres).min(1).values
    own = torch.stack([points[place == c].mean(0) for c in place.tolist()])
    torch.testing.assert_close((points - own).norm(dim=1), nearest, rtol=1e-4, atol=1e-5)


def test_equal_groups_follow_the_order_of_ranges() -> None:
    place = slices(torch.tensor([5.0, 1.0, 9.0, 3.0, 7.0, 2.0]), 3)
    assert place.tolist() == [1, 0, 2, 1, 2, 0]


def test_the_order_of_channels_changes_no_value() -> None:
    x = drawn()
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3))
    there = made(x[..., order], clusters=3).round(x[..., order])
    torch.testing.assert_close(there, made(x, clusters=3).round(x)[..., order])


def test_more_clusters_lose_less() -> None:
    x = drawn()
    errors = [float((made(x, clusters=n).round(x) - x).square().mean()) for n in (1, 3, WIDTH)]
    assert errors[0] > errors[1] >= errors[2] * 0.999


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PlanError, match="1 to 256"):
        ClusterInput(8, 300)
    with pytest.raises(PlanError, match="at most"):
        ClusterInput(8, 9).stored(4)
    assert spec(Target(bits=8), Options(clusters=9), 4) == ClusterInput(8, 4, True)
