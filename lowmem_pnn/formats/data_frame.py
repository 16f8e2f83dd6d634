"""Data frames: tables in memory, of pandas or whoever has the same, read as a table file is; and pairs of one and its targets."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

from lowmem_pnn.errors import DataError
from lowmem_pnn.formats.table_file import field_text, number_of
from lowmem_pnn.sources.arrays import as_tensor
from lowmem_pnn.sources.given import is_array

_TARGET = "target"


class DataFrame:
    """Table in memory, with the interface of a `TableFile`.

    Args:
        frame: Data frame of pandas, or any object with its `columns` and `itertuples`.
        name: Name of the table in messages.
        targets: Targets (N,) or (N, T) that stand beside the frame: an array, a table or a list; None where columns of the frame are
            the targets.
        target_names: Names of these targets; None to take their own, or else `target`.

    Raises:
        DataError: Two columns have one name, or there are no columns, or another number of targets than rows.
    """

    place, spec = "row", "from Python"
    decimal_comma = False

    def __init__(self, frame: Any, name: str, targets: Any = None, target_names: Sequence[str] | None = None) -> None:
        self.name, self.title = name, name.partition(" ")[0]
        self._frame, self._targets = frame, None if targets is None else _target_columns(targets, name)
        own = list(map(str, frame.columns))
        self.target_names: tuple[str, ...] = ()
        """Names of the targets that stand beside the frame."""
        if self._targets is not None:
            self.target_names = tuple(target_names or _names_of(targets, len(self._targets), own))
            if len(self.target_names) != len(self._targets):
                raise DataError(
                    f"{name} has {len(self._targets)} targets a row, and the training data {len(self.target_names)}; give data of one form"
                )
            if any(len(column) != len(frame) for column in self._targets):
                raise DataError(f"{name} has {len(frame):,} rows and {len(self._targets[0]):,} targets; give one for each row")
        self.columns = [*own, *self.target_names]
        twice = [column for column in self.columns if self.columns.count(column) > 1]
        if twice:
            raise DataError(f"{name} has two columns {twice[0]!r}; give each a name of its own")
        if not own:
            raise DataError(f"{name} has no columns; give a table with at least one")

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Return the rows as texts, each with its number from 0; missing values are empty.

        Raises:
            DataError: A value is neither number nor word.
        """
        targets = zip(*self._targets, strict=True) if self._targets is not None else repeat(())
        for number, (values, own) in enumerate(zip(self._frame.itertuples(index=False, name=None), targets, strict=False)):
            texts = zip((*values, *own), self.columns, strict=True)
            yield number, [field_text(value, self.name, name, number) for value, name in texts]

    def number(self, text: str) -> float | None:
        """Return the number that a text is; None where it is none."""
        return number_of(text)


def is_frame(value: Any) -> bool:
    """Decide whether a value is a data frame."""
    return all(hasattr(value, name) for name in ("columns", "dtypes", "itertuples"))


def as_frame(data: Any, name: str, target_names: Sequence[str] | None = None) -> DataFrame | None:
    """Return data from Python as a table, where it is a data frame, or a pair of one and its targets of which some are no numbers.

    Args:
        data: What was given.
        name: Name of the data in messages.
        target_names: What the targets of the training data are called, where that is a table; then any pair with a frame is one too.

    Returns:
        The table; None of data of another kind, and of pairs of numbers alone.

    Raises:
        DataError: Frame and targets do not fit together.
    """
    if is_frame(data):
        return DataFrame(data, name)
    if not (
        isinstance(data, tuple) and len(data) == 2 and is_frame(data[0]) and (is_array(data[1]) or isinstance(data[1], list))
    ):
        return None
    frame, targets = data
    if target_names is None and _is_numbers(frame) and _is_numbers(targets):
        return None
    return DataFrame(frame, name, targets, target_names)


def _is_numbers(values: Any) -> bool:
    """Whether values are numbers, none of them missing in a way that only tables know."""
    try:
        as_tensor(values, "")
    except DataError:
        return False
    return True


def _target_columns(targets: Any, name: str) -> list[Any]:
    """Return targets, column by column."""
    if is_frame(targets):
        return [targets.iloc[:, place] for place in range(len(targets.columns))]
    if getattr(targets, "ndim", 1) == 1:
        return [targets]
    if targets.ndim == 2:
        return list(targets.T)
    raise DataError(f"{name} has targets of shape {tuple(targets.shape)} beside a table; give (N,) or (N, T)")


def _names_of(targets: Any, count: int, taken: Sequence[str]) -> list[str]:
    """Return names for targets: their own where these are not taken."""
    if is_frame(targets):
        names = list(map(str, targets.columns))
    elif getattr(targets, "name", None) is not None:
        names = [str(targets.name)]
    else:
        names = [_TARGET] if count == 1 else [f"{_TARGET} {number}" for number in range(1, count + 1)]
    return [name if name not in taken else f"{_TARGET} {name}" for name in names]
