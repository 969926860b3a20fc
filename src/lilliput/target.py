"""What is wanted of a layer, and the base of all that a user writes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Strict(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Target(Strict):
    """What is wanted of a layer. None means: not asked for."""

    format: str = Field("int", description="the numeric grid; docs/recipes.md lists them")
    bits: int | None = Field(None, ge=2, le=8, description="bits of a weight")
    group_size: int | Literal["auto", "channel", "tensor"] = Field(
        "auto", description="inputs that share a scale; auto: the largest of 128, 64, 32 that divides every width"
    )
    symmetric: bool = Field(True, description="no zero points")
    scale_dtype: str = Field(
        "auto",
        description="type of the scales: float16, bfloat16, float32, e8m0, e4m3, int8/N, intB/row or intB/N; auto: "
        "bfloat16 for models stored so, else float16",
    )
    sparsity: float | None = Field(None, ge=0.0, le=1.0, description="share of weights that become zero")
    pattern: str | None = Field(None, description='"N:M" keeps N of every M inputs; None is unstructured')
    places: Literal["bits", "tiles"] = Field(
        "bits",
        description="how the native layout says where kept weights are: by a bit for every weight, or by tiles, 16 "
        "bits for each kept one, where that takes fewer bytes",
    )
    rank: int | None = Field(None, ge=0, description="rank of a low-rank part")
    ratio: float | None = Field(
        None, gt=0.0, le=1.0, description="parameters of the low-rank factors as a share of the weight's own"
    )

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("a group has at least one input: give a positive number, 'channel' or 'tensor'")
        return value

    @field_validator("pattern")
    @classmethod
    def _n_of_m(cls, value: str | None) -> str | None:
        if value is not None:
            n, _, m = value.partition(":")
            if not (n.isdigit() and m.isdigit() and 0 < int(n) <= int(m)):
                raise ValueError(f"a pattern is written N:M with 0 < N <= M, such as 2:4, not {value!r}")
        return value
