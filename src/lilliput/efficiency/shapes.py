"""What a model computes for each token, from config and anatomy alone: its matrices, its attention, its norms.

No weight is read. Whoever counts operations or bytes starts here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

from lilliput.anatomy.model import Block, Linear
from lilliput.anatomy.setting import CHOSEN, chosen, setting
from lilliput.errors import SourceError
from lilliput.model.stored import Model, caches_of
from lilliput.runtime.caches import parsed
from lilliput.runtime.caches.codec import CacheShape, CodecSpec

_ATTENDS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Matrix:
    """`copies` equal matrices [out, in] in one tensor, each of which runs for the share `active` of the tokens.

    tensor: canonical name; block: its number, None for the head; compressible: a linear of a block, routers excepted.
    """

    tensor: str
    role: str
    block: int | None
    out_features: int
    in_features: int
    active: Fraction = Fraction(1)
    copies: int = 1

    @property
    def weights(self) -> int:
        """How many weights there are in all copies."""
        return self.copies * self.out_features * self.in_features

    @property
    def flops(self) -> Fraction:
        """Operations per token that arrives: 2 * out * in for each copy that runs for it."""
        return 2 * self.weights * self.active

    def touched(self, tokens: float) -> float:
        """The share of its copies that a pass over so many tokens reads."""
        active = float(self.active)
        return 1.0 if active == 1 else 1.0 - (1.0 - active) ** tokens

    @property
    def compressible(self) -> bool:
        return self.block is not None and self.role != "router"


@dataclass(frozen=True)
class Attention:
    """Softmax attention of one block. Widths are per head; `cached` counts the elements that a token leaves in the
    cache (grouped queries share theirs); `window` is how many tokens a token sees at most, itself included; `codec`:
    how they are stored compressed, and what of a token."""

    block: int
    heads: int
    key_width: int
    value_width: int
    cached: int
    window: int | None = None
    codec: tuple[CodecSpec, CacheShape] | None = None

    def cache_bytes(self, context: int, item: int) -> float:
        """Bytes of the cache of one sequence of `context` tokens, plain elements of `item` bytes."""
        if self.codec is None:
            return float(self.cached * self.span(context) * item)
        spec, shape = self.codec
        return spec.size_bits(context, shape, 8 * item) / 8

    def span(self, context: int) -> int:
        """Tokens that the last of `context` tokens attends to, itself included."""
        return context if self.window is None else min(context, self.window)

    def pairs(self, tokens: int) -> int:
        """Query-key pairs of a causal pass over `tokens` tokens: sum of `span(t)` for t = 1 .. tokens."""
        full = self.span(tokens)
        return full * (full + 1) // 2 + (tokens - full) * full

    def flops(self, pairs: int) -> int:
        """Scores and weighted values: 2 * heads * (key width + value width) each pair, 4 * heads * width if equal."""
        return 2 * self.heads * (self.key_width + self.value_width) * pairs


@dataclass(frozen=True)
class Shapes:
    """A model as it runs: everything that time and memory depend on.

    norms: elements per token that each norm reads; inner: elements per token between an MLP's first and last matrix,
    activation and gate; positions: the longest context, None where the config names none; notes: what is not counted.
    """

    hidden: int
    vocabulary: int
    blocks: int
    matrices: tuple[Matrix, ...]
    attention: tuple[Attention, ...]
    norms: tuple[int, ...]
    inner: Fraction
    positions: int | None
    notes: tuple[str, ...] = ()

    def cache_bytes(self, context: int, item: int) -> float:
        """Bytes of the cache of one sequence of `context` tokens, plain elements of `item` bytes; a window keeps its
        last tokens only."""
        return sum(x.cache_bytes(context, item) for x in self.attention)


def shapes_of(model: Model) -> Shapes:
    """The shapes of an opened model. Reads config and headers only.

    Raises SourceError where the config does not say how many experts a token goes through, or where its number of
    heads does not fit the matrices.
    """
    anatomy, skeleton, config = model.anatomy(), model.skeleton, model.skeleton.config
    matrices: list[Matrix] = []
    attention: list[Attention] = []
    norms: list[int] = []
    notes: dict[str, None] = {}
    inner = Fraction(0)
    codecs = {block: (x.spec, x.shape) for x in parsed(caches_of(model.source)) for block in x.blocks}
    for i, (name, block) in enumerate(zip(anatomy.block_names, anatomy.blocks, strict=True)):
        linears = list(_linears(config, name, i, block))
        claimed = {x.tensor for x in linears}
        rest = [n for n in skeleton.names_of(i) if n not in claimed and not n.endswith(".bias")]
        for tensor in rest:
            shape = skeleton.shapes[tensor]
            if len(shape) == 1:
                norms.append(shape[0] if shape[0] >= skeleton.hidden_size else shape[0] * _heads(config, i))
            elif len(shape) == 3 and shape[1] > 1 and chosen(config) is not None:
                active = Fraction(chosen(config) or 1, shape[0])
                linears.append(Matrix(tensor, "experts", i, shape[1], shape[2], active, shape[0]))
            else:
                notes[f"{tensor.removeprefix(name + '.')}: operations of this tensor are not counted"] = None
        matrices += linears
        inner += sum((x.in_features * x.active for x in linears if x.role == "down"), Fraction(0))
        kind = _kind(config, i)
        if kind in _ATTENDS and any(x.role in ("o", "qkv", "v") for x in block.linears):
            attention.append(replace(_attention(config, i, kind, block), codec=codecs.get(name)))
        else:
            notes[f"block {i} has no softmax attention ({kind}): the part that mixes its tokens is not counted"] = None
    norms += [prod(skeleton.shapes[n]) for n in anatomy.final if not n.endswith(".bias")]
    vocabulary, width = skeleton.shapes[anatomy.head][:2]
    matrices.append(Matrix(anatomy.head, "head", None, vocabulary, width))
    return Shapes(
        hidden=skeleton.hidden_size,
        vocabulary=vocabulary,
        blocks=len(anatomy.blocks),
        matrices=tuple(matrices),
        attention=tuple(attention),
        norms=tuple(norms),
        inner=inner,
        positions=model.positions,
        notes=tuple(notes),
    )


def _linears(config: Any, name: str, number: int, block: Block) -> Iterable[Matrix]:
    banks: dict[str, int] = {}
    for x in block.linears:
        if x.expert is not None:
            banks[_bank(x)] = banks.get(_bank(x), 0) + 1
    for x in block.linears:
        active = Fraction(1)
        if x.expert is not None:
            experts_per_token = chosen(config)
            if experts_per_token is None:
                raise SourceError(
                    f"{name} has {banks[_bank(x)]} experts, and the config does not say how many of them each "
                    f"token uses: set one of {', '.join(CHOSEN[:3])} in config.json"
                )
            active = Fraction(min(experts_per_token, banks[_bank(x)]), banks[_bank(x)])
        yield Matrix(f"{name}.{x.name}.weight", x.role, number, x.out_features, x.in_features, active)


def _bank(linear: Linear) -> str:
    """The same linear of all experts: its name without the expert's number."""
    return linear.name.replace(f".{linear.expert}.", ".*.", 1)


def _kind(config: Any, i: int) -> str:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return str(kinds[i])
    windowed = setting(config, "sliding_window", i) and getattr(config, "use_sliding_window", True)
    return "sliding_attention" if windowed else "full_attention"


def _heads(config: Any, i: int) -> int:
    heads = setting(config, "num_attention_heads", i)
    heads = heads[i] if isinstance(heads, list | tuple) else heads
    if not isinstance(heads, int) or heads < 1:
        raise SourceError("config.json gives no number of attention heads: attention cannot be counted")
    return heads


def _attention(config: Any, i: int, kind: str, block: Block) -> Attention:
    heads = _heads(config, i)
    window = {
        "full_attention": None,
        "sliding_attention": setting(config, "sliding_window", i),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }[kind]
    rows = {x.role: x.out_features for x in block.linears if x.expert is None}
    wide = next((x.in_features for x in block.linears if x.role == "o"), heads * _head_width(config, i, heads))
    if wide % heads:
        raise SourceError(f"config.json names {heads} heads, which do not divide the {wide} inputs of block {i}'s o")
    width = wide // heads
    latent = getattr(config, "kv_lora_rank", None)
    if isinstance(latent, int):  # DeepSeek-V2: one latent vector and one rotary key for all heads is what is cached
        rotary = int(config.qk_rope_head_dim)
        return Attention(i, heads, int(config.qk_nope_head_dim) + rotary, width, latent + rotary, window)
    if "qkv" in rows:
        return Attention(i, heads, width, width, rows["qkv"] - heads * width, window)
    if "k" in rows and "v" in rows:
        shared = max(1, rows["v"] // width)
        return Attention(i, heads, rows["k"] // shared, width, rows["k"] + rows["v"], window)
    shared = setting(config, "num_key_value_heads", i) or heads
    return Attention(i, heads, width, width, 2 * int(shared) * width, window)


def _head_width(config: Any, i: int, heads: int) -> int:
    return int(setting(config, "head_dim", i) or config.hidden_size // heads)
