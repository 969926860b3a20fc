"""How `allocate` is carried out: scores of all blocks, each a record of the journal, and then one decision."""

from __future__ import annotations

from lilliput.run import passes
from lilliput.run.driver import TargetsDriver
from lilliput.verbs.allocate import Allocate

DRIVER = TargetsDriver(verb=Allocate, run=passes.allocated, again=passes.decided)
