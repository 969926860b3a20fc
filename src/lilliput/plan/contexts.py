"""The keys and values of one sequence of so many tokens: what they take, block by block, and what a step may choose for
them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lilliput.anatomy.cached import filled
from lilliput.budget.choice import Item, Option
from lilliput.errors import LilliputError, PlanError
from lilliput.model.weights import Model
from lilliput.plan import caching
from lilliput.plan.resolve import Resolved
from lilliput.plan.tensors import config_dtype
from lilliput.recipe.schema import Step
from lilliput.runtime.caches import Entry
from lilliput.runtime.caches.codec import CacheCodec, CacheShape, CodecSpec
from lilliput.runtime.caches.look import shape_of
from lilliput.streaming.pieces import CHUNK
from lilliput.target import Target
from lilliput.units import few, size
from lilliput.verbs.cache import Cache
from lilliput.verbs.choose import Choose, Stores
from lilliput.verbs.scores import Scores

PLAIN = 0  # the entry that leaves keys and values as they are


@dataclass(frozen=True)
class Kept:
    """How one block may store keys and values. name: of the item in a choice; sizes: bytes of the sequence by entry;
    specs: how the entries beside `PLAIN` store them."""

    block: int
    name: str
    attention: str
    shape: CacheShape
    sizes: Mapping[int, int]
    specs: Mapping[int, CodecSpec]

    def codec(self, entry: int) -> CacheCodec:
        """An empty cache of an entry beside `PLAIN`."""
        return self.specs[entry].make(self.shape, {})


@dataclass(frozen=True)
class Context:
    """One sequence of `tokens` tokens. bytes: of its keys and values, as the steps of the recipe store them; plain: by
    block, as transformers keeps them; item: bits of a plain element; choosing: what a step decides about, among
    `entries`; chunk: tokens of a piece where changes are tried, of which those from `first` on see something encoded.
    """

    tokens: int
    item: int
    plain: tuple[int, ...]
    bytes: int
    stores: Stores | None = None
    choosing: tuple[Kept, ...] = ()
    chunk: int = CHUNK
    first: int = 0

    @property
    def plain_bytes(self) -> int:
        """As transformers keeps them."""
        return sum(self.plain)

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the entries, by number."""
        stores = self.stores
        return ("plain",) if stores is None else ("plain", *(f"{stores.method}{bits}" for bits in stores.bits))

    def of_block(self, block: int) -> Kept | None:
        """What is chosen for a block; None where nothing is."""
        return next((x for x in self.choosing if x.block == block), None)

    @property
    def settled(self) -> Context:
        """With nothing more to decide."""
        return replace(self, choosing=())

    def items(self, losses: Scores | None) -> list[Item]:
        """What is chosen among; without losses all are 0."""
        return [
            Item(x.name, tuple(Option(j, n, 0.0 if losses is None else losses[x.name][j]) for j, n in x.sizes.items()))
            for x in self.choosing
        ]

    def steps(self, chosen: Mapping[str, int]) -> tuple[Step, ...]:
        """The steps of a recipe that store keys and values as was chosen; chosen: entries by the name of the item."""
        if self.stores is None:
            return ()
        by_entry = {j: [x.block for x in self.choosing if chosen[x.name] == j] for j in range(1, len(self.entries))}
        return tuple(_step(self.stores, self.stores.bits[j - 1], blocks) for j, blocks in by_entry.items() if blocks)

    def counts(self, chosen: Mapping[str, int]) -> dict[str, int]:
        """How many of the blocks that are chosen for got each entry."""
        counts = Counter(chosen[x.name] for x in self.choosing)
        return {name: counts[j] for j, name in enumerate(self.entries) if counts[j]}

    def stored(self, model: Model, resolved: Resolved) -> Context:
        """With the bytes as these steps store keys and values; the fewest there can be of what is not decided."""
        sizes = list(self.plain)
        for x in self.choosing:
            sizes[x.block] = min(x.sizes.values())
        for entry in caching.entries(model, resolved):
            for block in entry.blocks:
                number = model.skeleton.block_names.index(block)
                sizes[number] = _bytes(entry.spec, self.tokens, entry.shape, self.item)
        return replace(self, bytes=sum(sizes))

    def notes(self, model: Model, resolved: Resolved) -> tuple[str, ...]:
        """What they take, and which blocks keep them as they are whatever is chosen."""
        names = model.skeleton.block_names
        said = f"Keys and values of {self.tokens} tokens take {size(self.plain_bytes)}"
        ruled = caching.assigned(model, resolved).keys() | {x.block for x in self.choosing}
        if self.choosing:
            said += f" as they are and {size(self.bytes)} at the fewest bits; measuring decides how "
            said += f"{len(self.choosing)} of {len(names)} blocks store them."
        else:
            said = f"Keys and values of {self.tokens} tokens take {size(self.bytes)}"
            said += f" in place of {size(self.plain_bytes)}." if ruled else "."
        left = [name for n, name in enumerate(names) if n not in ruled]
        if not left or not (ruled or self.stores):
            return (said,)
        return (said, f"{len(left)} of {len(names)} blocks keep keys and values as they are: {few(left)}.")

    def to_json(self) -> dict[str, int]:
        """Plain data."""
        return {"context": self.tokens, "cache_bytes": self.bytes, "cache_plain_bytes": self.plain_bytes}


def counted(model: Model, resolved: Resolved, asked: int | None, tokens: int) -> Context | None:
    """What counts, where `asked`, or a step that chooses, names a number of tokens; calibration samples have `tokens`.

    Raises PlanError where keys and values cannot be counted, or not be tried.
    """
    choosing = [x for x in (task.of(Choose).stores(task.options) for task in resolved.of(Choose)) if x is not None]
    wanted = {x.context for x in choosing} | ({asked} if asked is not None else set())
    if not wanted:
        return None
    if len(wanted) > 1:
        raise PlanError(
            f"--context {asked} and the recipe's `context` of {choosing[0].context} tokens contradict each other: "
            "leave one of them out"
        )
    (count,) = wanted
    if count < 1:
        raise PlanError(f"--context {count} is no number of tokens: give one such as 8192")
    if model.positions is not None and count > model.positions:
        raise PlanError(f"--context {count} is more than the model's {model.positions} positions: ask for fewer")
    item = 8 * config_dtype(model).itemsize
    found = Context(count, item, _plain(model, count, item), 0)
    # Where the recipe itself says how blocks store keys and values, nothing is chosen: so a recipe that a choice has
    # written is carried out as it stands.
    if choosing and not resolved.of(Cache):
        found = _choosing(found, model, resolved, choosing[0], tokens)
    return found.stored(model, resolved)


def _plain(model: Model, tokens: int, item: int) -> tuple[int, ...]:
    """Bytes by block, as the layers of transformers' own cache hold them; where fewer layers than blocks are made, the
    other blocks read those of earlier ones."""
    names, sizes = model.skeleton.block_names, [0] * len(model.skeleton.block_names)
    for number, layer in enumerate(filled(model.skeleton.config, 1, tokens, "meta").layers):
        keys = getattr(layer, "keys", None)
        try:
            if keys is None:
                raise PlanError(f"transformers keeps a {type(layer).__name__} for it")
            sizes[number] = shape_of(model.skeleton, number).plain_bits(keys.shape[-2], item) // 8
        except LilliputError as error:
            raise PlanError(
                f"--context: what {names[number]} stores of a token cannot be counted ({error}): leave it out"
            ) from None
    return tuple(sizes)


def _bytes(spec: CodecSpec, tokens: int, shape: CacheShape, item: int) -> int:
    return -(-spec.size_bits(tokens, shape, item) // 8)


def _step(stores: Stores, bits: int, blocks: Sequence[int]) -> Step:
    options: dict[str, Any] = {**stores.options, "layers": list(blocks)}
    return Step(method=stores.method, target=Target(bits=bits), options=options)


def _choosing(found: Context, model: Model, resolved: Resolved, stores: Stores, tokens: int) -> Context:
    """With what is chosen for each block that keeps a growing cache; entries that are no smaller are left out."""
    able = caching.able(model)
    found = replace(found, stores=stores)
    if not able or not stores.bits:
        return found
    names = model.skeleton.block_names
    sizes: dict[int, dict[int, int]] = {n: {PLAIN: found.plain[n]} for n in able}
    specs: dict[int, dict[int, CodecSpec]] = {n: {} for n in able}
    where: dict[int, tuple[str, CacheShape]] = {}
    for number, bits in enumerate(stores.bits, 1):
        for entry in _entries(model, resolved.with_steps([_step(stores, bits, able)])):
            for block in (names.index(x) for x in entry.blocks):
                taken = _bytes(entry.spec, found.tokens, entry.shape, found.item)
                where[block] = entry.attention, entry.shape
                if taken < found.plain[block]:
                    sizes[block][number], specs[block][number] = taken, entry.spec
    choosing = tuple(
        Kept(n, f"{names[n]}.{where[n][0]} (cache)", *where[n], sizes[n], specs[n]) for n in able if specs[n]
    )
    if not choosing:
        return found
    chunk = min(CHUNK, int(stores.options.get("residual", CHUNK)))
    first = _first(choosing[0], chunk, found.item)
    if first >= tokens:
        raise PlanError(
            f"--context: samples of {tokens} tokens end before they see what a cache has encoded, from token {first} "
            f"on: give --tokens {2 * first}"
        )
    return replace(found, choosing=choosing, chunk=chunk, first=first)


def _entries(model: Model, resolved: Resolved) -> tuple[Entry, ...]:
    """Raises PlanError where blocks cannot store keys and values otherwise, or not be tried with it."""
    try:
        caching.check(model, resolved)
        return caching.entries(model, resolved)
    except PlanError as error:
        raise PlanError(
            f"--context chooses how blocks store keys and values, by steps at the recipe's end; {error}; or leave "
            "--context out"
        ) from None


def _first(kept: Kept, chunk: int, item: int) -> int:
    """The first token, at the beginning of a piece, that sees something encoded before it."""
    spec, shape, at = next(iter(kept.specs.values())), kept.shape, chunk
    while spec.size_bits(at, shape, item) == shape.plain_bits(at, item):
        at += chunk
    return at
