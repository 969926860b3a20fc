"""The cache as 8-bit floats with one static scale for all keys of a layer and one for all values.

Over the keys x of a block on the calibration text, and over its values likewise,

    s = max |x| / 448,    code = e4m3(x / s),    x ~ s code,

448 the largest number of e4m3, to which anything larger is cut. s is rounded up to eight significant bits, so that
an engine that keeps it in bfloat16 or float16 computes with the same. Keys are those after their rotation by position.
What a token attends to is what is stored, its own key and value included. This is the one compressed cache that
engines have: where it is that of all blocks the folder can have compressed-tensors' layout, whose `kv_cache_scheme`
says it, and vLLM stores a byte for each element.

Paper: Micikevicius et al. 2022 (FP8), arXiv 2209.05433. Cost: one pass of each block on `samples` calibration samples,
whose keys and values are held in float32; 8 bits for each element. Limits: one large channel sets the scale of all,
which floats bear well; larger keys than the calibration text has are cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from lilliput.runtime.caches.codec import CodecSpec
from lilliput.runtime.caches.fp8 import KEY, TOP, VALUE, Fp8Spec
from lilliput.verbs.cache import Cache, CacheIO
from lilliput.verbs.cache import Options as Common

BITS = 8  # significant bits of a scale, those of bfloat16


class Options(Common):
    """See the module's docstring."""

    samples: int = Field(16, ge=1, description="calibration samples that the largest values are taken from")


def codec(bits: int, group: int, o: Options, turned: bool) -> CodecSpec:
    """How keys and values are stored."""
    return Fp8Spec()


def scale(x: Tensor) -> Tensor:
    """Of values x: float32 [1]; 1 where all are zero."""
    largest = x.abs().amax().double() / TOP
    if largest == 0:
        return torch.ones(1)
    mantissa, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ceil(torch.ldexp(mantissa, torch.tensor(BITS))), exponent - BITS).float().reshape(1)


def fit(io: CacheIO, spec: Fp8Spec, o: Options) -> Mapping[str, Tensor]:
    """Both scales."""
    return {KEY: scale(io.keys), VALUE: scale(io.values)}


METHOD = Cache(
    paper="Micikevicius et al. 2022, arXiv 2209.05433",
    options=Options,
    needs=(),
    covers={},
    codec=codec,
    uses=(),
    fit=fit,
    samples=lambda o: o.samples,
)
