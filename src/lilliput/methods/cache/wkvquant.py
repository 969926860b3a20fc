"""WKVQuant's cache: static shifts and scales by channel, then groups by token; the tokens of a call stay as they are.

Two-dimensional rounding: the keys or values x of one head become

    z_c = (x_c - shift_c) / scale_c,    shift_c = (max x_c + min x_c) / 2,    scale_c = (max x_c - min x_c) / 2,

extremes over the calibration text, so that all channels are alike, and z is rounded as in kv-rtn, each token's vector
in groups of G channels. Past only: a token attends to its own key and value, and to those of the same call, as they
are. The paper learns shifts and scales with the model's blocks; here they are those of the extremes, in closed form.

Paper: Yue et al. 2024, arXiv 2402.12065. Cost: one pass of each block on `samples` calibration samples, whose keys and
values are held in float32; b + 32 / G bits for each element, and four float32 for each channel of a layer. Limits:
nothing is learned, and the loss over several blocks of the paper is not taken; weights are a matter of other steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from lilliput.runtime.caches.codec import CodecSpec
from lilliput.runtime.caches.shifted import SCALE, SHIFT, ShiftedSpec
from lilliput.verbs.cache import Cache, CacheIO
from lilliput.verbs.cache import Options as Common


class Options(Common):
    """See the module's docstring."""

    value_bits: int | None = Field(None, ge=2, le=16, description="bits of values, 16: as they are; none: as of keys")
    samples: int = Field(16, ge=1, description="calibration samples that extremes are taken from")


def codec(bits: int, group: int, o: Options, turned: bool) -> CodecSpec:
    """How keys and values are stored."""
    return ShiftedSpec(bits, o.value_bits or bits, group)


def fit(io: CacheIO, spec: ShiftedSpec, o: Options) -> Mapping[str, Tensor]:
    """Shifts and scales of both sides, float32 [heads, width]."""
    out: dict[str, Tensor] = {}
    for side, x in (("key", io.keys), ("value", io.values)):
        low, high = x.amin(0), x.amax(0)
        half = (high - low) / 2
        out[f"{side}_{SHIFT}"] = (high + low) / 2
        out[f"{side}_{SCALE}"] = torch.where(half > 0, half, 1.0)
    return out


METHOD = Cache(
    paper="Yue et al. 2024, arXiv 2402.12065",
    options=Options,
    needs=(),
    covers={"wkvquant": [{"method": "gptq", "target": {"bits": 4}}, {"method": "wkvquant", "target": {"bits": 4}}]},
    baseline="kv-rtn",
    codec=codec,
    fit=fit,
    samples=lambda o: o.samples,
)
