"""Table files: rows of texts from CSV or Parquet, read twice: once to find out what columns are, once for their values."""

import csv
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lowmem_pnn.errors import ConfigError, DataError, LowMemError
from lowmem_pnn.sources.imports import one_line

TableKind = Literal["csv", "parquet"]

NAMELESS_INDEX = re.compile(r"__index_level_\d+__")
"""Names under which pandas stores an index without a name in Parquet."""

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
"""What numbers that are not known are written as, in any case."""

_DELIMITERS = ",;\t"
_MAY_PART_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
# A field may be as long as a text is.
csv.field_size_limit(1 << 24)


class TableFile:
    """File of a table with names of columns.

    Args:
        path: Path of the file.
        kind: `csv`, with commas, semicolons or tabs, whichever the header has most of; or `parquet`.

    Raises:
        DataError: There is no such file, it cannot be read, or it has no header.
        ConfigError: What reads Parquet is not installed.
    """

    def __init__(self, path: Path, kind: TableKind) -> None:
        self.path, self.kind = path, kind
        self.name, self.title, self.spec = str(path), path.stem, f"{kind}:{path}"
        """Names of the file in messages, of its data set, and as a command has it."""
        self.place = "line" if kind == "csv" else "row"
        """What a place in the file is called."""
        if not path.is_file():
            raise DataError(f"there is no file {path.absolute()}; give {kind}:FILE")
        self.decimal_comma = False
        self._delimiter = ","
        if kind == "csv":
            self.columns = self._read_header()
        else:
            self.columns = list(self._parquet().schema_arrow.names)
        twice = [name for name in self.columns if self.columns.count(name) > 1]
        if twice:
            raise DataError(f"{path} has two columns {twice[0]!r}; give each a name of its own")
        if not self.columns:
            raise DataError(f"{path} is empty; give a file with a line of names and lines of values")

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Return the rows as texts, each with its place in the file; numbers that Parquet does not know are empty.

        Raises:
            DataError: The file is damaged.
        """
        try:
            yield from self._csv_rows() if self.kind == "csv" else self._parquet_rows()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is no text in UTF-8 ({error.reason}, byte {error.start}); store it in UTF-8") from error
        except (OSError, csv.Error) as error:
            raise DataError(f"{self.path} cannot be read: {one_line(error)}; repair it") from error

    def number(self, text: str) -> float | None:
        """Return the number that a text is; None where it is none.

        Args:
            text: A field.
        """
        return number_of(text, self.decimal_comma)

    def _read_header(self) -> list[str]:
        for _, header in self.rows_of(None):
            names = [name.strip() for name in header]
            break
        else:
            raise DataError(f"{self.path} is empty; give a file with a line of names and lines of values")
        if all(self.number(name) is not None for name in names):
            raise DataError(
                f"{self.path}: line 1 holds numbers ({', '.join(names[:4])}), and should name the columns; add a line of names"
            )
        if "" in names:
            raise DataError(
                f"{self.path}: column {names.index('') + 1} has no name; give it one, or leave it out (pandas: to_csv(index=False))"
            )
        return names

    def rows_of(self, delimiter: str | None) -> Iterator[tuple[int, list[str]]]:
        """Return all lines of a CSV file, the header too.

        Args:
            delimiter: What stands between fields; None to take what the first line has most of.
        """
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as stream:
                if delimiter is None:
                    first = stream.readline()
                    bare = "".join(first.split('"')[::2])  # what stands in quotes separates nothing
                    self._delimiter = delimiter = max(_DELIMITERS, key=bare.count)
                    self.decimal_comma = delimiter != ","
                    stream.seek(0)
                reader = csv.reader(stream, delimiter=delimiter)
                for row in reader:
                    if row:
                        yield reader.line_num, row
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is no text in UTF-8 ({error.reason}, byte {error.start}); store it in UTF-8") from error
        except (OSError, csv.Error) as error:
            raise DataError(f"{self.path} cannot be read: {one_line(error)}; repair it") from error

    def _csv_rows(self) -> Iterator[tuple[int, list[str]]]:
        rows = self.rows_of(self._delimiter)
        next(rows)
        yield from rows

    def _parquet(self) -> Any:
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise ConfigError("parquet: needs pyarrow, which is not installed; run: pip install 'lowmem-pnn[parquet]'") from error
        try:
            return parquet.ParquetFile(self.path)
        # Of Arrow's many errors for a damaged file all but two are OSError or ValueError.
        except Exception as error:
            raise DataError(f"{self.path} cannot be read as Parquet: {one_line(error)}; repair it") from error

    def _parquet_rows(self) -> Iterator[tuple[int, list[str]]]:
        number = 0
        try:
            for batch in self._parquet().iter_batches(batch_size=4096):
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    texts = zip(values, self.columns, strict=True)
                    yield number, [field_text(value, self.name, name, number) for value, name in texts]
        except LowMemError:
            raise
        except Exception as error:
            raise DataError(f"{self.path} cannot be read as Parquet: {one_line(error)}; repair it") from error


class DecimalMarks:
    """Points and commas in the numbers of a file in which a comma may stand for the point, or part thousands."""

    def __init__(self) -> None:
        # By what a number has: the first of each column, with its row. Dots are points that may part thousands, as in 1.234.
        self._found: dict[str, dict[str, tuple[str, int]]] = {"point": {}, "comma": {}, "thousands": {}, "dots": {}}

    def note(self, column: str, text: str, row: int) -> None:
        """Look at a number.

        Args:
            column: Name of its column.
            text: The number.
            row: Place of its row.
        """
        if "," in text or "." in text:
            parts = _MAY_PART_THOUSANDS.fullmatch(text.replace(".", ",")) is not None
            kind = ("dots" if parts else "point") if "." in text else "thousands" if parts else "comma"
            self._found[kind].setdefault(column, (text, row))

    def doubtful(self, columns: Sequence[str], *, mixed_alone: bool) -> list[tuple[str, int]]:
        """Return numbers, with their rows, by which it is not clear what a comma is; none where it is clear.

        Args:
            columns: Columns that are numbers.
            mixed_alone: Whether commas before three digits each are in doubt only where other numbers have a point.
        """
        first = {kind: next((found[name] for name in columns if name in found), None) for kind, found in self._found.items()}
        thousands, comma, dots, point = first["thousands"], first["comma"], first["dots"], first["point"] or first["dots"]
        if thousands is not None and point is not None:
            return [thousands, point]
        # Beside 12,50 a number such as 1.234 may be one with its thousands parted.
        if comma is not None and dots is not None:
            return [comma, dots]
        return [thousands] if thousands is not None and comma is None and not mixed_alone else []


def field_text(value: Any, table: str, column: str, row: int) -> str:
    """Return a value of a table as text; empty where it is missing.

    Args:
        value: A number, a word, a truth value, or None.
        table: Name of the table in messages.
        column: Name of its column.
        row: Number of its row.

    Raises:
        DataError: It is several values, or bytes.

    Example:
        >>> field_text(0.5, "prices", "cost", 1), field_text(float("nan"), "prices", "cost", 2)
        ('0.5', '')
    """
    if isinstance(value, list | tuple | dict | set | bytes | np.ndarray):
        raise DataError(
            f"{table}: column {column!r} holds a {type(value).__name__} in row {row}; give numbers or words alone, or leave it out"
        )
    try:
        is_missing = value is None or bool(value != value)
    # pandas.NA is neither equal nor unequal to itself.
    except TypeError:
        is_missing = True
    return "" if is_missing else str(value)


def number_of(text: str, decimal_comma: bool = False) -> float | None:
    """Return the number that a text is; None where it is none.

    Args:
        text: The text.
        decimal_comma: Whether a comma may stand for the point.

    Example:
        >>> number_of(" 1.5 "), number_of("1,5", decimal_comma=True), number_of("1_000"), number_of("1,5")
        (1.5, 1.5, None, None)
    """
    text = text.strip()
    if decimal_comma and text.count(",") == 1:
        text = text.replace(",", ".")
    try:
        # Python also takes 1_000.
        return None if "_" in text else float(text)
    except ValueError:
        return None
