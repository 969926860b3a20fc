"""Products with weights of which only some are kept, in the form that a file holds: values row by row, and a bit mask.

y_i = sum over the set bits j of row i of value_ij x_j, in float32; rows do not interact, so threads take rows of their
own. Where the processor has AVX-512, 16 weights at a time are spread out by their bits (one instruction) and multiplied
with 16 inputs side by side: the time is the same at every density. Elsewhere the set bits are visited one by one, which
takes time by the number of weights. Compressed rows of column numbers are not made: they would take two more bytes for
each kept weight, and their scattered reads were slower than either (benchmarks/sparse.py).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lilliput.algebra import compiled

LANES = 16  # weights that are spread out at once
_ABREAST = 4  # sums of a row that are kept apart, so that none waits for the one before
_BLOCK = LANES * _ABREAST
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> bool:
    """Whether numba is installed (the extra `fast`)."""
    return compiled.available()


@functools.cache
def wide() -> bool:
    """Whether the processor has AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def _native() -> bool:
    """Whether numba compiles for this processor, as it does unless it is told otherwise."""
    config = importlib.import_module("numba").config
    return not (config.CPU_NAME or config.CPU_FEATURES)


def most() -> int:
    """Tokens up to which multiplying by kept weights was quicker than spreading them out first, at half of all weights
    and fewer (benchmarks/sparse.py)."""
    return 4 if wide() else 1


def starts(mask: Tensor) -> Tensor:
    """Where each row's values begin, and after the last row their number: int [rows + 1], of a mask uint8 [rows, n]."""
    counts = _ones(mask.device).index_select(0, mask.reshape(-1).int()).view(mask.shape).sum(1, dtype=torch.int64)
    out = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(counts, 0, out=out[1:])
    return out.int() if int(out[-1]) < 1 << 31 else out


def _ones(device: torch.device) -> Tensor:
    """How many bits each byte has set, uint8 [256]."""
    return (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1).sum(1).to(torch.uint8)


class Product:
    """x WT for the W of `values` [count], of one of `DTYPES`, and `mask` uint8 [rows, ceil(width / 8)], low bits first;
    `begin` of `starts`. All on the CPU, and looked at in place: they must stay as they are."""

    def __init__(self, values: Tensor, mask: Tensor, begin: Tensor) -> None:
        self._rows = len(mask)
        self._held: tuple[Any, ...]
        if wide() and _native():
            self._kernel = _spreading(values.dtype)
            self._held = (_raw(values), begin.numpy(), mask.contiguous().numpy())
        else:
            words, size = _words(mask)
            self._kernel = _visiting(values.dtype)
            self._held = (_raw(values), begin.numpy(), words, size)

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [tokens, rows] for x float32 [tokens, width]."""
        out = torch.empty(len(x), self._rows)
        compiled.match_threads()
        self._kernel(*self._held, x.contiguous().numpy(), out.numpy())
        return out


def spread(values: Tensor, mask: Tensor, begin: Tensor, width: int) -> Tensor:
    """The dense W [rows, width] in the dtype of its values; arguments as of `Product`."""
    out = torch.zeros(len(mask), width, dtype=values.dtype)
    compiled.match_threads()
    words, size = _words(mask)
    _dense()(_raw(values), begin.numpy(), words, size, _raw(out))
    return out


def _words(mask: Tensor) -> tuple[Any, int]:
    """The rows of a mask in the longest words that they are whole numbers of, and the bits of such a word."""
    words = mask.contiguous().numpy()
    return (words, 8) if words.shape[1] % 8 else (words.view(np.uint64), 64)


def _raw(values: Tensor) -> Any:
    """Values as an array; numba knows no floats of 16 bits."""
    return values.numpy() if values.dtype is torch.float32 else values.view(torch.uint16).numpy()


@functools.cache
def _table(dtype: torch.dtype) -> Any:
    """Every value of a float of 16 bits, float32 [65536]."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).float().numpy()


@functools.cache
def _dense() -> Callable[..., None]:
    prange, trailing = importlib.import_module("numba").prange, _trailing()

    def dense(values: Any, begin: Any, words: Any, size: int, out: Any) -> None:
        for i in prange(words.shape[0]):
            place = begin[i]
            for k in range(words.shape[1]):
                word, first = np.uint64(words[i, k]), k * size
                while word:
                    out[i, first + trailing(word)] = values[place]
                    word &= word - np.uint64(1)
                    place += 1

    return compiled.parallel(dense)


@functools.cache
def _visiting(dtype: torch.dtype) -> Callable[..., None]:
    prange, trailing, narrow, table = importlib.import_module("numba").prange, _trailing(), dtype.itemsize == 2, None
    table = _table(dtype) if narrow else np.zeros(1, np.float32)

    def visit(values: Any, begin: Any, words: Any, size: int, x: Any, out: Any) -> None:
        for i in prange(words.shape[0]):
            for t in range(x.shape[0]):
                place, total = begin[i], np.float32(0.0)
                for k in range(words.shape[1]):
                    word, first = np.uint64(words[i, k]), k * size
                    while word:
                        value = table[values[place]] if narrow else values[place]
                        total += value * x[t, first + trailing(word)]
                        word &= word - np.uint64(1)
                        place += 1
                out[t, i] = total

    return compiled.parallel(visit)


@functools.cache
def _spreading(dtype: torch.dtype) -> Callable[..., None]:
    prange, block, narrow, table = importlib.import_module("numba").prange, _block_sum(dtype), dtype.itemsize == 2, None
    table = _table(dtype) if narrow else np.zeros(1, np.float32)

    def spreading(values: Any, begin: Any, mask: Any, x: Any, out: Any) -> None:
        tokens, width = x.shape
        count, across = len(values), mask.shape[1]
        flat, inputs = mask.reshape(-1), x.reshape(-1)
        for i in prange(mask.shape[0]):
            # Sixteen values are read where fewer are used: not beyond the last one.
            blocks = width // _BLOCK if begin[i + 1] + LANES <= count else 0
            for t in range(tokens):
                total = block(values, np.int64(begin[i]), flat, i * across, inputs, t * width, np.int64(blocks))
                place = begin[i + 1]
                for j in range(width - 1, blocks * _BLOCK - 1, -1):
                    if (mask[i, j >> 3] >> (j & 7)) & 1:
                        place -= 1
                        value = table[values[place]] if narrow else values[place]
                        total += value * x[t, j]
                out[t, i] = total

    return compiled.parallel(spreading)


@functools.cache
def _trailing() -> Any:
    """Zeros below the lowest set bit of a word that is not 0."""
    types, extending = importlib.import_module("numba.types"), importlib.import_module("numba.extending")
    ir = importlib.import_module("llvmlite.ir")

    def trailing(context: Any, word: Any) -> Any:
        def code(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

        return types.int64(types.uint64), code

    return extending.intrinsic(trailing)


@functools.cache
def _block_sum(dtype: torch.dtype) -> Any:
    """The sum over `blocks` times 64 weights of a row: its values from `place`, its mask from byte `byte`, its inputs
    from `first`. Written in LLVM's own terms, for numba has no name for the instruction that spreads values by bits."""
    types, extending = importlib.import_module("numba.types"), importlib.import_module("numba.extending")
    ir, cgutils = importlib.import_module("llvmlite.ir"), importlib.import_module("numba.core.cgutils")
    long, half, floats = ir.IntType(64), ir.IntType(16), ir.VectorType(ir.FloatType(), LANES)
    shorts, ints = ir.VectorType(half, LANES), ir.VectorType(ir.IntType(32), LANES)
    bits = ir.VectorType(ir.IntType(1), LANES)

    def function(builder: Any, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        found = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)
        return lambda *given: builder.call(found, given)

    def load(builder: Any, array: Any, index: Any, kind: Any, align: int) -> Any:
        value = builder.load(builder.bitcast(builder.gep(array, [index]), kind.as_pointer()))
        value.align = align
        return value

    def widened(builder: Any, array: Any, index: Any) -> Any:
        """Sixteen values as float32."""
        if dtype is torch.float32:
            return load(builder, array, index, floats, 4)
        narrow = load(builder, array, index, shorts, 2)
        if dtype is torch.float16:
            return builder.fpext(builder.bitcast(narrow, ir.VectorType(ir.HalfType(), LANES)), floats)
        return builder.bitcast(builder.shl(builder.zext(narrow, ints), ir.Constant(ints, [16] * LANES)), floats)

    def total(builder: Any, sums: Any) -> Any:
        value = builder.fadd(builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3]))
        half_of = LANES // 2
        while half_of:
            sides = []
            for side in (0, half_of):
                order = ir.Constant(ir.VectorType(ir.IntType(32), half_of), list(range(side, side + half_of)))
                sides.append(builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), order))
            value, half_of = builder.fadd(*sides), half_of // 2
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [
            context.make_array(signature.args[n])(context, builder, arguments[n]).data if n in (0, 2, 4) else None
            for n in range(5)
        ]
        expand = function(builder, f"llvm.x86.avx512.mask.expand.v{LANES}f32", floats, floats, floats, bits)
        count = function(builder, "llvm.ctpop.i16", half, half)
        multiply_add = function(builder, f"llvm.fma.v{LANES}f32", floats, floats, floats, floats)
        none = ir.Constant(floats, None)
        sums = [cgutils.alloca_once_value(builder, none) for _ in range(_ABREAST)]
        place = cgutils.alloca_once_value(builder, arguments[1])
        with cgutils.for_range(builder, arguments[6]) as loop:
            at = builder.load(place)
            for n in range(_ABREAST):
                number = builder.add(builder.mul(loop.index, long(_ABREAST)), long(n))
                byte = builder.add(arguments[3], builder.mul(number, long(LANES // 8)))
                word = load(builder, arrays[2], byte, half, 1)
                weights = expand(widened(builder, arrays[0], at), none, builder.bitcast(word, bits))
                first = builder.add(arguments[5], builder.mul(number, long(LANES)))
                inputs = load(builder, arrays[4], first, floats, 4)
                builder.store(multiply_add(weights, inputs, builder.load(sums[n])), sums[n])
                at = builder.add(at, builder.zext(count(word), long))
            builder.store(at, place)
        return total(builder, [builder.load(x) for x in sums])

    def block(context: Any, values: Any, place: Any, mask: Any, byte: Any, x: Any, first: Any, blocks: Any) -> Any:
        i64 = types.int64
        return types.float32(values, i64, mask, i64, x, i64, i64), code

    return extending.intrinsic(block)
