"""Errors that a user can cause or must act on, each with its exit code.

Every message says what was asked, what was found (with its unit), where, and what to do, on one line.
The library raises these; the command line turns them into an exit code in one place.
A fault of ours is an `AssertionError` or whatever Python raises, never one of these.
"""


class LowMemError(Exception):
    """Base of every error that lowmem-pnn raises on purpose."""

    exit_code = 1


class ConfigError(LowMemError, ValueError):
    """An option, a model or a data set that cannot be used as given.

    Args:
        message: what cannot be used, why, and what to do.
        options: names of the options whose values are at fault, each by itself.
    """

    exit_code = 3

    def __init__(self, message: str, options: frozenset[str] = frozenset()) -> None:
        super().__init__(message)
        self.options = options


class UnitError(ConfigError):
    """A text that is not a size."""


class CaptureError(ConfigError):
    """A model that cannot be cut into layers."""


class DataError(ConfigError):
    """A data set that is missing, empty, or holds values that cannot be trained on."""


class BudgetError(LowMemError):
    """What was asked for does not fit in the memory budget.

    Args:
        message: why, and what would help.
        enough_bytes: the smallest budget that would do, where it is known.
    """

    exit_code = 4

    def __init__(self, message: str, enough_bytes: int | None = None) -> None:
        super().__init__(message)
        self.enough_bytes = enough_bytes


class DiskError(LowMemError):
    """The disk is full, not writable, or above the bound that was given."""

    exit_code = 5


class CheckpointError(LowMemError):
    """A run directory or a file in it that is damaged, or belongs to another run."""

    exit_code = 6


class DivergedError(LowMemError):
    """The loss became NaN or infinite."""

    exit_code = 7


class BusyError(LowMemError):
    """Another process works in the run directory, or another thread of this process has a run."""

    exit_code = 8


class Stopped(LowMemError):
    """The run was asked to stop (Ctrl-C, SIGTERM, or a terminal that was closed), committed its work, and can be resumed."""

    exit_code = 75
