from lilliput.tasks import choice
from lilliput.tasks.choice import Choice
from lilliput.tasks.likelihood import log_likelihoods
from lilliput.tasks.shapes import table


def test_acc_takes_the_likeliest_and_acc_norm_the_likeliest_per_character(monkeypatch):
    values = {" a": -2.0, " long one": -6.0, " b": -2.0}

    def scored(loaded, requests, step):
        return [type("Score", (), {"value": values[y]})() for _, y in requests]

    monkeypatch.setattr(choice, "log_likelihoods", scored)
    items = [
        Choice(("x", "x"), (" a", " long one"), (1, 8), 0),
        Choice(("x", "x"), (" a", " long one"), (1, 8), 1),
        Choice(("x", "x"), (" a", " b"), (1, 1), 0),  # a tie goes to the first
    ]
    found = choice.measure(None, table()["piqa"][0], items, lambda done, total: None)
    assert found == {"acc": [1.0, 0.0, 1.0], "acc_norm": [0.0, 1.0, 1.0]}


def test_a_model_answers_as_its_likelihoods_say(llama):
    item = Choice(("The statement",) * 3, (" binds", " names are", " of"), (5, 9, 2), 1)
    sums = [x.value for x in log_likelihoods(llama, list(zip(item.contexts, item.continuations, strict=True)))]
    found = choice.measure(llama, table()["piqa"][0], [item], lambda done, total: None)
    assert found["acc"] == [float(sums.index(max(sums)) == 1)]
    shares = [s / n for s, n in zip(sums, item.lengths, strict=True)]
    assert found["acc_norm"] == [float(shares.index(max(shares)) == 1)]
