"""Output of the commands: the result on standard output, all else on standard error, which may break without ending anything."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator

import click

from lowmem_pnn.errors import DiskError
from lowmem_pnn.reporting.streams import UnbreakableStream, drop


def open_standard_streams() -> None:
    """Open the standard descriptors that are closed, and let standard error fall silent where it cannot be written to.

    Else the next file that is opened would get the number of a standard stream, and what is printed would go into it.
    """
    # Standard output stays one that cannot be written to, in the worker too.
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
    if not isinstance(sys.stderr, UnbreakableStream):
        sys.stderr = UnbreakableStream(sys.stderr)


def print_result(text: str, kept: str = "give it a place that can be written") -> None:
    """Print a command's result.

    Args:
        text: result as text.
        kept: where the result is all the same, or what to do: the end of the message.

    Whoever read it may have left: then there is nobody to tell.

    Raises:
        DiskError: it cannot be written.
    """
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        click.echo(text)
    except BrokenPipeError:
        drop(sys.stdout)
    except (OSError, ValueError) as error:
        if sys.stdout is not None:
            drop(sys.stdout)
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise DiskError(f"cannot write the result to standard output: {reason}; {kept}") from error


@contextlib.contextmanager
def stdout_is_ours() -> Iterator[None]:
    """What a user's model or data set prints goes to standard error: standard output is the result's alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def announce(text: str) -> None:
    """Tell people on standard error what begins now, before anything that takes long is imported."""
    print(text, file=sys.stderr, flush=True)


def terminal_width() -> int | None:
    """Return the columns of the terminal that the result goes to; None where it goes elsewhere."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size((100, 24)).columns
