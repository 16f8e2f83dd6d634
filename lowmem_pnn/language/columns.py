"""Columns of rows that hold text: which of them make a document, by what the model is to learn."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowmem_pnn.errors import DataError

Kind = Literal["text", "completion", "chat", "pair", "labelled"]
Columns = tuple[str, ...]

COLUMNS: dict[Kind, Columns] = {
    "chat": ("messages",), "completion": ("prompt", "completion"), "text": ("text",), "pair": ("source", "target"), "labelled": ("text",),
}  # fmt: skip
"""Columns that make a document, by its kind; one with a label has its column, whatever that is called, too."""

# Columns beside `messages` that templates may ask for too, and those that are given to none here.
_TOOLS, _NOT_GIVEN = "tools", ("functions", "documents", "chat_template_kwargs")

# Column of a second text, beside that of the first.
_SECOND = "text_pair"

_ORDER: tuple[Kind, ...] = ("labelled", "text", "pair", "completion", "chat")


@dataclass(frozen=True)
class Wanted:
    """What is wanted of the rows of a source.

    Args:
        kinds: Kinds of documents that do; the first one whose columns are there is taken.
        label: Column of the classes of `labelled` documents.
    """

    kinds: tuple[Kind, ...]
    label: str = "label"

    def columns(self, kind: Kind) -> Columns:
        """Return the columns that make a document of a kind.

        Args:
            kind: The kind.
        """
        return (*COLUMNS[kind], self.label) if kind == "labelled" else COLUMNS[kind]

    def read(self, kind: Kind, there: Collection[str]) -> Columns:
        """Return the columns of a source that are read: those that make a document, and what a template may ask for beside them.

        Args:
            kind: Kind of the documents.
            there: Columns that there are.
        """
        beside = (_TOOLS, *_NOT_GIVEN) if kind == "chat" else ()
        return (*self.columns(kind), *(column for column in beside if column in there))

    def unread(self, kind: Kind, there: Collection[str]) -> Columns:
        """Return the columns of a source that are not read; arguments as for `read`."""
        read = self.read(kind, there)
        return tuple(column for column in there if column not in read)

    @property
    def words(self) -> str:
        """The columns that do, in words."""
        *first, last = [" and ".join(self.columns(kind)) for kind in _ORDER if kind in self.kinds]
        return f"{', '.join(first)}, or {last}" if first else last

    def kind_of(self, row: Any, where: str) -> Kind:
        """Return the kind of the documents of a source.

        Args:
            row: Its first row, by column.
            where: Its place, for messages.

        Raises:
            DataError: It has columns of none.
        """
        for kind in self.kinds:
            if all(column in row for column in self.columns(kind)):
                _check_second(row, kind, where)
                return kind
        there = ", ".join(map(repr, row)) or "none"
        lacking = ""
        for kind in self.kinds:
            missing = [column for column in self.columns(kind) if column not in row]
            if len(missing) < len(self.columns(kind)):
                lacking = f", and lacks {missing[0]!r}"
                break
        remedy = "name them so" if "labelled" not in self.kinds else "name them so, or give --target COLUMN"
        raise DataError(f"{where} has the columns {there}{lacking}; text is taken from {self.words}: {remedy}")

    def values(self, row: Any, kind: Kind, where: str) -> tuple[Any, ...]:
        """Return what a row has in the columns of a document; behind the turns of a conversation the tools that it may call, or None.

        Args:
            row: The row, by column.
            kind: Kind of the document.
            where: Its place, for messages.

        Raises:
            DataError: A column is missing, or holds something else than it is to.
        """
        _check_second(row, kind, where)
        values = []
        for column in self.columns(kind):
            if column not in row:
                raise DataError(
                    f"{where} has no {column!r}; it has {', '.join(map(repr, row)) or 'nothing'}; give all lines the same columns"
                )
            value = row[column]
            if kind == "chat":
                _check_messages(value, where)
                # A template that asks whether a turn has a key means one with a value.
                value = [{key: one for key, one in turn.items() if one is not None or key == "content"} for turn in value]
            elif kind == "labelled" and column == self.label and column not in COLUMNS[kind]:
                _check_label(value, column, where)
            elif not isinstance(value, str):
                raise DataError(f"{where}: {column!r} is a {json_type(value)}; give text")
            values.append(value)
        if kind == "chat":
            values.append(_tools(row, where))
        return tuple(values)


NEXT_TOKENS = Wanted(("chat", "completion", "text"))
"""What a model learns that goes on with text."""
SEQUENCES = Wanted(("pair", "completion"))
"""What a model learns that reads one text and writes another."""


def json_type(value: Any) -> str:
    """Return what JSON calls a value that is none of the wanted type.

    Args:
        value: The value.
    """
    return {list: "list", str: "text", bool: "truth value", int: "number", float: "number"}.get(type(value), "null")


def _check_messages(value: Any, where: str) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: 'messages' is {'empty' if value == [] else f'a {json_type(value)}'}; give a list of turns")
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise DataError(f"{where}: a turn of 'messages' has no 'role' or no 'content'; give both for each turn")


def without_nulls(value: Any) -> Any:
    """Return a row of a table without keys that have no value, at any depth: a column gives each of its objects the keys of all of them.

    Args:
        value: The row, or what is in it.

    Example:
        >>> without_nulls([{"role": "user", "content": None, "tool_calls": None}])
        [{'role': 'user', 'content': None}]
    """
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None or key == "content"}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _tools(row: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the tools that a conversation may call; None where it has none."""
    for column in _NOT_GIVEN:
        if row.get(column):
            raise DataError(f"{where} has {column!r} beside 'messages', which no template is given here; leave that column out")
    tools = row.get(_TOOLS)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            tools = ""
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or ()):
        raise DataError(f"{where}: 'tools' is no list of objects; give the JSON schema of each tool")
    return tools or None


def _check_second(row: Any, kind: Kind, where: str) -> None:
    """Refuse a second text, which would not be read: any line of a file may be the first that has one."""
    if kind == "labelled" and _SECOND in row:
        raise DataError(
            f"{where} has {_SECOND!r} beside 'text', and of each row one text is read; join the two, or leave that column out"
        )


def _check_label(value: Any, column: str, where: str) -> None:
    if isinstance(value, str) and value:
        return
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31:
        return
    found = "empty" if value == "" else f"{value}" if isinstance(value, int | float) else f"a {json_type(value)}"
    raise DataError(f"{where}: {column!r} is {found}; give the name of a class, or its number from 0")
