"""What every method of the verb `adapt` owes its callers: the model stays as it is, whatever stands beside it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lilliput import api, methods
from lilliput.errors import PlanError
from lilliput.verbs.adapt import Adapt

ADAPTERS = sorted(name for name, x in methods.discover().items() if isinstance(x.spec, Adapt))


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("- {{method: {0}}}\n- {{method: rtn}}", "put the adapter last"),
        ("- {{method: {0}, options: {{others: ['*norm*']}}}}", "leaves every tensor of the folder as it is"),
    ],
    ids=["last", "others"],
)
def test_an_adapter_changes_nothing_else(tiny: Callable[[str], Path], name: str, steps: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        api.plan(tiny("llama"), recipe="steps:\n" + steps.format(name), samples=2, tokens=16)
