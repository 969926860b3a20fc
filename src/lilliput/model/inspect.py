"""The anatomy of a model as plain data, for `lilliput inspect`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lilliput.anatomy.model import Anatomy, Block
from lilliput.stats.site import SiteStats

if TYPE_CHECKING:
    from lilliput.model.weights import Model


def inspect(model: Model) -> dict[str, Any]:
    """What a model is made of, JSON-able: kinds of blocks, sites, links with their errors, groups, parameter counts."""
    return describe(model.anatomy(), model.skeleton.shapes)


def describe(anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`inspect` for an anatomy and the shapes of its tensors by canonical name."""
    kinds: dict[int, dict[str, Any]] = {}
    for i, block in enumerate(anatomy.blocks):
        if id(block) not in kinds:
            kinds[id(block)] = _block(block)
        kinds[id(block)]["blocks"].append(i)
    return {
        "architecture": anatomy.architecture,
        "blocks": len(anatomy.blocks),
        "kinds": list(kinds.values()),
        "embeddings": list(anatomy.embeddings),
        "final": list(anatomy.final),
        "head": anatomy.head,
        "tied": anatomy.tied,
        "parameters": parameters(anatomy, shapes),
        "notes": list(anatomy.notes),
    }


def parameters(anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Parameters by role of a linear, of "embedding", "head" and "other" (norms, biases), and the "total".

    A tied head counts once, as embedding.
    """
    role = {
        f"{name}.{linear.name}.weight": str(linear.role)
        for name, block in zip(anatomy.block_names, anatomy.blocks, strict=True)
        for linear in block.linears
    }
    counts: dict[str, int] = {}
    for tensor, shape in shapes.items():
        if tensor in anatomy.embeddings:
            kind = "embedding"
        elif tensor == anatomy.head:
            kind = "head"
        else:
            # a linear whose use is unknown is still a linear: apart from norms and biases
            kind = {"other": "unknown linear"}.get(role.get(tensor, ""), role.get(tensor, "other"))
        counts[kind] = counts.get(kind, 0) + math.prod(shape)
    return {**dict(sorted(counts.items())), "total": sum(counts.values())}


def outliers(stats: Mapping[str, SiteStats], top: int = 5) -> list[dict[str, Any]]:
    """Rows per site: the largest |x| over the root mean square of all channels, and the `top` channels.

    stats: by site name, with `absmax`, and `square` or `gram`. A ratio above some 20 means that a grid shared by all
    channels is set by few of them.
    """
    rows: list[dict[str, Any]] = []
    for site, stat in stats.items():
        absmax = stat.need("absmax")
        rms = float(stat.second_moment().mean().sqrt())
        values, channels = absmax.topk(min(top, stat.width))
        rows.append(
            {
                "site": site,
                "width": stat.width,
                "tokens": stat.count,
                "rms": rms,
                "absmax": float(absmax.max()),
                "ratio": float(absmax.max()) / rms if rms > 0 else 0.0,
                "channels": [
                    {"channel": c, "absmax": v} for c, v in zip(channels.tolist(), values.tolist(), strict=True)
                ],
            }
        )
    return rows


def _block(block: Block) -> dict[str, Any]:
    return {
        "blocks": [],
        "sites": [
            {
                "site": site.name,
                "stage": site.stage,
                "width": site.width,
                "linears": [
                    {"name": x.name, "role": x.role, "shape": [x.out_features, x.in_features], "expert": x.expert}
                    for x in map(block.linear, site.linears)
                ],
            }
            for site in block.sites
        ],
        "links": [
            {
                "kind": x.kind,
                "producer": x.producer,
                "readers": list(x.readers),
                "width": len(x.index),
                "offset": x.offset,
                "error": x.error,
            }
            for x in block.links
        ],
        "groups": {kind: block.groups.count(kind) for kind in ("head", "channel", "expert")},
        "residual": {
            "readers": {norm: list(names) for norm, names in block.residual_readers},
            "writers": list(block.residual_writers),
        },
        "parameters": sum(x.parameters for x in block.linears),
        "notes": list(block.notes),
    }
