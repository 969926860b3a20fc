from lilliput.tasks import cloze
from lilliput.tasks.cloze import Cloze
from lilliput.tasks.decode import greedy
from lilliput.tasks.likelihood import log_likelihoods
from lilliput.tasks.shapes import table

SHAPE = table()["lambada"][0]


def test_what_the_model_would_write_is_right_and_anything_else_is_not(llama):
    context = "The assignment statement binds"
    written = greedy(llama, [context], tokens=1)[0]
    items = [Cloze(context, written), Cloze(context, " zebra")]
    found = cloze.measure(llama, SHAPE, items, lambda done, total: None)
    assert found["acc"] == [1.0, 0.0]
    expected = [x.value for x in log_likelihoods(llama, [(x.context, x.target) for x in items])]
    assert found["log_likelihood"] == expected


def test_a_target_is_joined_with_one_space():
    shape = table()["cloze"][0]
    rows = [{"context": "a", "target": "b"}, {"context": "a\n", "target": "b"}, {"context": "a", "target": " b"}]
    assert [cloze.item(shape, x, "row").target for x in rows] == [" b", "b", " b"]
