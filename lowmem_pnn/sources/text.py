"""Text for language models: the bytes of a file as tokens, in windows, each with the byte after it as its label.

    bytes   0 ......... T ......... 2T ........ 3T
    x       [window 0 )[window 1 )[window 2 )      T tokens each; what is left at the end is no window
    y        [window 0 )[window 1 )[window 2 )     the same, one byte later
            ------ train -------- ---- test --     the last tenth of the windows

The file is mapped, not read: its pages are the kernel's, however large it is.
"""

import hashlib
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Text:
    """A text that is open, as parts of a data set.

    Args:
        train: all windows but the last tenth.
        test: the last tenth of the windows, at least one.
        preprocessing: what was done, in words.
        fingerprint: of all bytes, and of how they are divided.
    """

    train: "TextSplit"
    test: "TextSplit"
    preprocessing: str
    fingerprint: str


def open_text(path: Path, context: int) -> Text:
    """Open a file of text and read it once, for its fingerprint.

    Labels of the test part are in no window of the training part: that ends with the byte which is the test part's first input.

    Args:
        path: of the file; any bytes will do.
        context: tokens of a window, T.

    Returns:
        Its two parts.

    Raises:
        DataError: there is no such file, it cannot be read, or is shorter than two windows and a byte.
    """
    assert context > 0, "a window has at least one token"
    file = _File(path)
    needed = 2 * context + 1
    if file.size < needed:
        remedy = (
            "a longer file" if file.size < 3 else f"a longer file, or a model with a context of at most {(file.size - 1) // 2}"
        )
        raise DataError(
            f"text {str(path)!r} {f'has {file.size:,} bytes' if file.size else 'is empty'}; two windows of {context} tokens (a byte "
            f"each), one for training and one for the test, and the byte after them are {needed:,}; give {remedy}"
        )
    num_windows = (file.size - 1) // context
    num_test = max(num_windows // _TEST_SHARE, 1)
    words = (
        f"bytes as tokens, windows of {context} with the byte after each token as its label, the last {num_test:,} of "
        f"{num_windows:,} windows for the test"
    )
    digest = hashlib.sha256(words.encode())
    for begin in range(0, file.size, _CHUNK_BYTES):
        digest.update(file.bytes[begin : begin + _CHUNK_BYTES].data)
    num_train = num_windows - num_test
    return Text(TextSplit(file, context, 0, num_train), TextSplit(file, context, num_train, num_test), words, digest.hexdigest())


class TextSplit:
    """Neighbouring windows of a file: `Split`, with labels (B, T).

    Args:
        file: open.
        context: tokens of a window, T.
        first: number of the first window.
        num_windows: how many there are.
    """

    def __init__(self, file: "_File", context: int, first: int, num_windows: int) -> None:
        self._file, self._context, self._first, self._num_windows = file, context, first, num_windows

    def __len__(self) -> int:
        return self._num_windows

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Windows, and what comes after each of their tokens.

        Args:
            indices: B of them.

        Returns:
            (B, T) int64 twice, contiguous and the caller's own.

        Raises:
            DataError: the file was changed since it was opened.
            IndexError: an index out of range.
        """
        numbers = as_indices(indices, len(self))
        self._file.check()
        windows = np.empty((len(numbers), self._context + 1), dtype=np.uint8)
        for window, number in zip(windows, numbers, strict=True):
            begin = (self._first + int(number)) * self._context
            window[:] = self._file.bytes[begin : begin + self._context + 1]
        tokens = torch.from_numpy(windows)
        return tokens[:, :-1].to(torch.int64).contiguous(), tokens[:, 1:].to(torch.int64).contiguous()


class _File:
    """A file mapped into memory, which notices when it is changed under the map."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            if path.exists() and not path.is_file():
                kind = "a folder" if path.is_dir() else "no regular file"
                raise DataError(f"text {str(path)!r} is {kind}; give text:FILE with one file, to which cat joins several")
            with path.open("rb") as stream:
                self._descriptor = os.dup(stream.fileno())
                weakref.finalize(self, os.close, self._descriptor)
                self._state = self._found()
                self.size = self._state[0]
                """In bytes."""
                # An empty file cannot be mapped.
                mapped = np.memmap(stream, dtype=np.uint8, mode="r") if self.size else np.empty(0, dtype=np.uint8)
                self.bytes = mapped.view(np.ndarray)
                """(size,) uint8, read-only."""
        except FileNotFoundError as error:
            raise DataError(f"there is no file {path.absolute()}; give text:FILE") from error
        except OSError as error:
            raise DataError(f"text {str(path)!r} cannot be read: {error.strerror or error}; give text:FILE") from error

    def check(self) -> None:
        """Refuse to go on when the file was written to: to read behind its end would kill the process, other bytes are other data.

        Raises:
            DataError: it was changed.
        """
        if (found := self._found()) != self._state:
            raise DataError(
                f"text {str(self._path)!r} was changed while it is used: it had {self.size:,} bytes, it has {found[0]:,} and another "
                "time of change; put it back and go on with --resume, or begin again with --overwrite"
            )

    def _found(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns
