"""The module tree of a causal language model on the meta device: tensors come and go, the model's own code runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lilliput.anatomy import cached
from lilliput.anatomy.build import build
from lilliput.anatomy.calls import Call, Calls, same, take_hidden
from lilliput.errors import SourceError


class _StopForwardError(Exception):
    """Ends a forward pass at the point from where nothing more is needed."""


def positions(config: Any) -> int | None:
    """Tokens of the longest context that a config of transformers names; None where it names none."""
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx"))
    return next((x for x in limits if isinstance(x, int) and x > 0), None)


class Skeleton:
    """A causal language model whose parameters are loaded and unloaded by name, block by block.

    Buffers that no checkpoint holds (rotary frequencies and the like) are computed and stay. All code that runs is the
    model's own: blocks are called with the arguments that the model's forward gives them, and what surrounds the
    blocks runs with the blocks passed over. Raises SourceError for a model whose blocks cannot be found.

    block_names: module names of the blocks; embeddings, final: tensors used before the first and after the last block;
    head: tensor of the output projection (the embedding's name where `tied`); shapes: every tensor a checkpoint holds.
    """

    def __init__(self, config: Any, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.dtype = dtype
        self.device = device
        built = build(config, dtype, device)
        self.model: nn.Module = built.model
        self.config: Any = built.model.config
        self.notes: tuple[str, ...] = built.notes
        self.head_module: nn.Module = built.head
        self.block_names: tuple[str, ...] = built.blocks
        self._layers = [self.model.get_submodule(name) for name in self.block_names]
        self._places = _places(self.model)
        self.tied = built.tied
        self.shapes: Mapping[str, tuple[int, ...]] = {n: tuple(p[0].tensor().shape) for n, p in self._places.items()}
        self.head = next(n for n, p in self._places.items() if any(x.module is self.head_module for x in p))
        self._by_block = _by_block(self.shapes, self.block_names)
        self._outer = self._outer_modules()
        self._tuples = False
        self.hidden_size = 0
        self.embeddings, self.final = self._probe()

    @property
    def positions(self) -> int | None:
        """Tokens of the longest context that the model knows; None where its config names no limit."""
        return positions(self.config)

    def names_of(self, block: int) -> tuple[str, ...]:
        """Canonical tensor names of block `block`."""
        return self._by_block[block]

    def block(self, i: int) -> nn.Module:
        return self._layers[i]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which `load` keeps the tensor `name`: float32 where the model insists on it."""
        return self._places[name][0].dtype

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in place by canonical name; floats are cast to the skeleton's dtype and device.

        A tensor that already has both is used as it is, without a copy. Raises SourceError for an unknown name or a
        wrong shape.
        """
        for name, value in tensors.items():
            if name not in self._places:
                raise SourceError(
                    f"{type(self.model).__name__} has no tensor '{name}': the config and the files differ"
                )
            if tuple(value.shape) != self.shapes[name]:
                raise SourceError(
                    f"'{name}' has shape {tuple(value.shape)} but the config asks for {self.shapes[name]}: "
                    "the config and the files differ"
                )
            value = value.to(device=self.device, dtype=self.dtype_of(name)) if value.is_floating_point() else value
            self._put(name, value.to(self.device))

    def unload(self, names: Iterable[str]) -> None:
        """Send tensors back to the meta device."""
        for name in names:
            self._put(name, torch.empty(self.shapes[name], dtype=self.dtype_of(name), device="meta"))

    def tensor(self, name: str) -> Tensor:
        """The tensor in place under a canonical name (on the meta device where it is not loaded)."""
        return self._places[name][0].tensor()

    def calls(self, batch: int, tokens: int, past: int | None = None) -> Calls:
        """The block arguments for inputs of a shape, without any tensor loaded; `past`: so many tokens are in a cache,
        which `run` replaces, None: there is no cache.

        Raises SourceError where the arguments depend on the tokens themselves: such blocks cannot be run by themselves.
        """
        first, second = (self._record(batch, tokens, fill, past) for fill in (0, 1))
        for i, (a, b) in enumerate(zip(first.layers, second.layers, strict=True)):
            if not same((a.args, dict(a.kwargs)), (b.args, dict(b.kwargs))):
                raise SourceError(
                    f"block {i} of {type(self.model).__name__} receives something that depends on the tokens "
                    "besides its hidden states: it cannot be run block by block"
                )
        return first

    def _record(self, batch: int, tokens: int, fill: int, past: int | None) -> Calls:
        forwards: dict[nn.Module, Callable[..., Any]] = {m: self._stub(m, float(fill)) for m in self._outer}
        with _forwards(forwards):
            return self.embed(self._dummy(batch, tokens) + fill, past)[1]

    def embed(self, ids: Tensor, past: int | None = None) -> tuple[Tensor, Calls]:
        """ids int64 [B, T] -> hidden states [B, T, H] before the first block, and the recorded block arguments.

        The embedding tensors must be loaded. The calls depend on the shape of ids only.
        """
        recorded: list[Call] = []
        hidden: list[Tensor] = []
        cache = None if past is None else cached.filled(self.config, len(ids), past, self.device)

        def record(last: bool) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                value, call = take_hidden(args, kwargs)
                recorded.append(call)
                hidden[:] = hidden[:1] or [value]
                if last:
                    raise _StopForwardError
                return (value, None, None) if self._tuples else value

            return forward

        count = len(self._layers)
        with _forwards({layer: record(i == count - 1) for i, layer in enumerate(self._layers)}), torch.no_grad():
            self._forward(ids.to(self.device), cache)
        return hidden[0], Calls((ids.shape[0], ids.shape[1]), tuple(recorded), cache)

    def run(
        self,
        i: int,
        hidden: Tensor,
        calls: Calls,
        tensors: Mapping[str, Tensor] | None = None,
        module: nn.Module | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Block i on hidden states [B, T, H] of the shape that `calls` was recorded for.

        `tensors`, by names relative to the block, take the place of its own for this call; gradients reach them.
        `module` is called in place of the block: the same block of another copy of the model. `cache`: what the block
        gets in place of the recorded one.
        """
        if tuple(hidden.shape[:2]) != calls.shape:
            raise ValueError(f"hidden states {tuple(hidden.shape)} do not fit calls recorded for {calls.shape}")
        call = calls.layers[i].with_cache(calls.cache, cache)
        args = call.args if call.keyword is not None else (hidden, *call.args)
        kwargs = call.kwargs if call.keyword is None else {**call.kwargs, call.keyword: hidden}
        out = functional_call(module or self._layers[i], dict(tensors or {}), args, dict(kwargs))
        result: Tensor = out if isinstance(out, Tensor) else out[0]
        return result

    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, H] after the last block -> what the head reads (the final tensors must be loaded)."""
        inputs: list[Tensor] = []

        def stop(x: Tensor, *_: Any, **__: Any) -> Any:
            inputs.append(x)
            raise _StopForwardError

        output = (hidden, None, None) if self._tuples else hidden

        def inject(*_: Any, **__: Any) -> Any:
            return output

        forwards: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(self._layers, inject)
        forwards |= {m: self._stub(m) for m in self._before}
        forwards[self.head_module] = stop
        with _forwards(forwards), _unhooked(self._layers):
            self._forward(self._dummy(hidden.shape[0], hidden.shape[1]))
        return inputs[0]

    def read(self, ids: Tensor, positions: Tensor | None = None, cache: Any = None) -> Tensor:
        """ids int64 [B, T] -> what the head reads, [B, T, H], by the whole model, all of it loaded; gradients pass.

        positions: int64 [B, T], of each token in its document, where rows hold several; none sees another then, which
        holds without a cache alone. cache: what keys and values go through.
        """
        inputs: list[Tensor] = []

        def stop(x: Tensor, *_: Any, **__: Any) -> Any:
            inputs.append(x)
            raise _StopForwardError

        given = {} if positions is None else {"position_ids": positions.to(self.device)}
        with _forwards({self.head_module: stop}), suppress(_StopForwardError):
            self.model(input_ids=ids.to(self.device), **given, **cached.options(self.model, cache))
        return inputs[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Finished hidden states [.., H] -> float32 logits [.., V], soft-capped and scaled as the model does it."""
        head = type(self.head_module).forward
        flat = hidden.reshape(-1, 1, hidden.shape[-1])
        forwards: dict[nn.Module, Callable[..., Any]] = {m: self._stub(m) for m in self._outer}
        forwards |= {layer: self._pass() for layer in self._layers}
        forwards[self.head_module] = lambda *_, **__: head(self.head_module, flat)
        with _forwards(forwards), _unhooked(self._layers):
            out = self._forward(self._dummy(flat.shape[0], 1))
        result: Tensor = out.logits.float()
        return result.reshape(*hidden.shape[:-1], result.shape[-1])

    def _forward(self, ids: Tensor, cache: Any = None) -> Any:
        try:
            return self.model(input_ids=ids, **cached.options(self.model, cache))
        except _StopForwardError:
            return None

    def _dummy(self, batch: int, tokens: int) -> Tensor:
        return torch.zeros(batch, tokens, dtype=torch.int64, device=self.device)

    def _pass(self) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = take_hidden(args, kwargs)
            return (hidden, None, None) if self._tuples else hidden

        return forward

    def _stub(self, module: nn.Module, fill: float = 0.0) -> Callable[..., Any]:
        """A stand-in that needs no weights and gives the right shape."""
        if isinstance(module, nn.Embedding):
            width = module.embedding_dim
        elif isinstance(module, nn.Linear):
            width = module.out_features
        else:
            width = 0

        def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
            if width == 0:
                return x
            shape = x.shape if isinstance(module, nn.Embedding) else x.shape[:-1]
            return torch.full((*shape, width), fill, dtype=self.dtype, device=self.device)

        return forward

    def _outer_modules(self) -> list[nn.Module]:
        """Modules outside the blocks and the head that own tensors."""
        inside = {id(m) for layer in self._layers for m in layer.modules()} | {id(self.head_module)}
        owners = [m for m in self.model.modules() if id(m) not in inside and (m._parameters or m._buffers)]
        roots = {id(m) for m in self.model.modules() if any(layer is x for layer in self._layers for x in m.children())}
        return [m for m in owners if id(m) not in roots and any(True for _ in _own_tensors(m))]

    def _probe(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Run the model with everything passed over, to see what is used before and what after the blocks."""
        order: list[nn.Module | None] = []
        shapes: list[torch.Size] = []

        def watched(module: nn.Module | None, inner: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                order.append(module)
                if module is None or module is self.head_module:
                    shapes.append(take_hidden(args, kwargs)[0].shape)
                return inner(*args, **kwargs)

            return forward

        def stop(*_: Any, **__: Any) -> Any:
            raise _StopForwardError

        forwards = {m: watched(m, self._stub(m)) for m in self._outer}
        forwards |= {layer: watched(None, self._pass()) for layer in self._layers}
        forwards[self.head_module] = watched(self.head_module, stop)
        for self._tuples in (False, True):
            order.clear()
            shapes.clear()
            try:
                with _forwards(forwards), torch.no_grad():
                    self._forward(self._dummy(1, 2))
            except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
                if self._tuples:
                    raise SourceError(
                        f"{type(self.model).__name__} cannot be run block by block: {error}. "
                        "Its blocks need something that the model's forward pass does not provide directly."
                    ) from error
                continue
            if all(s[:-1] == shapes[0][:-1] for s in shapes):
                break
        if sum(m is None for m in order) != len(self._layers) or self.head_module not in order:
            raise SourceError(f"{type(self.model).__name__} does not run its blocks one after the other: not supported")
        self.hidden_size = int(shapes[0][-1])
        first = order.index(None)
        last = len(order) - 1 - order[::-1].index(None)
        self._before = [m for m in self._outer if m not in order[last:]]
        after = [m for m in self._outer if m in order[last:]]
        before = [m for m in self._outer if m in order[: first + 1] or m not in after]
        loose = set(self.shapes) - {n for names in self._by_block for n in names} - self._names(self._outer)
        loose -= self._names([self.head_module])
        early, late = self._names(before) | loose, self._names(after) | loose
        return tuple(n for n in self.shapes if n in early), tuple(n for n in self.shapes if n in late)

    def _names(self, modules: Sequence[nn.Module]) -> set[str]:
        ids = {id(m) for m in modules}
        return {n for n, places in self._places.items() if any(id(p.module) in ids for p in places)}

    def _put(self, name: str, value: Tensor) -> None:
        places = self._places[name]
        shared = nn.Parameter(value, requires_grad=False) if places[0].parameter else value
        for place in places:
            if place.parameter:
                place.module._parameters[place.key] = shared  # type: ignore[assignment]
            else:
                place.module._buffers[place.key] = shared


@dataclass(frozen=True)
class _Place:
    """Where a tensor hangs in the module tree."""

    module: nn.Module
    key: str
    parameter: bool
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        value = (self.module._parameters if self.parameter else self.module._buffers)[self.key]
        if value is None:
            raise RuntimeError(f"'{self.key}' has vanished from {type(self.module).__name__}")
        return value


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """A module's own tensors that a checkpoint holds: (key, tensor, is it a parameter)."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield key, parameter, True
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield key, buffer, False


def _places(model: nn.Module) -> dict[str, list[_Place]]:
    """All places of every tensor by canonical name; tied tensors go under the name that comes first."""
    names: dict[int, str] = {}
    places: dict[str, list[_Place]] = {}
    for path, module in model.named_modules():
        for key, value, parameter in _own_tensors(module):
            name = names.setdefault(id(value), f"{path}.{key}" if path else key)
            places.setdefault(name, []).append(_Place(module, key, parameter, value.dtype))
    return places


def _by_block(shapes: Mapping[str, Any], blocks: Sequence[str]) -> list[tuple[str, ...]]:
    groups: dict[str, list[str]] = {name: [] for name in blocks}
    root = blocks[0].rpartition(".")[0] + "."
    for name in shapes:
        if name.startswith(root):
            groups[root + name.removeprefix(root).partition(".")[0]].append(name)
    return [tuple(groups[name]) for name in blocks]


@contextmanager
def _forwards(table: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward for a while, in place of one of their own where they have it."""
    before = {module: module.__dict__["forward"] for module in table if "forward" in module.__dict__}
    for module, forward in table.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in table:
            del module.__dict__["forward"]
        for module, forward in before.items():
            module.__dict__["forward"] = forward


@contextmanager
def _unhooked(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Without the hooks around modules that are passed over: they may fetch weights that nobody needs."""
    before = [(m._forward_pre_hooks, m._forward_hooks) for m in modules]
    try:
        for m in modules:
            m._forward_pre_hooks, m._forward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for m, hooks in zip(modules, before, strict=True):
            m._forward_pre_hooks, m._forward_hooks = hooks
