"""All calibration batches walk through one block in step, pausing at every input site.

Compressing a block in its true order means that the inputs of each linear come from the already compressed linears
before it. Running the block anew for every site would cost several forward passes; here each batch's forward pass is
suspended at a site (its frames stay on a stack of their own), the site's linears are compressed in place, and all
passes go on. One forward pass per block in all, at the price of holding every batch's live tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import greenlet
from torch import Tensor, nn

from lilliput.runtime import inputs as rounding


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Leaves a forward pass whose remaining part is not needed."""


@dataclass(frozen=True)
class Tap:
    """A site to watch: the module whose input it is."""

    site: str
    module: nn.Module


@contextmanager
def _hooks(taps: Sequence[Tap], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def run(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            before = rounding.of(module)
            see(site, inputs[0])
            now = rounding.of(module)
            # What was attached while the pass stood here is not asked any more: torch has made its list of hooks.
            return None if now is None or now is before else now(module, inputs)

        return run

    # In front of hooks that round the inputs, which the statistics are of and not what they make of them.
    handles = [tap.module.register_forward_pre_hook(hook(tap.site), prepend=True) for tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch(
    taps: Sequence[Tap], passes: Sequence[Callable[[], None]], see: Callable[[str, Tensor], None], *, stop_after: bool
) -> None:
    """Run the passes one after the other, showing `see` the inputs of the taps.

    With `stop_after` a pass is left as soon as it has met all taps, so what follows costs nothing.
    """
    remaining: set[str] = set()

    def look(site: str, x: Tensor) -> None:
        see(site, x)
        remaining.discard(site)
        if stop_after and not remaining:
            raise _Stop

    with _hooks(taps, look):
        for run in passes:
            remaining = {tap.site for tap in taps}
            try:
                run()
            except _Stop:
                continue


def walk(
    taps: Sequence[Tap],
    passes: Sequence[Callable[[], None]],
    see: Callable[[str, Tensor], None],
    arrived: Callable[[str], None],
) -> None:
    """Run all passes in step: each site is shown to `see` by every pass, then `arrived(site)` runs, then all go on.

    Sites come in the order of `taps`, which is that in which a pass meets them; a pass that does not visit a site (an
    expert without tokens) waits at its next. `arrived` is called for every site, also one that no pass visited.
    """
    order = {tap.site: n for n, tap in enumerate(taps)}
    home = greenlet.getcurrent()

    def look(site: str, x: Tensor) -> None:
        home.switch((order[site], x))

    walkers = [greenlet.greenlet(run) for run in passes]
    at: dict[int, int] = {}
    inputs: dict[int, Tensor] = {}

    def advance(n: int) -> None:
        where = walkers[n].switch()
        if walkers[n].dead:
            at.pop(n, None)
        else:
            number, inputs[n] = where
            if number <= at.get(n, -1):
                raise RuntimeError(f"the sites of a block are not met in their order: {taps[number].site}")
            at[n] = number

    try:
        with _hooks(taps, look):
            for n in range(len(walkers)):
                advance(n)
            for number, tap in enumerate(taps):
                # Shown only now, so that the passes come in their order also where some left a site out.
                waiting = sorted(k for k, place in at.items() if place == number)
                for n in waiting:
                    see(tap.site, inputs.pop(n))
                arrived(tap.site)
                for n in waiting:
                    advance(n)
    finally:
        for walker in walkers:
            if not walker.dead and walker:
                walker.throw()
