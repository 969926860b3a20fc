"""What containers have room for."""

from pathlib import Path

import torch
from transformers import LlamaConfig

from lilliput.export.convert import awq, gptq, mlx
from lilliput.export.convert.room import Room
from lilliput.export.outcome import Outcome
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.scheme import quantized

ROOM = Room("box", "an engine", (4, 8), groups=(32, 64), row=False, mixed=False, steps=(8, 1), models=("llama",))
CONFIG = LlamaConfig(hidden_size=64, num_attention_heads=4)


def linear(group: int = 32, bits: int = 4, rows: int = 64, width: int = 128, **more: bool) -> Outcome:
    scheme = quantized(IntegerFormat(bits, True, group))
    return Outcome("a", "a", rows, width, scheme, torch.float32, **more)


def test_codes_take_the_next_width_and_groups_a_divisor() -> None:
    assert [ROOM.code_bits(bits) for bits in (2, 4, 5, 8)] == [4, 4, 8, 8]
    assert [ROOM.group(linear(group)) for group in (32, 64, 128, 96, -1, 16)] == [32, 64, 64, 32, 64, 0]
    rows = Room("box", "an engine", (4,))
    assert [rows.group(linear(group)) for group in (32, -1, 0, 24)] == [32, -1, -1, 24]


def test_what_it_refuses() -> None:
    assert ROOM.refuse([linear()], CONFIG) is None
    for outcome, says in (
        (linear(rows=60), "has 60 outputs, no multiple of 8"),
        (linear(group=16), "groups of 16 inputs, and box has groups of 32, 64"),
        (linear(group=96), "groups of 96 do not divide the 128 inputs"),
        (linear(transposed=True), "stored as \\[in, out\\]"),
        (linear(expert=True), "is an expert"),
        (linear(router=True), "is a router"),
        (linear(embedding=True, table=True), "is an embedding"),
        (linear(table=True), "is the head"),
    ):
        reason = ROOM.refuse([outcome], CONFIG)
        assert reason is not None
        assert says.replace("\\", "") in reason
    assert "all linears have one size of groups" in str(ROOM.refuse([linear(), linear(64)], CONFIG))
    assert "none of its linears is quantized" in str(ROOM.refuse([], CONFIG))
    assert "models of type 'gpt2'" in str(ROOM.refuse([linear()], type("C", (), {"model_type": "gpt2"})()))


def test_the_table_of_the_page_is_what_the_converters_say() -> None:
    page = (Path(__file__).parents[3] / "docs" / "convert.md").read_text().splitlines()
    rooms = [x.ROOM.row_of_table() for x in (gptq, awq, mlx)]
    start = page.index(rooms[0])
    assert page[start : start + 3] == rooms
    assert page[start + 3] == ""
