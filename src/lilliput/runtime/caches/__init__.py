"""Compressed caches of a written folder: how each layer stores the keys and values of the tokens that were read.

The config lists them beside the linears; `install` puts a hook before the attentions of a model, be it one that
transformers has loaded or the skeleton of our own reader. The hook replaces the empty layers of any cache that
transformers makes, so that `generate` works unchanged, and an evaluation in pieces sees what it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lilliput.errors import LilliputError, SourceError
from lilliput.runtime import switched
from lilliput.runtime.caches import hooks
from lilliput.runtime.caches.codec import CacheCodec, CacheShape, CodecSpec, Tensors
from lilliput.runtime.caches.fp8 import Fp8Spec
from lilliput.runtime.caches.hooks import Caches
from lilliput.runtime.caches.kivi import KiviSpec
from lilliput.runtime.caches.kvquant import KvquantSpec
from lilliput.runtime.caches.per_token import PerTokenSpec
from lilliput.runtime.caches.shifted import ShiftedSpec
from lilliput.runtime.caches.turns import Rotate, rotation
from lilliput.runtime.caches.window import WindowSpec

KINDS: Mapping[str, type[CodecSpec]] = {
    x.kind: x for x in (PerTokenSpec, KiviSpec, KvquantSpec, ShiftedSpec, WindowSpec, Fp8Spec)
}
_STATE = "lilliput_caches"


@dataclass(frozen=True)
class Entry:
    """Layers that store keys and values alike. blocks: names of modules; attention: that of their attention within;
    shape: of what they store."""

    spec: CodecSpec
    blocks: tuple[str, ...]
    attention: str
    shape: CacheShape

    def plain(self) -> dict[str, Any]:
        """As the config has it."""
        shape = [self.shape.heads, self.shape.keys, self.shape.values]
        return {**self.spec.plain(), "shape": shape, "attention": self.attention, "blocks": list(self.blocks)}

    def names(self, block: str) -> dict[str, str]:
        """Static tensors of a block: their full names by their own."""
        return {name: f"{block}.{self.attention}.{name}" for name in self.spec.stored(self.shape)}


def parsed(entries: Sequence[Mapping[str, Any]]) -> tuple[Entry, ...]:
    """From the entry `caches` of a config. Raises SourceError for a kind that this code does not know."""
    found: list[Entry] = []
    for plain in entries:
        if plain.get("kind") not in KINDS:
            raise SourceError(
                f"the folder stores its cache as '{plain.get('kind')}', which this lilliput does not know: install the "
                "version that wrote it"
            )
        own = {k: v for k, v in plain.items() if k not in ("kind", "shape", "attention", "blocks")}
        try:
            spec = KINDS[plain["kind"]](**own)
            entry = Entry(spec, tuple(plain["blocks"]), str(plain["attention"]), CacheShape(*map(int, plain["shape"])))
            spec.check(entry.shape)
        except (KeyError, TypeError, ValueError, LilliputError) as error:
            raise SourceError(f"the entry 'caches' of quantization_config is damaged: {error}") from None
        found.append(entry)
    return tuple(found)


def stored(entries: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the static tensors that the caches have in the files."""
    return tuple(name for x in parsed(entries) for block in x.blocks for name in x.names(block).values())


def install(
    model: nn.Module,
    entries: Sequence[Mapping[str, Any]],
    tensors: Callable[[str], Tensor],
    locate: Callable[[str], str] = str,
) -> Caches:
    """Let a model follow the entry `caches` of a config. tensors: a stored tensor by name; locate: where a module of
    our names sits. Raises SourceError where the model does not fit."""
    state = Caches(tuple(block for x in parsed(entries) for block in x.blocks))
    modules = dict(model.named_modules())
    for entry in parsed(entries):
        for block in entry.blocks:
            place = locate(f"{block}.{entry.attention}")
            if place not in modules or not isinstance(getattr(modules[place], "layer_idx", None), int):
                raise SourceError(
                    f"config.json gives '{block}.{entry.attention}' a compressed cache, and the model has no such "
                    "attention"
                )
            own = {name: tensors(full) for name, full in entry.names(block).items()}
            state.handles.append(_watched(modules[place], state, entry, own))
    model.__dict__[_STATE] = state
    return state


def _watched(attention: nn.Module, state: Caches, entry: Entry, own: Tensors) -> Any:
    rotate: Rotate | None = rotation(attention) if entry.spec.turns() else None
    return hooks.watch(attention, state, partial(entry.spec.make, entry.shape, own), rotate)


def of(model: nn.Module) -> Caches | None:
    """The compressed caches of a model; None where it has none."""
    return model.__dict__.get(_STATE)


def training(model: nn.Module, config: Any) -> Any:
    """A cache for a pass over whole texts through which gradients flow, of a model that stores its own compressed; None
    where it has none. Raises LilliputError for a model with layers that keep something else."""
    state = of(model)
    if state is None or not state.active:
        return None
    from lilliput.runtime.caches import straight as layers

    return layers.cache(config, state.makers)


@contextmanager
def tried(attention: nn.Module, make: Callable[[], CacheCodec], *, turned: bool) -> Iterator[None]:
    """New caches of one attention are what `make` gives, while the context lasts."""
    handle = hooks.watch(attention, Caches(), make, rotation(attention) if turned else None)
    try:
        yield
    finally:
        handle.remove()


def paused(*models: nn.Module) -> AbstractContextManager[None]:
    """New caches are transformers' own, while the context lasts."""
    return switched.off(map(of, models))


def size_bits(entries: Sequence[Mapping[str, Any]], tokens: int, item: int) -> int:
    """Bits of one sequence of so many tokens in all layers that are compressed; item: bits of a plain element."""
    return sum(len(x.blocks) * x.spec.size_bits(tokens, x.shape, item) for x in parsed(entries))
