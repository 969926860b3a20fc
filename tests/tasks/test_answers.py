from lilliput.tasks.answers import AnswerStore, store_for


def test_answers_survive_and_a_torn_line_does_not(tmp_path):
    path = tmp_path / "answers.jsonl"
    first = AnswerStore(path)
    first.put([-1.5, True], "likelihood", (1, 2), (3,))
    first.put("text", "greedy", "prompt")
    with path.open("a") as file:
        file.write('["abc", "tor')
    again = AnswerStore(path)
    assert len(again) == 2
    assert again.get("likelihood", (1, 2), (3,)) == [-1.5, True]
    assert again.get("likelihood", (1, 2), (4,)) is None
    again.put("more", "greedy", "other")
    assert AnswerStore(path).get("greedy", "other") == "more"
    assert len(AnswerStore(path)) == 3


def test_another_model_or_dtype_has_answers_of_its_own(tmp_path):
    model, work = tmp_path / "model", tmp_path / "work"
    model.mkdir()
    (model / "weights").write_text("1")
    store_for(work, model, "float32").put("a", "greedy", "p")
    assert store_for(work, model, "float32").get("greedy", "p") == "a"
    assert store_for(work, model, "bfloat16").get("greedy", "p") is None
    (model / "weights").write_text("22")
    assert store_for(work, model, "float32").get("greedy", "p") is None
    assert len(store_for(None, model, "float32")) == 0
