import json
import sys
from dataclasses import replace

import pytest

from lilliput.errors import DataError, LilliputError
from lilliput.tasks import harness
from lilliput.tasks.answers import AnswerStore
from lilliput.tasks.decode import greedy
from lilliput.tasks.likelihood import log_likelihoods
from lilliput.tasks.run import run_tasks


def test_without_the_package_the_remedy_is_said(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LilliputError, match=r"pip install 'lilliput\[eval\]', or give NAME=FILE"):
        run_tasks(tiny("llama"), None, ["piqa"])


def samples(*rows):
    return [{"doc_id": i, "filter": f, "metrics": list(m), **m} for i, f, m in rows]


def test_logged_samples_become_scores_by_item():
    found = harness.by_item(samples((1, "none", {"acc": 0.0}), (0, "none", {"acc": 1.0})), "t")
    assert found == {"acc": [1.0, 0.0]}
    rows = [(i, f, {"exact_match": float(f == "b")}) for f in ("a", "b") for i in range(2)]
    assert harness.by_item(samples(*rows), "t") == {"exact_match,a": [0.0, 0.0], "exact_match,b": [1.0, 1.0]}
    with pytest.raises(DataError, match="does not score single items"):
        harness.by_item(samples((0, "none", {"word_perplexity": (-3.0, 4)})), "wikitext")


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_answers_as_we_do(llama):
    from lm_eval.api.instance import Instance

    def asked(kind, *arguments):
        return [Instance(request_type=kind, doc={}, arguments=x, idx=0) for x in arguments]

    model = harness.adapter(replace(llama, answers=AnswerStore()))
    pair = ("The statement", " binds names")
    (expected,) = log_likelihoods(llama, [pair])
    assert model.loglikelihood(asked("loglikelihood", pair)) == [(expected.value, expected.greedy)]
    (whole,) = log_likelihoods(llama, [("", "binds names to objects")])
    assert model.loglikelihood_rolling(asked("x", ("binds names to objects",))) == [pytest.approx(whole.value)]
    found = model.generate_until(asked("x", ("The", {"until": ["\n\n"], "max_gen_toks": 5})))
    assert found == greedy(llama, ["The"], stop=("\n\n",), tokens=5)


@pytest.mark.filterwarnings("ignore")
def test_a_name_that_the_harness_does_not_know(llama):
    with pytest.raises(DataError, match=r"no task 'piqaa'.* piqa"):
        harness.run(llama, ["piqaa"])


@pytest.mark.filterwarnings("ignore")
def test_without_a_network_the_remedy_is_said(llama):
    with pytest.raises(DataError, match=r"cannot run piqa .* check the network, or give a local file, piqa=FILE"):
        harness.run(llama, ["piqa"], limit=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_the_users_own_runs_by_name(tiny, noisy, jsonl, tmp_path):
    """The harness fetches, builds prompts and scores; both models answer, and our own reading of the rows agrees."""
    words = ["names", "objects", "value", "class"]
    pairs = [(a, b) for a in words for b in words]
    rows = [{"goal": f"Bind {a}", "sol1": f"Use the {b}.", "sol2": a, "label": i % 2} for i, (a, b) in enumerate(pairs)]
    data = jsonl("rows.jsonl", *rows)
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    both = run_tasks(noisy, tiny("llama"), [f"mine={tmp_path / 'mine.yaml'}", f"piqa={data}"], limit=12)
    theirs, ours = both
    assert (theirs.name, theirs.source, theirs.items, ours.items) == ("mine", "lm-evaluation-harness", 12, 12)
    assert (theirs.ours, theirs.base, theirs.flips) == (ours.ours, ours.base, ours.flips)
    assert 0 < theirs.base.value < 1
    with pytest.raises(DataError, match=r"no task 'other'.*other=FILE"):
        run_tasks(noisy, None, [f"other={tmp_path / 'mine.yaml'}"])
