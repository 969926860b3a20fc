"""Behaviours of a written folder: what its model leaves out while it runs, depending on what it reads.

The config lists them beside the linears; `install` puts them into the modules of a model, be it one that transformers
has loaded or the skeleton of our own reader, so that a `generate` and an evaluation run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from lilliput.errors import LilliputError, SourceError
from lilliput.runtime import switched
from lilliput.runtime.behaviours.gates import BIAS, WEIGHT, gate_, ungate_
from lilliput.runtime.behaviours.layer import behave_
from lilliput.runtime.behaviours.state import GATES, Behaviours, parsed

_STATE = "lilliput_behaviours"


def install(
    model: nn.Module,
    entries: Sequence[Mapping[str, Any]],
    tensors: Callable[[str], Tensor],
    locate: Callable[[str], str] = str,
) -> Behaviours:
    """Let a model follow the entry `behaviours` of a config. tensors: a stored tensor by name; locate: where a module
    of our names sits. Raises SourceError where the model does not fit."""
    state = parsed(entries)
    modules = dict(model.named_modules())
    for number, name in enumerate(state.blocks):
        behave_(_found(modules, locate(name)), state, number)
    for entry in entries:
        if entry["kind"] == GATES:
            for name, linears in entry["mlps"].items():
                gate_(_found(modules, locate(name)), state, name, linears, entry, tensors)
    model.__dict__[_STATE] = state
    return state


def stored(entries: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the tensors that the behaviours have in the files."""
    gated = [name for entry in entries if entry.get("kind") == GATES for name in entry["mlps"]]
    return tuple(f"{name}.{tensor}" for name in gated for tensor in (WEIGHT, BIAS))


def _found(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        raise SourceError(f"config.json gives '{name}' a behaviour, and the model has no such module")
    return modules[name]


def of(model: nn.Module) -> Behaviours | None:
    """The behaviours of a model; None where it has none."""
    return model.__dict__.get(_STATE)


def require(model: nn.Module) -> Behaviours:
    """The behaviours of a model. Raises LilliputError where it has none."""
    state = of(model)
    if state is None:
        raise LilliputError(
            f"this {type(model).__name__} has no behaviours: load a folder that a recipe with token-pruning or "
            "dynamic-pruning has written, after `import lilliput`"
        )
    return state


def paused(*models: nn.Module) -> AbstractContextManager[None]:
    """The models as they are without behaviours, while the context lasts."""
    return switched.off(map(of, models))


@contextmanager
def prompted(model: nn.Module, prompt: int) -> Iterator[None]:
    """Inputs are a prompt of so many tokens and what follows it, read at once, while the context lasts; work is counted
    from its beginning on. A prompt of 0 tokens is none: every token stays."""
    state = of(model)
    before = None if state is None else state.prompt
    if state is not None:
        state.prompt = prompt
        state.work.clear()
    try:
        yield
    finally:
        if state is not None:
            state.prompt = before


@contextmanager
def tried(mlp: nn.Module, name: str, entry: Mapping[str, Any], tensors: Callable[[str], Tensor]) -> Iterator[None]:
    """One MLP, called `name` in `entry`, has gates while the context lasts."""
    gate_(mlp, parsed([entry]), name, entry["mlps"][name], entry, tensors)
    try:
        yield
    finally:
        ungate_(mlp)
