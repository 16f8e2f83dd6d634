"""Token cache: the tokens of a source in files that are mapped, made once, and again when they are damaged or of something else.

A folder holds `tokens.bin`, the tokens of all documents one after the other in the shortest type that holds them; `counted.bin`, a byte
for each that says whether it is learnt, where not all are; `pieces.bin` and `rows.bin` (`packing`); `labels.bin`, a number for the class
of each row, where there are classes; and `cache.json`, which says what they were made of and has their hashes. It is written beside its
place and renamed.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowmem_pnn.errors import DataError, DiskError
from lowmem_pnn.language.chat import ChatTemplate
from lowmem_pnn.language.documents import Document, Documents
from lowmem_pnn.language.packing import Form, Layout
from lowmem_pnn.language.progress import Ticker, tell
from lowmem_pnn.language.tokenizer import Tokenizer, bare
from lowmem_pnn.language.unfinished_caches import unfinished

_VERSION = 1
# Counts up when texts of a kind are read otherwise: their caches alone are made again.
_READINGS = {"chat": 3, "text": 1, "completion": 1, "pair": 1, "labelled": 1}
_CHUNK_BYTES = 1 << 20
# Characters, and documents, that are tokenised at once.
_CHARACTERS_AT_ONCE, _DOCUMENTS_AT_ONCE = 1 << 20, 1024
_TYPES = (np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True)
class CacheStats:
    """What was made of a source.

    Args:
        documents: Number of documents.
        tokens: Their tokens.
        counted: Labels that count.
        rows: Rows of samples.
        split: Documents that go on in another row.
        cut: Documents whose end was cut off.
        left_out: Documents in which nothing counts.
        filled: Documents with a text of no token, in whose place there is one of padding.
        wrapped: Documents with a text that begins or ends with the tokens for that by itself, so that none was put beside them.
    """

    documents: int
    tokens: int
    counted: int
    rows: int
    split: int
    cut: int
    left_out: int
    filled: int = 0
    wrapped: int = 0


class TokenCache:
    """Tokens of a source, mapped.

    Args:
        folder: Folder of the cache.
        meta: What its `cache.json` says.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self._meta = folder, meta
        self.stats = CacheStats(**meta["stats"])
        self.tokens = self._map("tokens.bin", np.dtype(meta["dtype"]))
        """Tokens of all documents, (N,)."""
        self.counted = self._map("counted.bin", np.dtype(np.bool_)) if "counted.bin" in meta["files"] else None
        """Whether each is learnt, (N,); None where all are."""
        self.pieces = self._map("pieces.bin", np.dtype(np.int64)).reshape(-1, 2)
        """First input and number of inputs of each piece, (P, 2)."""
        self.rows = self._map("rows.bin", np.dtype(np.int64))
        """Number of the first piece of each row, (R,)."""
        self.labels = self._map("labels.bin", np.dtype(np.int64)) if "labels.bin" in meta["files"] else None
        """Place among `found_labels` of the class of each row, (R,); None where rows have none."""
        self.found_labels: list[str | int] = meta.get("labels", [])
        """Classes as the source has them, names or numbers, in the order in which they first come."""

    @property
    def fingerprint(self) -> str:
        """Hash of what the cache was made of."""
        made_of = dict(self._meta["made_of"])
        # Runs begun before readings were counted know the same tokens without one.
        if made_of.get("reading") == 1 and not self.stats.wrapped:
            del made_of["reading"]
        return _key(made_of)

    def __reduce__(self) -> tuple[Any, ...]:
        """Have another process map the files itself."""
        return TokenCache, (self.folder, self._meta)

    def _map(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        if not self._meta["files"][name]["bytes"]:
            return np.empty(0, dtype=dtype)
        # A plain view: slices of np.memmap are slow to make.
        return np.memmap(self.folder / name, dtype=dtype, mode="r").view(np.ndarray)


def open_cache(
    documents: Documents,
    tokenizer: Tokenizer,
    root: Path,
    *,
    context: int,
    form: Form,
    on_completions: bool,
    target_context: int | None = None,
    filler: int | None = None,
) -> TokenCache:
    """Open the tokens of a source, and make them first where they are not there.

    Args:
        documents: The source.
        tokenizer: What makes tokens of its texts.
        root: Folder of caches; made where it is not there.
        context: Inputs of a row.
        form: How rows are filled.
        on_completions: Whether only completions, and what an assistant says, are learnt.
        target_context: Labels of a row of a pair; None for other forms.
        filler: Token in the place of a text of none, so that each document has its row; None to leave such documents out. Not of next tokens.

    Raises:
        DataError: A document is not usable, or there is none.
        DiskError: The folder cannot be written to.
    """
    made_of = {
        "version": _VERSION, "content": documents.content, "kind": documents.kind, "tokenizer": tokenizer.fingerprint, "context": context,
        "form": form, "on_completions": on_completions,
    }  # fmt: skip
    # Of these alone, so that caches which were made before there were such forms hold on.
    made_of |= {} if target_context is None else {"target_context": target_context}
    made_of |= {} if documents.label is None else {"label": documents.label}
    made_of |= {} if filler is None else {"filler": filler}
    made_of |= {"reading": reading} if (reading := _READINGS.get(documents.kind)) is not None else {}
    folder = root / f"tokens-{_key(made_of)[:24]}"
    if (cache := _opened(folder, made_of)) is not None:
        return cache
    was_there = folder.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with unfinished(folder) as beside:
            _write(beside, documents, tokenizer, Layout(context, form, documents.kind == "text"), made_of)
            if was_there:
                tell(f"{folder} is damaged, or of another version, and was made again")
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another process was faster
                beside.rename(folder)
    except OSError as error:
        raise DiskError(
            f"tokens cannot be written to {root}: {error.strerror or error}; give --data-root a folder with room for them"
        ) from error
    cache = _opened(folder, made_of)
    if cache is None:
        raise DiskError(
            f"tokens that were written to {folder} cannot be read back; see to the drive, or give another --data-root"
        )
    return cache


def _key(made_of: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _opened(folder: Path, made_of: dict[str, Any]) -> TokenCache | None:
    """Return a cache whose files are whole and made of this; None where there is none."""
    try:
        meta = json.loads((folder / "cache.json").read_text())
        if meta["made_of"] != made_of:
            return None
        for name, file in meta["files"].items():
            if (folder / name).stat().st_size != file["bytes"] or _hash(folder / name) != file["sha256"]:
                return None
        return TokenCache(folder, meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _write(folder: Path, documents: Documents, tokenizer: Tokenizer, layout: Layout, made_of: dict[str, Any]) -> None:
    size = max(tokenizer.size, made_of.get("filler", 0) + 1)
    dtype = next(np.dtype(one) for one in _TYPES if size <= np.iinfo(one).max + 1)
    begun, ticker, num_tokens, num_documents, num_learnt, num_filled, num_wrapped = time.monotonic(), Ticker(), 0, 0, 0, 0, 0
    names = ("tokens.bin", "counted.bin", "pieces.bin", "rows.bin", "labels.bin")
    digests = {name: hashlib.sha256() for name in names}
    labels: dict[str | int, int] = {}
    limits = {"labelled": (layout.context,), "pairs": (layout.context, made_of.get("target_context", layout.context))}
    if layout.form in limits:
        tokenised = _apart(documents, tokenizer, limits[layout.form], made_of.get("filler"))
    else:
        tokenised = _tokenised(documents, tokenizer, on_completions=made_of["on_completions"])
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in names}

        def put(name: str, array: npt.NDArray[Any]) -> None:
            data = array.tobytes()
            digests[name].update(data)
            files[name].write(data)

        # A document that comes in pieces is placed when its last one is there.
        start = 0
        for found in tokenised:
            document, ids, counted = found.document, found.ids, found.counted
            put("tokens.bin", ids.astype(dtype))
            put("counted.bin", np.ones(len(ids), dtype=np.bool_) if counted is None else counted)
            if document.is_begin:
                start = num_tokens
            num_tokens += len(ids)
            num_learnt += len(ids) if counted is None else int(counted.sum())
            if document.is_end:
                num_documents += 1
            num_filled += found.is_filled
            num_wrapped += found.is_wrapped
            if found.sizes:
                num_labels = 1 if layout.form == "labelled" else found.sizes[-1]
                if layout.add_row(start, found.sizes, num_labels, is_cut=found.is_cut) and documents.label is not None:
                    put("labels.bin", np.array([labels.setdefault(document.values[-1], len(labels))], dtype=np.int64))
            elif document.is_end:
                layout.add(start, num_tokens - start, counted)
            if len(layout.pieces) >= _DOCUMENTS_AT_ONCE:
                _put_layout(layout, put)
            if ticker.is_due:
                tell(f"tokenising {documents.name}: {documents.done() / max(documents.size, 1):.0%}, {num_tokens:,} tokens")
        _put_layout(layout, put)
    if layout.form == "windows":
        num_rows = max(num_tokens - 1, 0) // layout.context
        layout.num_counted = num_rows * layout.context
    else:
        num_rows = (folder / "rows.bin").stat().st_size // np.dtype(np.int64).itemsize
    if num_learnt == num_tokens:
        (folder / "counted.bin").unlink()
    if not labels:
        (folder / "labels.bin").unlink()
    stats = CacheStats(
        num_documents,
        num_tokens,
        layout.num_counted,
        num_rows,
        layout.num_split,
        layout.num_cut,
        layout.num_left_out,
        num_filled,
        num_wrapped,
    )
    if not num_rows:
        raise DataError(_no_rows(documents, layout, stats))
    kept = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digests[name].hexdigest()}
        for name in names
        if (folder / name).exists()
    }
    meta = {"made_of": made_of, "dtype": dtype.name, "stats": asdict(stats), "files": kept, "labels": list(labels)}
    for name in kept:
        with (folder / name).open("rb+") as stream:
            os.fsync(stream.fileno())
    (folder / "cache.json").write_text(json.dumps(meta, indent=1))
    seconds = time.monotonic() - begun
    tell(
        f"tokenised {documents.name}: {num_documents:,} documents, {num_tokens:,} tokens, in {seconds:.1f} s; kept in {folder.parent}"
    )


def _put_layout(layout: Layout, put: Any) -> None:
    pieces, rows = layout.take()
    put("pieces.bin", pieces)
    put("rows.bin", rows)


def _no_rows(documents: Documents, layout: Layout, stats: CacheStats) -> str:
    if layout.form == "windows":
        return (
            f"{documents.name} has {stats.tokens:,} tokens, and a row of {layout.context} with the token after it takes {layout.context + 1:,}; "
            "give more text, or a smaller --context"
        )
    if layout.form in ("labelled", "pairs"):
        return f"{documents.name}: of {stats.documents:,} documents each has a text of no token; give some text"
    return (
        f"{documents.name}: in none of {stats.documents:,} documents is there a token to learn in the first {layout.context}; give a larger "
        "--context, or --loss-on all"
    )


@dataclass(frozen=True)
class _Tokens:
    """Tokens of a document.

    Args:
        document: The document, or a piece of it.
        ids: Its tokens.
        counted: Which of these are learnt; None for all.
        sizes: Tokens of each piece of a row that it has for itself; none where its row is for `Layout.add` to find.
        is_cut: Whether its end was cut off.
        is_filled: Whether a text of no token has one of padding.
        is_wrapped: Whether a text begins or ends with the tokens for that by itself.
    """

    document: Document
    ids: npt.NDArray[np.int64]
    counted: npt.NDArray[np.bool_] | None
    sizes: tuple[int, ...] = ()
    is_cut: bool = False
    is_filled: bool = False
    is_wrapped: bool = False


def _apart(documents: Documents, tokenizer: Tokenizer, limits: Sequence[int], filler: int | None) -> Iterator[_Tokens]:
    """Yield the tokens of documents of one text, or several, each wrapped as the tokenizer itself wraps it, and cut so that its end stays.

    What is to be written ends with the end token too where the tokenizer adds none: else nobody would know when it ends.
    """
    begin = np.array(tokenizer.begin, dtype=np.int64)
    for group in _grouped(documents.read()):
        encoded = iter(tokenizer.encode([text for document in group for text in document.values[: len(limits)]]))
        for document in group:
            parts, is_cut, is_filled, is_wrapped = [], False, False, False
            for number, limit in enumerate(limits):
                found, end = next(encoded), tokenizer.after
                if number and not end and tokenizer.end is not None:
                    end = (tokenizer.end,)
                ids = bare(found, tokenizer.begin, end)
                is_wrapped = is_wrapped or len(ids) < len(found)
                room = max(limit - len(begin) - len(end), 0)
                is_cut = is_cut or len(ids) > room
                part = np.concatenate([begin, ids[:room], np.array(end, dtype=np.int64)])[:limit]
                if filler is not None and not len(part):
                    part, is_filled = np.array([filler], dtype=np.int64), True
                parts.append(part)
            yield _Tokens(document, np.concatenate(parts), None, tuple(map(len, parts)), is_cut, is_filled, is_wrapped)


def _tokenised(documents: Documents, tokenizer: Tokenizer, *, on_completions: bool) -> Iterator[_Tokens]:
    """Yield the tokens of documents that are one stream each: begin, texts, end."""
    if documents.kind == "chat":
        template = ChatTemplate(tokenizer)
        for document in documents.read():
            yield _Tokens(document, *_chat(document, template, tokenizer, on_completions=on_completions))
        return
    for group in _grouped(documents.read()):
        encoded = iter(tokenizer.encode([text for document in group for text in document.values]))
        for document in group:
            found = [next(encoded) for _ in document.values]
            begin = tokenizer.begin if document.is_begin else ()
            end = () if tokenizer.end is None or not document.is_end else (tokenizer.end,)
            # What a script has rendered for another trainer has them already.
            parts = [bare(found[0], begin, end if len(found) == 1 else ()), *(bare(part, (), end) for part in found[1:])]
            is_wrapped = sum(map(len, parts)) < sum(map(len, found))
            ids = np.concatenate([np.array(begin, dtype=np.int64), *parts, np.array(end, dtype=np.int64)])
            counted = None
            if documents.kind != "text" and on_completions:
                counted = np.arange(len(ids)) >= len(begin) + len(parts[0])
            yield _Tokens(document, ids, counted, is_wrapped=is_wrapped)


def _chat(
    document: Document, template: ChatTemplate, tokenizer: Tokenizer, *, on_completions: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_] | None]:
    messages, tools = document.values
    if not on_completions:
        return tokenizer.encode([template.text(messages, document.where, tools)])[0], None
    text, spans = template.render(messages, document.where, tools)
    ids, starts = tokenizer.encode_with_starts(text)
    counted = np.zeros(len(ids), dtype=np.bool_)
    for begin, end in spans:
        counted |= (starts >= begin) & (starts < end)
    return ids, counted


def _grouped(documents: Iterator[Document]) -> Iterator[Sequence[Document]]:
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += sum(len(value) for value in document.values if isinstance(value, str))
        if characters >= _CHARACTERS_AT_ONCE or len(group) >= _DOCUMENTS_AT_ONCE:
            yield group
            group, characters = [], 0
    if group:
        yield group
