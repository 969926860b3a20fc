"""How `rewrite` is carried out: the leader decides for all ranks what moves along which link."""

from __future__ import annotations

from lilliput.run import rewriting
from lilliput.run.driver import BlockDriver
from lilliput.verbs.rewrite import Rewrite

DRIVER = BlockDriver(verb=Rewrite, run=rewriting.decided)
