"""The walk of a choice over the blocks: what each grid of a menu would leave of each linear, and, on a few samples,
what the model becomes with errors in single linears and in all of them.

The leader scores and quantizes a block's linears when their statistics are complete; then the block runs again, as it
is and changed, for the models that are tried side by side (`streaming.variants`). Each block is a record. The samples
that changes are tried on take no part in the statistics: errors are those on text that no sweep has seen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lilliput.anatomy.tables import EMBED
from lilliput.machine import memory, ranks
from lilliput.model.block import BlockWeights
from lilliput.model.changed import ChangedTable
from lilliput.model.weights import Model
from lilliput.parts.layer import Layer
from lilliput.plan import choices
from lilliput.plan.candidates import Candidates
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import LinearPlan
from lilliput.progress import Progress
from lilliput.run import rewriting
from lilliput.run.cachetrials import CacheTrials, fewest, rising
from lilliput.run.heads import lookups
from lilliput.run.journal import Work, save_atomically
from lilliput.stats.site import SiteStats
from lilliput.streaming.collect import collect
from lilliput.streaming.divergence import divergences
from lilliput.streaming.forward import embed, through
from lilliput.streaming.states import Activations
from lilliput.streaming.variants import Caches, Changes, Variants, advance
from lilliput.streaming.walk import Flow, Passage, taken_up, walk
from lilliput.target import Target
from lilliput.verbs.choose import Choose, Trials
from lilliput.verbs.compress import Compress
from lilliput.verbs.rewrite import Rewrite
from lilliput.verbs.spec import Task

CACHE = "cache"  # in place of a role: keys and values of a block
_NULL = 1 / 32  # factor on changes that leave nothing but other roundings of the model's own type


@dataclass(frozen=True)
class Group:
    """The linears of one role in a block, which are changed together by `factor` times their errors; or its keys and
    values, the last of its groups."""

    block: int
    role: str
    names: tuple[str, ...]
    factor: float

    @property
    def null(self) -> bool:
        """Whether it is there for what any change at all does to a model that computes in 16 bits."""
        return self.factor == _NULL


@dataclass(frozen=True)
class Trying:
    """What is tried: `entry` of each linear, by number in the menu, and of the keys and values of each block; `groups`
    in the order of their variants, of which the first is number `first`; `table`: the embedding, where it may be
    chosen, which is variant `first - 1`; `stored`: entries of keys and values by block, for each factor of `whole`."""

    pool: Candidates
    entry: Mapping[str, int]
    groups: tuple[Group, ...]
    whole: tuple[float, ...]
    alone: float
    table: LinearPlan | None
    stored: Mapping[int, Sequence[int]]

    @property
    def begins(self) -> list[int]:
        """By variant but the first, the token from which on it counts: where caches are tried, those that see them."""
        context = self.pool.context
        seen = 0 if context is None else context.first
        table = [0] * (self.table is not None)
        return [seen] * len(self.whole) + table + [seen if x.role == CACHE else 0 for x in self.groups]

    @property
    def first(self) -> int:
        return 1 + len(self.whole) + (self.table is not None)

    def of_block(self, block: int) -> tuple[Group, ...]:
        return tuple(x for x in self.groups if x.block == block)

    def before(self, block: int) -> int:
        """Variants that enter a block."""
        return self.first + sum(x.block < block for x in self.groups)


def trying(plan: Plan, task: Task) -> Trying:
    """What a step tries, from the plan alone."""
    pool = choices.candidates(plan, task)
    trials: Trials = task.of(Choose).trials(task.options)
    entry = {x.name: choices.middle(pool, x) for x in plan.resolved.planned if x.name in pool.options}
    groups: list[Group] = []
    stored: dict[int, Sequence[int]] = {}
    for block in range(1 + max((x.block for x in plan.resolved.linears), default=-1)):
        roles: dict[str, list[str]] = {}
        for x in plan.resolved.of_block(block):
            if x.name in pool.options:
                roles.setdefault(x.linear.role, []).append(x.name)
        for role, names in roles.items():
            if not groups:
                groups.append(Group(block, role, tuple(names), _NULL))
            groups.append(Group(block, role, tuple(names), trials.alone))
        if pool.context is not None and (kept := pool.context.of_block(block)) is not None:
            groups.append(Group(block, CACHE, (kept.name,), 1.0))
            entry[kept.name], stored[block] = fewest(kept), rising(kept, len(trials.whole))
    table = next((x for x in plan.resolved.tables if x.name in pool.options and x.linear.role == EMBED), None)
    return Trying(pool, entry, tuple(groups), trials.whole, trials.alone, table, stored)


def split(plan: Plan, task: Task, ids: Tensor) -> tuple[Tensor, Tensor]:
    """All samples [N, T] as those that changes are tried on, and those of the statistics; the same where there are too
    few to be apart."""
    count = min(max(task.of(Choose).looked_at(len(ids), task.options), ranks.size()), len(ids))
    apart = len(ids) - count >= ranks.size()
    return ids[:count], ids[count:] if apart else ids


def take(plan: Plan, task: Task, model: Model, ids: Tensor, work: Work, progress: Progress) -> Activations:
    """Score all linears and try their errors, from the first block without a record on. Returns what the last block
    leaves of this rank's samples of the statistics."""
    tried = trying(plan, task)
    count = len(model.skeleton.block_names)
    few, many = split(plan, task, ids)
    flow = Flow(many[ranks.share(len(many))], plan.batching.batch, work.folder, _stems(task)[0], plan.dtype)
    states = _Files(plan, model, work.folder, task, few[ranks.share(len(few))], tried)
    records = _records(task, work)
    tried_already = _tried(task, work)
    now = flow.path(len(records)), states.path(len(records))
    tidy(work.folder, task, now[:1] if tried_already else now)
    progress.step(len(records), count, "scoring")
    if not tried_already:
        recorded = records[-1] if records else None
        calls = states.begin(recorded)
        for passage in walk(
            model, flow, first=len(records), recorded=recorded["hidden"] if recorded else None, keep=True
        ):
            scores = _block(plan, task, model, tried, passage, states, calls)
            record = {"kind": "score", "step": task.step, "block": passage.block, "scores": scores}
            work.note({**record, "hidden": passage.checksum(), "variants": states.checksum()})
            states.forget()
            progress.step(passage.block + 1, count, "scoring")
        losses = divergences(model.skeleton, model.read, states.variants(), tried.begins)
        shared = ranks.add(torch.tensor(losses, dtype=torch.float64) * states.samples) / len(few)
        work.note({"kind": "trial", "step": task.step, "losses": shared.tolist()})
        states.delete()
    return taken_up(model, flow, count, _records(task, work)[-1]["hidden"])


def _records(task: Task, work: Work) -> list[dict[str, Any]]:
    """Of the blocks that are finished, in order."""
    return sorted((r for r in work.find("score") if r["step"] == task.step), key=lambda r: int(r["block"]))


def _tried(task: Task, work: Work) -> bool:
    return any(r["step"] == task.step for r in work.find("trial"))


def tidy(folder: Path, task: Task, wanted: Collection[Path] = ()) -> None:
    """Remove what a run that was killed between a record and its tidying has left."""
    for stem in _stems(task):
        for path in folder.glob(f"{stem}-*"):
            if path not in wanted:
                path.unlink()


def _stems(task: Task) -> tuple[str, str]:
    """Of the files of hidden states, and of those of what is tried."""
    return f"score-{task.step:02d}", f"trial-{task.step:02d}"


def _block(
    plan: Plan,
    task: Task,
    model: Model,
    tried: Trying,
    passage: Passage,
    states: _Files,
    calls: Any,
) -> dict[str, list[float]]:
    """Score the linears of a block, and take all variants through it."""
    index = passage.block
    if passage.batches is None or passage.inputs is None:
        raise RuntimeError("a choice was planned, and nothing runs through the blocks")
    anatomy, prefix = model.anatomy().blocks[index], model.skeleton.block_names[index]
    weights = BlockWeights(model, index, anatomy)
    for rewrite in plan.resolved.of(Rewrite):
        view = rewriting.seen(model, index, weights, rewrite, passage.batches, passage.inputs)
        if view is not None:
            weights.fold(rewriting.decided(rewrite, *view))
            rewriting.load_folded(model.skeleton, weights)
    names = [x.name for x in anatomy.linears if f"{prefix}.{x.name}" in tried.pool.options]
    sites = [site for site in anatomy.sites if set(site.linears) & set(names)]
    passes = through(model.skeleton, index, passage.batches, passage.inputs, passage.outputs)
    stats = collect(model.skeleton, index, sites, {site.name: task.needs for site in sites}, passes)
    model.unload_block(index)  # not beside what linears are scored and quantized in
    scores: dict[str, list[float]] = {}
    entries = len(choices.entries(task))
    with ranks.together():
        for name in names if ranks.lead() else ():
            full, linear = f"{prefix}.{name}", anatomy.linear(name)
            weight = weights.linear(linear).to(weights.device)
            seen = stats[linear.site].to(weight.device)
            options = tried.pool.options[full]
            losses = task.of(Choose).score(weight, seen, [x for x, _ in options.values()], None, task.options)
            scores[full] = list(choices.numbered(entries, options, losses))
            value = _quantized(plan, task, full, weight, seen, options[tried.entry[full]][0])
            stored = weights.to_stored(linear, value).to("cpu", model.skeleton.dtype).contiguous()
            save_atomically(states.file(f"{full}.weight"), {"weight": stored})
            del weight, seen, value, stored
            memory.trim()
    del stats
    model.load_block(index)
    rewriting.load_folded(model.skeleton, weights)
    scores |= states.cached(index)
    states.advance(index, weights, calls)
    model.unload_block(index)
    return scores


def _quantized(plan: Plan, task: Task, name: str, weight: Tensor, stats: SiteStats, target: Target) -> Tensor:
    step = plan.resolved.governed(task)[name]
    return step.of(Compress).run(Layer(name, weight), stats, target, step.options).decode()


class _Files:
    """The states of all variants between two blocks, and the block's changed weights, in files of the work folder."""

    def __init__(self, plan: Plan, model: Model, folder: Path, task: Task, ids: Tensor, tried: Trying) -> None:
        self._plan, self._model, self._folder, self._task, self._ids = plan, model, folder, task, ids
        self._tried = tried
        self.stem = _stems(task)[1]
        self.samples = len(ids)
        context = tried.pool.context
        self._trials = None if context is None else CacheTrials(model.skeleton, context)
        self._now: Activations | None = None
        self._before: Activations | None = None

    def path(self, block: int) -> Path:
        """The file of what enters a block."""
        return self._folder / f"{self.stem}-{block:04d}.bin"

    def file(self, name: str) -> Path:
        """The file of a changed weight."""
        return self._folder / f"{self.stem}-{name}.safetensors"

    def variants(self) -> Variants:
        if self._now is None:
            raise RuntimeError("no variants are at hand")
        return Variants(self._now, self.samples)

    def begin(self, recorded: Mapping[str, Any] | None) -> Any:
        """The states that enter the block after the recorded one, and what a block is called with."""
        if recorded is None:
            self._now = self._opened(0)
            return self._embedded(self._now)
        block = int(recorded["block"]) + 1
        with ranks.together():
            checksum = int(recorded["variants"][ranks.rank()])
            self._now = Activations.taken_up(self.path(block), self._shape(block), self._plan.dtype, checksum)
        return embed(self._model, self._ids, 1, None).calls[1]

    def advance(self, block: int, weights: BlockWeights, calls: Any) -> None:
        """Take all variants through a loaded block, and its changes in variants of their own."""
        before, self._before = self.variants(), self._now
        self._now = self._opened(block + 1)
        linears = [x for x in self._tried.of_block(block) if x.role != CACHE]
        groups = [[f"{name}.weight" for name in x.names] for x in linears]
        factors = [x.factor for x in linears]
        cut = len(weights.prefix) + 1

        def original(name: str) -> Tensor:
            return weights.tensor(name[cut:])

        changes = Changes(original, self._changed, groups, factors, self._tried.whole, self._caches(block))
        with torch.no_grad():
            advance(self._model.skeleton, block, calls, before, self.variants(), changes)

    def cached(self, block: int) -> dict[str, list[float]]:
        """What each way of storing keys and values leaves of a loaded block's attention, over the samples of all
        ranks, by the item's name."""
        kept = None if self._tried.pool.context is None else self._tried.pool.context.of_block(block)
        if kept is None or self._trials is None:
            return {}
        states = self.variants()
        samples = (states.read(0, n).to(self._model.skeleton.device) for n in range(self.samples))
        with torch.no_grad():
            errors = torch.tensor(self._trials.errors(kept, samples), dtype=torch.float64)
        return {kept.name: ranks.add(errors).tolist()}

    def _caches(self, block: int) -> Caches | None:
        kept = None if self._tried.pool.context is None else self._tried.pool.context.of_block(block)
        if kept is None or self._trials is None:
            return None
        through = self._trials.through
        alone = through(kept, self._tried.entry[kept.name])
        return Caches(alone, [through(kept, j) for j in self._tried.stored[block]])

    def checksum(self) -> list[int]:
        return ranks.gathered(self.variants().states.checksum())

    def forget(self) -> None:
        """What entered the block is not needed any more, nor are its changes."""
        if self._before is not None:
            self._before.delete()
        for path in self._folder.glob(f"{self.stem}-*.safetensors"):
            path.unlink()

    def delete(self) -> None:
        self.variants().states.delete()

    def _changed(self, name: str) -> Tensor:
        """A weight as it was quantized, from the leader."""
        weight = torch.empty(self._model.shape(name), dtype=self._model.skeleton.dtype)
        if ranks.lead():
            weight = load_file(self.file(name))["weight"]
        return ranks.same(weight)

    def _shape(self, block: int) -> tuple[int, int, int]:
        return self._tried.before(block) * self.samples, self._ids.shape[1], self._model.skeleton.hidden_size

    def _opened(self, block: int) -> Activations:
        return Activations(self.path(block), self._shape(block), self._plan.dtype, create=True)

    def _embedded(self, states: Activations) -> Any:
        variants = Variants(states, self.samples)
        batches = embed(self._model, self._ids, 1, states)
        for variant, sample in _places(range(1, 1 + len(self._tried.whole)), self.samples):
            variants.write(variant, sample, variants.read(0, sample))
        if self._tried.table is not None:
            path = self._folder / f"{self.stem}-table.bin"
            with Activations(path, (self.samples, *states.shape[1:]), states.dtype, create=True) as changed:
                embed(self._table(self._tried.table), self._ids, 1, changed)
                for variant, sample in _places(range(self._tried.first - 1, self._tried.first), self.samples):
                    variants.write(variant, sample, changed.read(sample, sample + 1))
                changed.delete()
        return batches.calls[1]

    def _table(self, table: LinearPlan) -> ChangedTable:
        """The model with the rows of its embedding as they are quantized when they are only looked up."""
        target = self._tried.pool.options[table.name][self._tried.entry[table.name]][0]
        stats = lookups(table.linear.in_features, self._task.needs, self._model.skeleton.device)
        factor = self._tried.alone

        def become(rows: Tensor) -> Tensor:
            return rows + factor * (_quantized(self._plan, self._task, table.name, rows, stats, target) - rows)

        return ChangedTable(self._model, f"{table.name}.weight", become)


def _places(variants: range, samples: int) -> Iterator[tuple[int, int]]:
    return ((v, k) for v in variants for k in range(samples))
