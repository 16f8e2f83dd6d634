"""Text for language models: the bytes of a file as tokens, in windows, each token with the next byte as its label.

    bytes   0 ......... T ......... 2T ........ 3T
    x       [window 0 )[window 1 )[window 2 )      T tokens each; bytes left over at the end are in no window
    y        [window 0 )[window 1 )[window 2 )     the same, one byte later
            ------ train -------- ---- test --     the last tenth of the windows
            --------------- train ------------     text whose test part is given apart, or that is such a part

The file is mapped, not read: its pages are the kernel's, however large it is.
"""

import hashlib
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.splits import Indices, as_indices

DEFAULT_CONTEXT = 256
"""Tokens of a window for a model that does not name its context."""
NUM_TOKENS = 256
"""Tokens are bytes."""

_TEST_SHARE = 10
_CHUNK_BYTES = 1 << 20


def num_test_rows(num_rows: int) -> int:
    """Return how many rows of text are its test part: the last tenth of them, and at least one of several.

    Args:
        num_rows: Rows of the text.

    Example:
        >>> [num_test_rows(rows) for rows in (1, 2, 39)]
        [0, 1, 3]
    """
    return max(num_rows // _TEST_SHARE, 1) if num_rows > 1 else 0


@dataclass(frozen=True)
class Text:
    """Open text, as training and test part of a data set.

    Args:
        train: All windows but those of the test part.
        test: The last tenth of the windows, at least one; None of text that is left whole.
        preprocessing: Steps from the bytes to the samples, in words.
        fingerprint: Hash of all bytes, and of the way they are divided.
    """

    train: "TextSplit"
    test: "TextSplit | None"
    preprocessing: str
    fingerprint: str


def open_text(path: Path, context: int, *, whole: bool = False) -> Text:
    """Open a file of text and read it once, for its fingerprint.

    Labels of the test part are in no window of the training part: its last label is the byte that is the test part's first input.

    Args:
        path: Path of the file; any bytes will do.
        context: Tokens of a window, T.
        whole: Leave it whole: its test part is given apart, or it is such a part.

    Returns:
        The text's two parts.

    Raises:
        DataError: There is no such file, it cannot be read, or it is shorter than a window for each part and a byte.
    """
    assert context > 0, "a window has at least one token"
    file = TokenFile(path)
    least = 1 if whole else 2
    needed = least * context + 1
    if file.size < needed:
        most = (file.size - 1) // least
        remedy = "a longer file" if most < 1 else f"a longer file, or a model with a context of at most {most}"
        if whole:
            windows = f"a window of {context} tokens (a byte each) and the byte after it"
        else:
            windows = (
                f"two windows of {context} tokens (a byte each), one for training and one for the test, and the byte after them"
            )
        raise DataError(
            f"text {str(path)!r} {f'has {file.size:,} bytes' if file.size else 'is empty'}; {windows} are {needed:,}; give {remedy}"
        )
    num_windows = (file.size - 1) // context
    num_test = 0 if whole else num_test_rows(num_windows)
    words = f"bytes as tokens, windows of {context} with the byte after each token as its label"
    if num_test:
        words += f", the last {num_test:,} of {num_windows:,} windows for the test"
    digest = hashlib.sha256(words.encode())
    for begin in range(0, file.size, _CHUNK_BYTES):
        digest.update(file.tokens[begin : begin + _CHUNK_BYTES].data)
    num_train = num_windows - num_test
    test = TextSplit(file, context, num_train, num_test) if num_test else None
    return Text(TextSplit(file, context, 0, num_train), test, words, digest.hexdigest())


class TextSplit:
    """Split of neighbouring windows of a file of tokens, with labels (B, T).

    Args:
        file: Open file.
        context: Tokens of a window, T.
        first: Number of the first window.
        num_windows: Number of windows.
    """

    def __init__(self, file: "TokenFile", context: int, first: int, num_windows: int) -> None:
        self._file, self._context, self._first, self._num_windows = file, context, first, num_windows

    def __len__(self) -> int:
        return self._num_windows

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return windows, and for each of their tokens the next one as its label.

        Args:
            indices: Numbers of B windows.

        Returns:
            Tokens (B, T) and labels (B, T), both int64, contiguous and the caller's own.

        Raises:
            DataError: The file was changed since it was opened.
            IndexError: An index is out of range.
        """
        numbers = as_indices(indices, len(self))
        self._file.check()
        windows = np.empty((len(numbers), self._context + 1), dtype=np.int64)
        for window, number in zip(windows, numbers, strict=True):
            begin = (self._first + int(number)) * self._context
            window[:] = self._file.tokens[begin : begin + self._context + 1]
        tokens = torch.from_numpy(windows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class TokenFile:
    """File of tokens mapped into memory, which notices when it is changed under the map.

    Args:
        path: Path of the file.
        dtype: Type of a token.
        kind: What the option calls the file: `text` or `tokens`.

    Raises:
        DataError: There is no such file, or it cannot be read.
    """

    def __init__(self, path: Path, dtype: Any = np.uint8, kind: str = "text") -> None:
        self._path, self._dtype, self._kind = path, np.dtype(dtype), kind
        try:
            if path.exists() and not path.is_file():
                what = "a folder" if path.is_dir() else "no regular file"
                raise DataError(f"{kind} {str(path)!r} is {what}; give {kind}:FILE with one file, to which cat joins several")
            with path.open("rb") as stream:
                self._descriptor = os.dup(stream.fileno())
                weakref.finalize(self, os.close, self._descriptor)
                self._state = self._size_and_time()
                self.size = self._state[0]
                """Size in bytes."""
                # An empty file cannot be mapped.
                whole = self.size // self._dtype.itemsize
                mapped = (
                    np.memmap(stream, dtype=self._dtype, mode="r", shape=(whole,)) if whole else np.empty(0, dtype=self._dtype)
                )
                self.tokens = mapped.view(np.ndarray)
                """Content, read-only; bytes at the end that make no token are left out."""
        except FileNotFoundError as error:
            raise DataError(f"there is no file {path.absolute()}; give {kind}:FILE") from error
        except OSError as error:
            raise DataError(f"{kind} {str(path)!r} cannot be read: {error.strerror or error}; give {kind}:FILE") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Have another process map the file itself; what was written to it meanwhile is noticed there too."""
        return _reopened, (self._path, self._dtype, self._kind, self._state)

    def check(self) -> None:
        """Raise if the file was written to: a read behind its end would kill the process, and other bytes are other data.

        Raises:
            DataError: The file was changed.
        """
        if (state := self._size_and_time()) != self._state:
            raise DataError(
                f"{self._kind} {str(self._path)!r} was changed while it is used: it had {self.size:,} bytes, it has {state[0]:,} and another "
                "time of change; put it back and go on with --resume, or begin again with --overwrite"
            )

    def _size_and_time(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


def _reopened(path: Path, dtype: Any, kind: str, state: tuple[int, int]) -> TokenFile:
    file = TokenFile(path, dtype, kind)
    file._state = state
    file.check()
    return file
