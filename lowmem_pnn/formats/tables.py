"""Tables as data: numbers as they are, words one-hot, and a column, or several, that are to be predicted.

age,city,price                          x: [34, 1, 0]   y: 12.5      (--target price: numbers with a point: regression)
34,Bern,12.5           ->                  [27, 0, 1]      11.0
27,Riga,11.0                                    Bern, Riga
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.formats.data_frame import DataFrame
from lowmem_pnn.formats.table_file import MISSING, NAMELESS_INDEX, DecimalMarks, TableFile
from lowmem_pnn.sources.dataset import Dataset, join_parts
from lowmem_pnn.sources.imports import did_you_mean, listed
from lowmem_pnn.sources.map_split import from_arrays
from lowmem_pnn.sources.preprocessing import InputForm
from lowmem_pnn.sources.targets import TargetOptions

# Different words of a column, beyond which it is rather a text or a name than a category.
_MOST_WORDS = 100
# Different whole numbers of a target, beyond which they may be values as well as classes.
_MOST_WHOLE_CLASSES = 100
_MOST_CLASSES = 10_000
# Names of columns that a message holds.
_MOST_NAMES = 12
_LARGEST = float(np.finfo(np.float32).max)
# Steps of float32 in the range of a column, below which it is said that values are rounded.
_FEWEST_STEPS = 1000


@dataclass(frozen=True)
class TableSchema:
    """What the columns of a table are: other files of the same data are read by it.

    Args:
        columns: Words of each column that samples are made of, in order, one place in a sample for each; None for a column of numbers.
        targets: Names of the columns that are to be predicted.
        classes: Texts of the classes, in the order of their numbers; empty where targets are numbers.
    """

    columns: Mapping[str, tuple[str, ...] | None]
    targets: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def numbers(self) -> list[int]:
        """Places in a sample of columns of numbers."""
        places, place = [], 0
        for words in self.columns.values():
            if words is None:
                places.append(place)
            place += 1 if words is None else len(words)
        return places

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps from the file to samples, in words."""
        names = [name for name, words in self.columns.items() if words is None]
        one_hot = [f"{name} ({len(words)})" for name, words in self.columns.items() if words is not None]
        steps = [f"numbers of columns {listed(names, _MOST_NAMES)}"] if names else []
        return (*steps, *([f"one-hot words of columns {listed(one_hot, _MOST_NAMES)}"] if one_hot else []))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        columns = {name: None if words is None else list(words) for name, words in self.columns.items()}
        return {"columns": columns, "targets": list(self.targets), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TableSchema":
        """Read what `to_dict` made.

        Args:
            values: The dictionary.
        """
        columns = {name: None if words is None else tuple(words) for name, words in values["columns"].items()}
        return cls(columns, tuple(values["targets"]), tuple(values["classes"]))


def open_table(
    file: TableFile | DataFrame,
    targets: Sequence[str] | None,
    input_form: InputForm,
    options: TargetOptions,
    *,
    skip_broken: bool = False,
    schema: TableSchema | None = None,
    may_lack: Literal["nothing", "columns", "values"] = "nothing",
) -> Dataset:
    """Open a table as data of one part.

    Args:
        file: File of the table, or a data frame.
        targets: Names of the columns that are to be predicted; None where nobody says.
        input_form: Form of the samples that the model takes.
        options: What is known of the targets.
        skip_broken: Leave out rows that cannot be used, instead of raising.
        schema: What columns are in the training data; None for the training data itself.
        may_lack: Whether a table without the columns of targets is taken, with class 0 for each row and no targets in its
            `preparation`; `values`: also one in which a target is missing, or is no class of the training data.

    Raises:
        ConfigError: The target is not said, or there is no such column.
        DataError: The table cannot be read, or a value cannot be used.
    """
    if isinstance(file, DataFrame) and schema is None:
        targets = file.target_names or targets
    if schema is None and targets is None:
        raise ConfigError(f"data {file.spec} needs --target COLUMN; its columns are {listed(file.columns, _MOST_NAMES)}")
    notes: tuple[str, ...] = ()
    if schema is not None and may_lack != "nothing":
        is_there = any(name in file.columns for name in schema.targets)
        if is_there and may_lack == "values" and (reason := _unknown_target(file, schema)) is not None:
            notes = (f"targets of {file.name} are left aside: {reason}",)
        if notes or not is_there:
            schema, options = dataclasses.replace(schema, targets=(), classes=()), TargetOptions()
    wanted = schema.targets if schema is not None else tuple(targets or ())
    for name in (*wanted, *(schema.columns if schema is not None else ())):
        if name not in file.columns:
            raise ConfigError(f"{file.name} has no column {name!r}{did_you_mean(name, file.columns)}")
    # An index without a name, which pandas stores with its rows, says nothing of them; a run that has learnt from one is given it.
    named = (name for name in file.columns if name not in wanted and not NAMELESS_INDEX.fullmatch(name))
    inputs = list(named if schema is None else schema.columns)
    if not inputs:
        raise ConfigError(f"{file.name}: all of its columns are targets; leave one out of --target")
    survey = _Survey(file, inputs, wanted, schema)
    broken = survey.look(skip_broken)
    if schema is None:
        schema = TableSchema(
            {name: survey.words_of(name) for name in inputs},
            wanted,
            survey.classes(options.task if options.task != "own" else "auto"),
        )
        if schema.classes and options.ignored is not None:
            raise ConfigError(
                f"--ignore-index {options.ignored} has no meaning for a table, whose classes get numbers of their own; leave the option out, "
                "and the rows that are not to be learnt"
            )
        notes = survey.rounded()
    x, y, places = _read(file, schema, broken, survey.num_rows - len(broken), skip_broken)
    if options.task == "auto" and len(schema.targets) == 1:
        options = dataclasses.replace(options, task="classification" if schema.classes else "regression")
    split = from_arrays(x, y, num_classes=len(schema.classes) or None, input_form=input_form, where=file.name, options=options)
    split.places = places
    dataset = join_parts(
        file.title,
        split,
        None,
        first_steps=schema.steps,
        skipped={f"{file.place} {number} of {file.name}": reason for number, reason in broken.items()},
        classes=schema.classes,
    )
    return dataclasses.replace(dataset, preparation=schema.to_dict(), notes=notes)


def _unknown_target(file: TableFile | DataFrame, schema: TableSchema) -> str | None:
    """Return in words which row has a target that is missing, or no class of the training data; None where there is none."""
    places = {name: file.columns.index(name) for name in schema.targets if name in file.columns}
    classes = frozenset(schema.classes)
    for number, row in file.rows():
        for name, place in places.items():
            text = row[place].strip() if place < len(row) else None
            if text is None:
                continue
            is_known = text in classes if classes else text.lower() not in MISSING and file.number(text) is not None
            if not is_known:
                what = f"holds {text!r}, which the training data has not," if text and classes else "has no value"
                return f"{file.place} {number} {what} in column {name!r}"
    return None


class _Survey:
    """First reading of a table: which columns are numbers, which words there are, and what is missing.

    Args:
        file: The table.
        inputs: Names of the columns that samples are made of.
        targets: Names of the columns that are to be predicted.
        schema: What columns are in the training data; None for the training data itself.
    """

    def __init__(
        self, file: TableFile | DataFrame, inputs: Sequence[str], targets: Sequence[str], schema: TableSchema | None
    ) -> None:
        self._file, self._targets, self._schema = file, targets, schema
        self._places = {name: file.columns.index(name) for name in (*inputs, *targets)}
        # Texts of each column, with the places where they come first; and the first that is no number.
        self._words: dict[str, dict[str, int]] = {name: {} for name in self._places}
        self._first_words: dict[str, tuple[str, int]] = {}
        self._is_number = dict.fromkeys(self._places, True)
        self._is_whole = dict.fromkeys(targets, True)
        self._marks = DecimalMarks() if file.decimal_comma else None
        # Lowest and highest number of each column.
        self._ranges: dict[str, tuple[float, float]] = {}
        self.num_rows = 0

    def look(self, skip_broken: bool) -> dict[int, str]:
        """Read the file once.

        Args:
            skip_broken: Whether to return rows that cannot be used, instead of raising.

        Returns:
            What is wrong with them, by their places.
        """
        broken: dict[int, str] = {}
        missing: list[tuple[int, str, str]] = []
        for number, row in self._file.rows():
            self.num_rows += 1
            if len(row) != len(self._file.columns):
                broken[number] = f"has {len(row)} fields, and the first line {len(self._file.columns)}"
                continue
            for name, place in self._places.items():
                text = row[place].strip()
                if text.lower() in MISSING:
                    missing.append((number, name, text))
                else:
                    self._note(name, text, number)
        if not self.num_rows:
            raise DataError(f"{self._file.name} holds 0 rows; give at least 1")
        columns = [name for name in self._places if self._holds_numbers(name)]
        if self._marks and (doubtful := self._marks.doubtful(columns, mixed_alone=self._schema is not None)):
            holds = " and ".join(f"{text!r} ({self._file.place} {number})" for text, number in doubtful)
            raise DataError(
                f"{self._file.name} holds {holds}: whether a comma stands for the point, or parts thousands, is not clear; write numbers with a "
                "point, and without commas"
            )
        for number, name, text in missing:
            # What stands for no number is a word in a column of words.
            if self._holds_numbers(name) or not text:
                broken.setdefault(number, f"has no value in column {name!r}")
            else:
                self._words[name].setdefault(text, number)
        if len(broken) == self.num_rows:
            raise DataError(
                f"{self._file.name}: no row can be used, such as {self._file.place} {min(broken)}, which {broken[min(broken)]}"
            )
        if broken and not skip_broken:
            first = min(broken)
            raise DataError(
                f"{self._file.name}: {self._file.place} {first} {broken[first]}; {len(broken):,} of {self.num_rows:,} rows cannot be used; "
                "fill them in, or leave them out (--skip-broken)"
            )
        return dict(sorted(broken.items()))

    def rounded(self) -> tuple[str, ...]:
        """Return a line for each column of numbers that float32 keeps too coarsely for its range, such as times in seconds since 1970."""
        notes = []
        for name, (low, high) in self._ranges.items():
            step = math.ulp(max(abs(low), abs(high))) * 2.0**29  # of float64, which has 29 bits more
            is_exact = step <= 1 and low.is_integer() and high.is_integer()
            if name not in self._targets and self._is_number[name] and not is_exact and 0 < high - low < _FEWEST_STEPS * step:
                notes.append(
                    f"column {name!r} of {self._file.name} goes from {low:.15g} to {high:.15g}, and float32 keeps it in steps of {step:g}; "
                    "subtract the lowest to keep it exactly"
                )
        return tuple(notes)

    def _holds_numbers(self, name: str) -> bool:
        """Return whether a column is of numbers, in the training data where that is known."""
        if self._schema is None:
            return self._is_number[name]
        if name in self._schema.columns:
            return self._schema.columns[name] is None
        return all(self._file.number(text) is not None for text in self._schema.classes)

    def _note(self, name: str, text: str, number: int) -> None:
        value = self._file.number(text) if self._is_number[name] else None
        if value is None:
            if self._is_number[name]:
                self._first_words[name] = text, number
            self._is_number[name] = False
        else:
            low, high = self._ranges.get(name, (value, value))
            self._ranges[name] = min(low, value), max(high, value)
            if self._marks is not None:
                self._marks.note(name, text, number)
            if name in self._is_whole and not text.lstrip("+-").isdigit():
                self._is_whole[name] = False
        # Of a column of numbers, which nobody asks for all of them, no more than a column of words may have.
        if len(self._words[name]) <= (_MOST_CLASSES if name in self._targets else _MOST_WORDS):
            self._words[name].setdefault(text, number)

    def words_of(self, name: str) -> tuple[str, ...] | None:
        """Return the words of a column, sorted; None of a column of numbers.

        Raises:
            DataError: There are so many that they are no categories.
        """
        if self._is_number[name]:
            return None
        words = sorted(self._words[name])
        if len(words) > _MOST_WORDS:
            text, number = self._first_words.get(name, (words[0], self._words[name][words[0]]))
            raise DataError(
                f"{self._file.name}: column {name!r} holds more than {_MOST_WORDS} different values, and words, such as {text!r} in "
                f"{self._file.place} {number}: it is neither numbers nor a category; mend it, or leave the column out"
            )
        return tuple(words)

    def classes(self, task: str) -> tuple[str, ...]:
        """Return the texts of the classes that the target has; empty where targets are numbers.

        Args:
            task: The task that is asked for.

        Raises:
            DataError: Several columns of words are to be predicted, or it is not clear what whole numbers are.
        """
        words = [name for name in self._targets if not self._is_number[name]]
        if len(self._targets) > 1:
            if words:
                raise DataError(
                    f"{self._file.name}: of several target columns each is numbers, and {words[0]!r} holds words, such as "
                    f"{next(iter(self._words[words[0]]))!r}; give one column of words, or 0 and 1"
                )
            return ()
        (name,) = self._targets
        if words and task in ("regression", "multilabel"):
            raise DataError(
                f"{self._file.name}: --task {task} needs numbers, and column {name!r} holds {next(iter(self._words[name]))!r}"
            )
        if not words and (task in ("regression", "multilabel") or (task == "auto" and not self._is_whole[name])):
            return ()
        texts = sorted(self._words[name], key=(lambda text: self._file.number(text) or 0.0) if not words else str)
        if len(texts) > _MOST_CLASSES:
            raise DataError(
                f"{self._file.name}: column {name!r} holds more than {_MOST_CLASSES:,} different classes; give another --target"
            )
        if not words and task == "auto" and len(texts) > _MOST_WHOLE_CLASSES:
            raise DataError(
                f"{self._file.name}: column {name!r} holds {len(texts):,} different whole numbers, which may be values or classes; say which: "
                "--task regression or --task classification"
            )
        return tuple(texts)


def _read(
    file: TableFile | DataFrame, schema: TableSchema, broken: dict[int, str], num_rows: int, skip_broken: bool
) -> tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.int64]]:
    """Read the values of a table: samples (N, F) float32, targets, and the places of the rows (N,) among all."""
    width = sum(1 if words is None else len(words) for words in schema.columns.values())
    x = np.zeros((num_rows, width), dtype=np.float32)
    y = np.zeros((num_rows, len(schema.targets)), dtype=np.int64 if schema.classes else np.float64)
    places = {name: file.columns.index(name) for name in (*schema.columns, *schema.targets)}
    codes = {name: {word: code for code, word in enumerate(words)} for name, words in schema.columns.items() if words is not None}
    numbers = {text: code for code, text in enumerate(schema.classes)}
    kept, kept_places = 0, np.zeros(num_rows, dtype=np.int64)
    for row_place, (number, row) in enumerate(file.rows()):
        if number in broken:
            continue

        def fail(name: str, found: str, why: str, number: int = number) -> None:
            reason = f"holds {found!r} in column {name!r}, {why}"
            if not skip_broken:
                raise DataError(f"{file.name}: {file.place} {number} {reason}; mend it, or leave the row out (--skip-broken)")
            broken[number] = reason

        place = 0
        for name, words in schema.columns.items():
            text = row[places[name]].strip()
            if words is None:
                value = file.number(text)
                if value is None or not abs(value) <= _LARGEST:
                    fail(name, text, "and no number" if value is None else "which is too large")
                    break
                x[kept, place] = value
                place += 1
            else:
                code = codes[name].get(text)
                if code is None:
                    fail(name, text, "which the training data has not")
                    break
                x[kept, place : place + len(words)] = 0
                x[kept, place + code] = 1
                place += len(words)
        else:
            for column, name in enumerate(schema.targets):
                text = row[places[name]].strip()
                found = numbers.get(text) if schema.classes else file.number(text)
                if found is None or not abs(found) <= _LARGEST:
                    fail(name, text, "a class that the training data has not" if schema.classes else "and no number")
                    break
                y[kept, column] = found
            else:
                kept_places[kept] = row_place
                kept += 1
    if not kept:
        raise DataError(f"{file.name}: no row can be used, such as {file.place} {min(broken)}, which {broken[min(broken)]}")
    samples, values = torch.from_numpy(x[:kept]), torch.from_numpy(y[:kept])
    if not schema.targets:
        return samples, torch.zeros(kept, dtype=torch.int64), kept_places[:kept]
    return samples, values[:, 0] if len(schema.targets) == 1 else values, kept_places[:kept]
