"""The size of a GGUF file before it exists, and a file made to a size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lilliput import api
from lilliput.errors import PlanError
from lilliput.progress import Quiet
from lilliput.source.gguf_metadata import Metadata

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 2, "tokens": 16, "device": "cpu", "dtype": "float32"}
MENU = ("q4_0", "q5_0", "q8_0")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_file_has_the_size_that_was_planned_and_keeps_to_what_was_asked(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    model = tiny(kind)
    with pytest.raises(PlanError, match=r"the smallest that this menu makes is (\d+) bytes") as refused:
        api.plan(model, size=1000, menu=MENU, to="gguf", **ROOM)
    least = int(str(refused.value).partition("makes is ")[2].split()[0])
    size = int(least * 1.05)
    out = tmp_path / "model.gguf"
    done = api.compress(model, out, size=size, menu=MENU, to="gguf", eval_windows=0, progress=Quiet(), **ROOM)
    assert done.converted is not None
    assert out.stat().st_size == done.converted.bytes == done.folder_bytes == done.plan.folder_bytes <= size
    assert out.stat().st_size > 0.98 * size
    assert len({kind for kind in done.converted.types if kind != "F32"}) > 1
    assert not list(tmp_path.glob(".*"))
    assert bytes(Metadata(out).fields["general.name"].parts[0]).decode() == model.name


def test_a_menu_that_the_container_does_not_hold_is_refused(tiny: Tiny) -> None:
    with pytest.raises(PlanError, match="no engine holds the menu"):
        api.plan(tiny("llama"), size=10**6, menu=("q4_0", "nf4/64"), to="gguf", **ROOM)
    with pytest.raises(PlanError, match="no menu is known for"):
        api.plan(tiny("llama"), size=10**6, to="elsewhere", **ROOM)
