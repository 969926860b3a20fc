import importlib.util
import sys
from dataclasses import replace

import pytest

from lilliput.errors import DataError, LilliputError
from lilliput.tasks import harness
from lilliput.tasks.decode import greedy
from lilliput.tasks.kept import Kept
from lilliput.tasks.likelihood import log_likelihoods
from lilliput.tasks.run import run_tasks

needed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra `eval` is not installed")


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
    with pytest.raises(DataError, match="scores no single items"):
        harness.by_item(samples((0, "none", {"word_perplexity": (-3.0, 4)})), "wikitext")


@needed
@pytest.mark.filterwarnings("ignore")
def test_the_adapter_answers_as_we_do(llama):
    from lm_eval.api.instance import Instance

    def asked(kind, *arguments):
        return [Instance(request_type=kind, doc={}, arguments=x, idx=0) for x in arguments]

    model = harness.adapter(replace(llama, kept=Kept()))
    pair = ("The statement", " binds names")
    (expected,) = log_likelihoods(llama, [pair])
    assert model.loglikelihood(asked("loglikelihood", pair)) == [(expected.value, expected.greedy)]
    (whole,) = log_likelihoods(llama, [("", "binds names to objects")])
    assert model.loglikelihood_rolling(asked("x", ("binds names to objects",))) == [pytest.approx(whole.value)]
    found = model.generate_until(asked("x", ("The", {"until": ["\n\n"], "max_gen_toks": 5})))
    assert found == greedy(llama, ["The"], stop=("\n\n",), tokens=5)


@needed
@pytest.mark.filterwarnings("ignore")
def test_a_name_that_the_harness_does_not_know(llama):
    with pytest.raises(DataError, match=r"no task 'piqaa'.* piqa"):
        harness.run(llama, ["piqaa"])


@needed
@pytest.mark.filterwarnings("ignore")
def test_without_a_network_the_remedy_is_said(llama):
    with pytest.raises(DataError, match=r"cannot run piqa .* check the network, or give a local file, piqa=FILE"):
        harness.run(llama, ["piqa"], limit=2)
