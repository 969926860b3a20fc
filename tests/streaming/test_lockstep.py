from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lilliput.streaming.lockstep import Tap, walk, watch


class Chain(nn.Module):
    """x -> a -> b -> c, where b is left out for negative inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(1, 1, bias=False) for _ in range(3))
        for linear in (self.a, self.b, self.c):
            nn.init.ones_(linear.weight)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if float(x) > 0:
            x = self.b(x)
        return self.c(x)


def passes(chain: Chain, values: list[float], out: dict[float, float]) -> list[Callable[[], None]]:
    def one(value: float) -> Callable[[], None]:
        def run() -> None:
            out[value] = float(chain(torch.tensor([value])))

        return run

    return [one(value) for value in values]


def taps(chain: Chain, names: str = "abc") -> list[Tap]:
    return [Tap(name, getattr(chain, name)) for name in names]


def test_sites_see_what_was_changed_before_them() -> None:
    chain, out = Chain(), {}
    seen: list[tuple[str, float]] = []

    def arrived(site: str) -> None:
        seen.append((site, 0.0))
        getattr(chain, site).weight.mul_(2)

    walk(taps(chain), passes(chain, [1.0, -1.0, 3.0], out), lambda s, x: seen.append((s, float(x))), arrived)
    assert seen == [
        ("a", 1.0), ("a", -1.0), ("a", 3.0), ("a", 0.0),
        ("b", 2.0), ("b", 6.0), ("b", 0.0),
        # In the order of the passes, although the second stood here first.
        ("c", 4.0), ("c", -2.0), ("c", 12.0), ("c", 0.0),
    ]  # fmt: skip
    assert out == {1.0: 8.0, -1.0: -4.0, 3.0: 24.0}


def test_sites_that_no_pass_meets() -> None:
    chain, out = Chain(), {}
    seen: list[str] = []
    walk(taps(chain), passes(chain, [-1.0], out), lambda *_: None, seen.append)
    assert seen == ["a", "b", "c"]
    walk([], passes(chain, [-2.0], out), lambda *_: None, seen.append)
    assert out == {-1.0: -1.0, -2.0: -2.0}


def test_a_wrong_order_is_an_error() -> None:
    chain = Chain()
    with pytest.raises(RuntimeError, match="not met in their order"):
        walk(taps(chain, "cab"), passes(chain, [1.0], {}), lambda *_: None, lambda _: None)


def test_errors_pass_through_and_hooks_go() -> None:
    chain, out = Chain(), {}

    def arrived(site: str) -> None:
        if site == "b":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        walk(taps(chain), passes(chain, [1.0, 2.0], out), lambda *_: None, arrived)
    assert out == {}
    assert not any(module._forward_pre_hooks for module in chain.modules())


def test_watching() -> None:
    chain, out = Chain(), {}
    seen: list[tuple[str, float]] = []

    def see(site: str, x: Tensor) -> None:
        seen.append((site, float(x)))

    # Left when all taps were met, whatever their order here; never where one is not met.
    watch(taps(chain, "ba"), passes(chain, [1.0, -1.0], out), see, stop_after=True)
    assert seen == [("a", 1.0), ("b", 1.0), ("a", -1.0)]
    assert out == {-1.0: -1.0}
    watch(taps(chain, "a"), passes(chain, [2.0], out), see, stop_after=False)
    assert out[2.0] == 2.0
