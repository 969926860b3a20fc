"""How `choose` is carried out: the losses of all options, each block a record, a few trials, and then one decision."""

from __future__ import annotations

from lilliput.run import choosing
from lilliput.run.driver import TargetsDriver
from lilliput.verbs.choose import Choose

DRIVER = TargetsDriver(verb=Choose, run=choosing.run, again=choosing.again, cost=choosing.cost)
