"""Errors that a user can mend. The command line prints their text, without a traceback, and exits with status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LilliputError(Exception):
    """A problem that names the thing, the rule it broke and the remedy."""


class SourceError(LilliputError):
    """A model folder or file that cannot be read as it is."""


class DataError(LilliputError):
    """Calibration or evaluation text that cannot serve."""


class PlanError(LilliputError):
    """A recipe that cannot be carried out on this model, for this output or in this budget."""


class BusyError(LilliputError):
    """Another run works on the same folder."""


class ToldError(LilliputError):
    """What ends this process of several, and the leading one says."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: ' Did you mean ...?' or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(names)}."
