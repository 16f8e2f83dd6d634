"""Tokenizers: text to numbers and back, by the file that the `tokenizers` library reads, or byte by byte."""

import hashlib
import heapq
import importlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lowmem_pnn.config.transformers_place import read_settings
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.sources.imports import one_line

Ids = npt.NDArray[np.int64]

# Ends of text in tokenizer files that come without a configuration.
_USUAL_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
# More is no tokenizer: the largest ones in use have some 20 MB.
_MOST_BYTES = 1 << 28
# Tokens whose texts are tried for one that becomes tokens.
_PROBED = 1000


class Tokenizer(Protocol):
    """Turns text into numbers, and numbers into text."""

    name: str
    """What it is called in messages."""
    size: int
    """Number of tokens: ids are below it."""
    begin: tuple[int, ...]
    """Tokens that a text begins with; none where the tokenizer adds none."""
    after: tuple[int, ...]
    """Tokens that the tokenizer itself adds at the end of a text; none where it adds none."""
    end: int | None
    """Token that a text ends with; None where there is no such token."""
    ends: frozenset[int]
    """Tokens after which a model's text is not gone on with: the end, and those that a model's folder names beside it (ends of turns)."""
    padding: int
    """Token that short samples are filled up with; it is never learnt."""
    fingerprint: str
    """Hash of all that decides which numbers a text becomes."""
    chat_template: str | None
    """Jinja template of conversations; None where there is none."""
    special_tokens: dict[str, str]
    """Texts of the special tokens that templates ask for, by name (`bos_token`)."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the tokens of texts, without begin and end."""
        ...

    def encode_with_starts(self, text: str) -> tuple[Ids, Ids]:
        """Return the tokens of a text, and for each the number of the character that it begins at."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens; special tokens are left out."""
        ...


class ByteTokenizer:
    """Bytes of UTF-8 as tokens, without begin and end."""

    name, size, padding, fingerprint = "bytes", 256, 0, "bytes"
    begin: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    end: int | None = None
    ends: frozenset[int] = frozenset()
    chat_template: str | None = None

    def __init__(self) -> None:
        self.special_tokens: dict[str, str] = {}

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer.encode`.

        Example:
            >>> ByteTokenizer().encode(["ab"])[0].tolist(), ByteTokenizer().decode([97, 98])
            ([97, 98], 'ab')
        """
        return [np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int64) for text in texts]

    def encode_with_starts(self, text: str) -> tuple[Ids, Ids]:
        """See `Tokenizer.encode_with_starts`."""
        lengths = [len(_utf8(character)) for character in text]
        return self.encode([text])[0], np.repeat(np.arange(len(text)), lengths)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`; what is no text becomes U+FFFD."""
        return bytes(number for number in ids if number < self.size).decode("utf-8", "replace")


class FileTokenizer:
    """Tokenizer of a `tokenizer.json`, with what lies beside it in a model's folder.

    Args:
        file: The tokenizer's file.
        folder: Folder with `tokenizer_config.json` and the like; None where there is the file alone.

    Raises:
        ConfigError: The file is no tokenizer, or the library is not installed.
    """

    def __init__(self, file: Path, folder: Path | None) -> None:
        self.name = str(folder or file)
        self._tokenizer = _read_tokenizer(file)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.size:
            raise ConfigError(f"--tokenizer {self.name} has no tokens; give one that was trained")
        settings = {} if folder is None else _read_settings(folder)
        self.special_tokens = _special_tokens(settings)
        self.chat_template = None if folder is None else _template(folder, settings)
        bare, whole = self._probed()
        before = next((n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare), 0)
        self.begin = tuple(whole[:before])
        if not self.begin and settings.get("add_bos_token") and (begin := self._id("bos_token")) is not None:
            self.begin = (begin,)
        self.after = tuple(whole[before + len(bare) :])
        self.end = self._id("eos_token")
        if self.end is None:
            usual = [number for text in _USUAL_ENDS if (number := self._tokenizer.token_to_id(text)) is not None]
            self.end = self.after[-1] if self.after else usual[0] if usual else None
        self.ends = frozenset(([] if self.end is None else [self.end]) + ([] if folder is None else named_ends(folder)))
        padding = self._id("pad_token")
        self.padding = padding if padding is not None else self.end if self.end is not None else 0
        digest = hashlib.sha256(file.read_bytes())
        digest.update(
            repr((self.begin, self.end, self.padding, self.chat_template, sorted(self.special_tokens.items()))).encode()
        )
        self.fingerprint = digest.hexdigest()

    def _probed(self) -> tuple[list[int], list[int]]:
        """Return the tokens of a text that has some, without what the tokenizer adds to a text and with it."""
        added: list[int] = self._tokenizer.encode("", add_special_tokens=True).ids
        # Not every alphabet has an "a".
        for text in itertools.chain(("a",), self._first_tokens()):
            bare, whole = (self._tokenizer.encode(text, add_special_tokens=add).ids for add in (False, True))
            if bare and not set(bare) & set(added):
                return bare, whole
        if added:
            raise ConfigError(
                f"--tokenizer {self.name} makes no token of the texts of its own tokens, so that what it adds to a text cannot be told apart; "
                "give one that was trained"
            )
        return [], []

    def _first_tokens(self) -> Iterator[str]:
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        yield from heapq.nsmallest(_PROBED, vocabulary, key=vocabulary.__getitem__)

    def _id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        number: int | None = None if text is None else self._tokenizer.token_to_id(text)
        return number

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer.encode`; texts are divided among threads."""
        encodings = self._tokenizer.encode_batch([_no_surrogates(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode_with_starts(self, text: str) -> tuple[Ids, Ids]:
        """See `Tokenizer.encode_with_starts`."""
        encoding = self._tokenizer.encode(_no_surrogates(text), add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        return np.array(encoding.ids, dtype=np.int64), starts

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        text: str = self._tokenizer.decode([number for number in ids if number < self.size], skip_special_tokens=True)
        return text


def open_tokenizer(spec: str) -> Tokenizer:
    """Open a tokenizer.

    Args:
        spec: `bytes`, a `tokenizer.json`, or a folder with one, such as a model's.

    Raises:
        ConfigError: There is no such file, it is no tokenizer, or the library that reads it is not installed.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise ConfigError(
                f"--tokenizer {spec} is a folder without tokenizer.json; give the folder of a tokenizer that save_pretrained wrote, "
                "a tokenizer.json, or bytes"
            )
        return FileTokenizer(path / "tokenizer.json", path)
    if not path.is_file():
        raise ConfigError(
            f"--tokenizer {spec}: there is no such file or folder; give a tokenizer.json, a folder with one, or bytes"
        )
    return FileTokenizer(path, path.parent if path.name == "tokenizer.json" else None)


def bare(ids: Ids, begin: Sequence[int], end: Sequence[int]) -> Ids:
    """Return the tokens of a text without those that it is to begin and end with, where it has them by itself.

    Args:
        ids: Tokens, (N,).
        begin: What it is to begin with.
        end: What it is to end with.

    Example:
        >>> bare(np.array([2, 7, 8, 0]), (2,), (0,)).tolist(), bare(np.array([7, 8]), (2,), (0,)).tolist()
        ([7, 8], [7, 8])
    """
    if begin and ids[: len(begin)].tolist() == [*begin]:
        ids = ids[len(begin) :]
    if end and ids[-len(end) :].tolist() == [*end]:
        ids = ids[: -len(end)]
    return ids


def check_trained_by(name: str, found: str | None, known: str | None, remedy: str = "") -> None:
    """Refuse a tokenizer that is another than the rows of a run were made by: its numbers mean other texts.

    Args:
        name: What it is called.
        found: Its fingerprint; None where there is no tokenizer.
        known: Fingerprint of what the rows were made by; None where it is not known.
        remedy: What else to do than to put it back, with a comma before.

    Raises:
        ConfigError: It was changed since.
    """
    if None not in (found, known) and found != known:
        raise ConfigError(f"tokenizer {name} is another one than the run was trained with; put it back{remedy}")


def _read_tokenizer(file: Path) -> Any:
    try:
        library = importlib.import_module("tokenizers")
    except ImportError as error:
        raise ConfigError(
            "--tokenizer needs the tokenizers library, which is not installed; run: pip install 'lowmem-pnn[tokenizers]'"
        ) from error
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has {file.stat().st_size:,} bytes")
        return library.Tokenizer.from_file(str(file))
    except MemoryError:
        raise
    # The library raises plain Exception for all that is wrong with a file.
    except Exception as error:
        raise ConfigError(
            f"--tokenizer {file} is no tokenizer: {one_line(error)[:200]}; give a tokenizer.json, or bytes"
        ) from error


def _read_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"--tokenizer {folder}: {name} cannot be read: {one_line(error)}; repair it") from error
        if not isinstance(found, dict):
            raise ConfigError(f"--tokenizer {folder}: {name} holds a {type(found).__name__}; give an object of settings")
        settings |= found
    return settings


def named_ends(folder: Path) -> list[int]:
    """Return the tokens at which transformers ends a text of the model in a folder, by the first of its files that says so.

    Args:
        folder: The folder.
    """
    for name in ("generation_config.json", "config.json"):
        settings = read_settings(folder / name) or {}
        text = settings.get("text_config")  # where a model takes more than text
        for place in (settings, text if isinstance(text, dict) else {}):
            ends = place.get("eos_token_id")
            if found := [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]:
                return found
    return []


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Return the texts of special tokens by their names; in files they are texts, or objects with one as their `content`."""
    tokens = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((one.get("template") for one in template if isinstance(one, dict) and one.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _no_surrogates(text: str) -> str:
    """Return a text without halves of surrogate pairs, which JSON may hold and no UTF-8 can."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
