"""Documents: the texts of a source one after the other, with which parts of each are to be learnt."""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_pnn.errors import ConfigError, DataError, LowMemError
from lowmem_pnn.language.columns import NEXT_TOKENS, Kind, Wanted, json_type, without_nulls
from lowmem_pnn.sources.imports import one_line

_CHUNK_BYTES = 1 << 20
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Document:
    """A text, or a piece of one.

    Args:
        where: Its place, for messages.
        values: Its text; a prompt and its completion; a source and its target; the turns of a conversation and its tools; or a text and its
            class.
        is_begin: Whether the text begins here, of a text that comes in pieces.
        is_end: Whether it ends here.
    """

    where: str
    values: tuple[Any, ...]
    is_begin: bool = True
    is_end: bool = True


@dataclass(frozen=True)
class Documents:
    """Documents of one source.

    Args:
        name: Name of the source in messages.
        kind: What a document is.
        read: Reads them, from the first on.
        content: Hash of all that they hold.
        size: Bytes or rows of them, as `done` counts.
        done: How many of these were read by the reading that is under way.
        label: Column of their classes; None where they have none.
        classes: Names of classes whose numbers are their labels, where the source has such.
        unread: Columns that are not read; of lines, those of the first.
    """

    name: str
    kind: Kind
    read: Callable[[], Iterator[Document]]
    content: str
    size: int
    done: Callable[[], int]
    label: str | None = None
    classes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


class _Count:
    """How far a reading has come."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self) -> int:
        return self.value


def open_jsonl(path: Path, wanted: Wanted = NEXT_TOKENS) -> Documents:
    """Open a file with a JSON object on each line.

    Args:
        path: Path of the file; empty lines are left out.
        wanted: Columns that make documents.

    Raises:
        DataError: There is no such file, it is empty, or a line is not such an object.
    """
    name = f"jsonl:{path}"
    _require_file(path, name, "jsonl:FILE")
    count = _Count()
    rows = _json_rows(path, name, wanted, _Count())
    if (first := next(rows, None)) is None:
        raise DataError(f"{name} is empty; give a file with a JSON object on each line, with {wanted.words}")
    kind = wanted.kind_of(first[1], f"{name}, line {first[0]}")

    def read() -> Iterator[Document]:
        for number, row in _json_rows(path, name, wanted, count):
            where = f"{name}, line {number}"
            yield Document(where, wanted.values(row, kind, where))

    unread = wanted.unread(kind, first[1])
    return Documents(name, kind, read, _hash_of([path]), path.stat().st_size, count, _label(wanted, kind), unread=unread)


def open_texts(path: Path) -> Documents:
    """Open a file of text, or a folder of such files (`*.txt`, `*.md`), as one document a file.

    Args:
        path: Path of the file, or the folder, whose folders are looked into.

    Raises:
        DataError: There is no such file, it is empty, or no text in UTF-8.
    """
    name = f"text:{path}"
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
        if not files:
            raise DataError(f"{name} is a folder without *.txt or *.md; give one with such files, or one file")
    else:
        _require_file(path, name, "text:FILE or text:DIR")
        files = [path]
    size = sum(file.stat().st_size for file in files)
    if not size:
        raise DataError(f"{name} is empty; give text")
    count = _Count()

    def read() -> Iterator[Document]:
        count.value = 0
        for file in files:
            pieces = _pieces(file, count)
            piece, is_begin = next(pieces, ""), True
            while piece:
                following = next(pieces, "")
                yield Document(str(file), (piece,), is_begin, not following)
                piece, is_begin = following, False

    return Documents(name, "text", read, _hash_of(files), size, count)


def open_parquet(path: Path, wanted: Wanted = NEXT_TOKENS) -> Documents:
    """Open the texts of a Parquet file, which are read some rows at a time.

    Args:
        path: Path of the file.
        wanted: Columns that make documents.

    Raises:
        DataError: There is no such file, it is empty or damaged, or has no columns of text.
        ConfigError: What reads Parquet is not installed.
    """
    name = f"parquet:{path}"
    _require_file(path, name, "parquet:FILE")
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError("parquet: needs pyarrow, which is not installed; run: pip install 'lowmem-pnn[parquet]'") from error

    def rows() -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            if kind is None:
                yield dict.fromkeys(file.schema_arrow.names), file.metadata.num_rows
                return
            columns = list(wanted.read(kind, file.schema_arrow.names))
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()

    kind: Kind | None = None
    (names, size), *_ = _unless_damaged(rows(), name)
    kind = wanted.kind_of(names, name)
    documents = _of_rows(name, wanted, kind, lambda: _unless_damaged(rows(), name), _hash_of([path]), size)
    return replace(documents, unread=wanted.unread(kind, names))


def open_rows(rows: Any, name: str, wanted: Wanted = NEXT_TOKENS) -> Documents:
    """Open the texts of a data set of Hugging Face's library.

    Args:
        rows: The data set, one part.
        name: Its name in messages.
        wanted: Columns that make documents.

    Raises:
        DataError: It is empty, or has no columns of text.
    """
    kind = wanted.kind_of(dict.fromkeys(rows.features), name)
    # Of a column that is not read an image would be decoded.
    columns = wanted.read(kind, rows.features)
    read_rows = rows.select_columns(list(columns))

    def read() -> Iterator[Any]:
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            found = read_rows[begin : begin + _ROWS_AT_ONCE]
            yield from (dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True))

    digest = hashlib.sha256(f"{len(rows)} {list(rows.features)}".encode())
    for row in read():
        digest.update(json.dumps([row[column] for column in columns], default=str).encode())
    documents = _of_rows(name, wanted, kind, lambda: _unless_damaged(read(), name), digest.hexdigest(), len(rows))
    classes = getattr(rows.features[wanted.label], "names", None) if kind == "labelled" else None
    return replace(documents, classes=tuple(classes or ()), unread=wanted.unread(kind, rows.features))


def _of_rows(name: str, wanted: Wanted, kind: Kind, rows: Callable[[], Iterator[Any]], content: str, size: int) -> Documents:
    if not size:
        raise DataError(f"{name} is empty: it has 0 rows; give at least 1")
    count = _Count()

    def read() -> Iterator[Document]:
        count.value = 0
        for row in rows():
            count.value += 1
            where = f"{name}, row {count.value}"
            if kind == "chat":
                row = {column: without_nulls(value) for column, value in row.items()}
            yield Document(where, wanted.values(row, kind, where))

    return Documents(name, kind, read, content, size, count, _label(wanted, kind))


def _label(wanted: Wanted, kind: Kind) -> str | None:
    return wanted.label if kind == "labelled" else None


def _unless_damaged(rows: Iterator[Any], name: str) -> Iterator[Any]:
    try:
        yield from rows
    except (LowMemError, MemoryError):
        raise
    # Arrow has many errors for damaged files.
    except Exception as error:
        raise DataError(f"{name} cannot be read: {one_line(error)}; repair it") from error


def _require_file(path: Path, name: str, form: str) -> None:
    if path.is_file():
        return
    if path.exists():
        raise DataError(f"{name} is {'a folder' if path.is_dir() else 'no regular file'}; give {form}")
    raise DataError(f"there is no file {path.absolute()}; give {form}")


def _json_rows(path: Path, name: str, wanted: Wanted, count: _Count) -> Iterator[tuple[int, Any]]:
    count.value = 0
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                count.value += len(line)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
                    raise DataError(
                        f"{name}, line {number} is {reason}: {_text_of(error)}; give an object on each line"
                    ) from error
                if not isinstance(row, dict):
                    raise DataError(
                        f"{name}, line {number} is a {json_type(row)}; give an object on each line, with {wanted.words}"
                    )
                yield number, row
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}; give jsonl:FILE") from error


def _text_of(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return f"byte {error.start + 1}" if isinstance(error, UnicodeDecodeError) else one_line(error)


def _pieces(file: Path, count: _Count) -> Iterator[str]:
    """Yield the text of a file in pieces of about a megabyte, cut after a line's end that no white space follows.

    Most tokenizers divide text there too, so that pieces have the tokens of the whole; those that put a space before every text (of
    SentencePiece: T5, the first Llamas) begin each piece with one token more. Text of 4 MB without such a place is cut before a space.
    """
    rest = ""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                rest += chunk
                count.value += len(chunk)
                end = _last_cut(rest)
                if not end and len(rest) >= 4 * _CHUNK_BYTES:
                    end = max(rest.rfind(" "), 0) or len(rest)
                if end:
                    yield rest[:end]
                    rest = rest[end:]
    except UnicodeDecodeError as error:
        raise DataError(
            f"text {str(file)!r} is not in UTF-8 ({error.reason}); store it in UTF-8, or give --tokenizer bytes"
        ) from error
    except OSError as error:
        raise DataError(f"text {str(file)!r} cannot be read: {error.strerror or error}; give text:FILE or text:DIR") from error
    if rest:
        yield rest


def _last_cut(text: str) -> int:
    end = text.rfind("\n", 0, len(text) - 1)
    while end > 0:
        if not text[end + 1].isspace():
            return end + 1
        end = text.rfind("\n", 0, end)
    return 0


def _hash_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(f"{file.name} {file.stat().st_size} ".encode())
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}; see to its permissions") from error
    return digest.hexdigest()
