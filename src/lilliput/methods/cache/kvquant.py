"""KVQuant: keys by channel before their rotation, tabled levels, and the largest entries apart.

Keys are turned back to what they were before their rotation by position, where their large channels stand still, and
turned again when they are read. Channel c of the keys has a static centre m_c and half range h_c, values of token t
have m_t and h_t of their own, in float16:

    z = (x - m) / h,    x ~ h T[code] + m,    code = the level of T nearest to z,

T a table of 2^b levels for the keys of a layer and one for its values, by k-means on the z of the calibration text
(`levels: uniform`: evenly spaced in [-1, 1]): the T of least sum w (z - T[code])^2 with w = 1 or, `weigh: fisher`, the
square of the derivative of the loss by the x that z is of, a key's before its rotation. Ranges leave the share
`outliers` out: of a channel its largest and smallest keys on the calibration text, of a token's values those farthest
from their mean. In each token's vector, over all heads, the ceil(outliers * n) keys with the largest |z| and as many
values are stored apart, as they are: a fixed number, so that the bytes are known. The first `sinks` tokens that are no
padding stay plain. Q-Norm (`q_norm`; by default at 2 bits): the levels that are read are those that are written, scaled
and shifted so that the rounded z have the mean and the standard deviation of the z. What a token attends to is what is
stored, its own key and value included.

Paper: Hooper et al. 2024, arXiv 2401.18079. Cost: one pass of each block on `samples` calibration samples, whose keys
and values are held in float32; b bits for each element, 16 and a plain element for each of those apart, 64 bits for
each token, and one table of sines and cosines for the whole cache. `weigh: fisher` takes a backward pass of the model
on those samples before anything is changed, whose gradient by each block's outputs stays on disk until the block is
done. Limits: derivatives are those of the finished block under that gradient, and how wide the range of a z is does not
enter w; models that rotate keys by a function of their own are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats import kmeans
from lilliput.runtime.caches.codec import CodecSpec
from lilliput.runtime.caches.kvquant import CENTRE, HALF, LEVELS, KvquantSpec, normalised, outliers, value_ranges
from lilliput.verbs.cache import Cache, CacheIO
from lilliput.verbs.cache import Options as Common

MOST = 1 << 18  # values that k-means sees


class Options(Common):
    """See the module's docstring."""

    value_bits: int | None = Field(None, ge=2, le=8, description="bits of values; none: as of keys")
    outliers: float = Field(0.01, ge=0.0, lt=0.5, description="share of a token's entries that are stored apart")
    sinks: int = Field(1, ge=0, description="first tokens that stay plain")
    levels: Literal["kmeans", "uniform"] = Field("kmeans", description="where the levels of a table lie")
    weigh: Literal["none", "fisher"] = Field("none", description="k-means weighs values by squared gradients, or alike")
    q_norm: bool | None = Field(None, description="keep mean and deviation of what is rounded; none: at 2 bits")
    samples: int = Field(16, ge=1, description="calibration samples that ranges and tables are taken from")


def codec(bits: int, group: int, o: Options, turned: bool) -> CodecSpec:
    """How keys and values are stored. Raises PlanError where there is nothing to weigh."""
    if o.weigh == "fisher" and o.levels != "kmeans":
        raise PlanError("weigh: fisher says how k-means counts values, and levels are uniform: leave one of them out")
    return KvquantSpec(bits, o.value_bits or bits, o.outliers, o.sinks, turned)


def ranges(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Centre and half of the range of each column of x [n, width] without the share of it that lies farthest out, half
    of that on each side."""
    count = int(share * len(x) / 2)
    ordered = x.sort(0).values
    low, high = ordered[count], ordered[len(x) - 1 - count]
    return (high + low) / 2, (high - low) / 2


def table(z: Tensor, bits: int, levels: str, q_norm: bool, weights: Tensor | None = None) -> Tensor:
    """Levels that codes are chosen by, and those that they are read as, float32 [2, 2^bits]; z: float32 [n], weights
    [n], not negative, of their errors (None: all alike)."""
    chosen_from = z.abs() <= 1
    inside = z[chosen_from]
    every = max(1, -(-len(inside) // MOST))
    inside = inside[::every]
    weights = None if weights is None else weights[chosen_from][::every]
    if levels == "uniform" or not len(inside):
        chosen = torch.linspace(-1, 1, 1 << bits, device=z.device)
    else:
        chosen = kmeans.fit(inside[None], 1 << bits, weights=weights)[0]
    read = chosen
    if q_norm and len(inside):
        rounded = chosen[kmeans.nearest(inside[None], chosen[None])[0]].double()
        spread = rounded.std(correction=0)
        if spread > 0:
            scale = inside.double().std(correction=0) / spread
            read = ((chosen.double() - rounded.mean()) * scale + inside.double().mean()).float()
    return torch.stack([chosen, read])


def fit(io: CacheIO, spec: KvquantSpec, o: Options) -> Mapping[str, Tensor]:
    """Static ranges of the keys, float32 [heads, width], and both tables."""
    keys, values = io.keys.flatten(1), io.values.flatten(1)
    centre, half = ranges(keys, o.outliers)
    z = normalised(keys, centre, half).flatten()
    apart, low, high = value_ranges(values, outliers(o.outliers, values.shape[1]))
    inside = torch.ones_like(values, dtype=torch.bool).scatter_(1, apart, False)
    own = normalised(values, low, high)[inside]
    key_weights = None if io.key_weights is None else io.key_weights.flatten()
    value_weights = None if io.value_weights is None else io.value_weights.flatten(1)[inside]
    shape = (io.shape.heads, io.shape.keys)
    return {
        CENTRE: centre.view(shape),
        HALF: half.view(shape),
        f"key_{LEVELS}": table(z, spec.bits, o.levels, _norms(o, spec.bits), key_weights),
        f"value_{LEVELS}": table(own, spec.value_bits, o.levels, _norms(o, spec.value_bits), value_weights),
    }


def _norms(o: Options, bits: int) -> bool:
    return bits == 2 if o.q_norm is None else o.q_norm


METHOD = Cache(
    paper="Hooper et al. 2024, arXiv 2401.18079",
    options=Options,
    needs=(),
    covers={"kvquant": [{"method": "kvquant", "target": {"bits": 3}, "options": {"weigh": "fisher"}}]},
    baseline="kv-rtn",
    codec=codec,
    uses=("bits",),
    fit=fit,
    samples=lambda o: o.samples,
    skipped=lambda o: o.sinks,
    weighs=lambda o: o.weigh == "fisher",
)
