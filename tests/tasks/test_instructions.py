import json
import math
import shutil

import pytest

from lilliput.errors import DataError
from lilliput.tasks.instructions import _beginning, _mean_likelihoods, compare_instructions, instruction, repetition
from lilliput.tasks.run import loaded


def test_repetition_by_hand():
    assert repetition([1, 2, 3]) == 0.0
    assert repetition(list(range(20))) == 0.0
    assert repetition([7] * 10) == pytest.approx(1 - 1 / 7)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)


def test_rows_of_the_known_sets():
    assert instruction({"turns": ["Why?", "And?"]}, "row 1") == "Why?"
    row = {"instruction": "Rewrite.", "instances": [{"input": "A b.", "output": "B."}]}
    assert instruction(row, "row 1") == "Rewrite.\n\nA b."
    assert instruction({"instruction": "Rewrite.", "input": ""}, "row 1") == "Rewrite."
    assert instruction({"prompt": "Hello"}, "row 1") == "Hello"
    for bad, said in [
        ({"turns": []}, "'turns'"),
        ({"instruction": 3}, "'instruction'"),
        ({"x": 1}, "no field 'turns'"),
    ]:
        with pytest.raises(DataError, match=f"row 7: .*{said}"):
            instruction(bad, "row 7")


def test_side_by_side(tiny, noisy, jsonl):
    path = jsonl("v.jsonl", *({"turns": [f"Explain {x}."]} for x in ("names", "objects", "classes", "values")))
    found = compare_instructions(noisy, tiny("llama"), path, tokens=12)
    assert found.prompts == 4
    assert found.identical.value < 1.0
    assert 0 < len(found.examples) <= 4
    first = found.examples[0]
    assert first.ours != first.base
    assert math.isfinite(first.base_likelihood)
    # Greedy decoding writes what it finds likely: mostly more so than what another model wrote.
    assert found.win_rate.value <= 0.5
    assert "proxy" in found.note
    json.dumps(found.to_json())


def test_a_template_that_fails_is_named(tiny, jsonl, tmp_path):
    asked = jsonl("asked.jsonl", {"prompt": "Name a colour."}, {"prompt": "Name a number."})
    folder = tmp_path / "chatty"
    shutil.copytree(tiny("llama"), folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system prompt') }}")
    with pytest.raises(DataError, match="instruction 1: the model's chat template refuses this chat: no system prompt"):
        compare_instructions(folder, folder, asked, tokens=2)


def test_a_model_beside_itself(tiny, jsonl):
    path = jsonl("v.jsonl", {"prompt": "Explain names."}, {"prompt": "Explain values."}, {"prompt": "Explain."})
    found = compare_instructions(tiny("llama"), tiny("llama"), path, limit=2, tokens=8)
    assert (found.prompts, found.win_rate.value, found.identical.value, found.examples) == (2, 0.5, 1.0, ())
    assert found.repetition_difference.value == 0.0
    with pytest.raises(DataError, match="at least 2"):
        compare_instructions(tiny("llama"), tiny("llama"), path, limit=1)


def test_an_answer_beyond_the_positions_is_scored_by_its_beginning(tiny):
    with loaded(tiny("llama"), device="cpu", dtype="float32", work=None) as whole:
        long = "values " * 400
        begun = _beginning(whole.tokenizer, long, 128)
        assert long.startswith(begun)
        assert 0 < len(begun) < len(long)
        cut, same = _mean_likelihoods(whole, ["a b"] * 2, [long, begun])
        assert cut == pytest.approx(same)
        assert math.isfinite(cut)
