"""Relief: what gives memory back when a large block cannot be had, before that counts as out of memory."""

from collections.abc import Callable

Give = Callable[[], int]
"""Gives back memory that nobody uses, and returns how many bytes."""

# The last one is that of the device which was opened last: a run inside of another one has its own.
_GIVERS: list[Give] = []


def add_relief(give: Give) -> None:
    """Have memory given back where a large block cannot be had.

    Args:
        give: called by whatever thread asks for the block.
    """
    _GIVERS.append(give)


def remove_relief(give: Give) -> None:
    """Undo `add_relief`; a function that was not added is no error.

    Args:
        give: the function.
    """
    if give in _GIVERS:
        _GIVERS.remove(give)


def relieve() -> bool:
    """Give memory back, and return whether there was any."""
    return bool(_GIVERS) and _GIVERS[-1]() > 0
