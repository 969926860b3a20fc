"""Errors that a user can mend. The command line prints their text, without a traceback, and exits with status 2."""


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
