"""Packing: which tokens make a row of a fixed length: one document padded, several side by side, or windows of one stream.

    padded    [doc 1 . . . .] [doc 2, first part] [its rest . . .]      attention_mask: 1 where there is a document
    packed    [doc 1|doc 2|.] [doc 3 . . . . . .]                       position_ids: from 0 in each document
    windows   [doc 1 doc 2 d] [oc 2 doc 3 doc 3 ]                       neither
    labelled  [doc 1 . . . .] [doc 2 . . . . . .]                       attention_mask; a class for the whole row
    pairs     [source 1 . . .] -> [target 1 .]                          attention_mask; decoder_input_ids

A piece is a range of tokens that are inputs of one row; the label of each is the token after it, so a document of n tokens has n - 1. In
the last two forms nothing is moved: all tokens of a labelled document are inputs, and a row of a pair is two pieces, of which the second
are the labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Form = Literal["windows", "padded", "packed", "labelled", "pairs"]


@dataclass
class Layout:
    """Rows of documents that come one after the other.

    Args:
        context: Inputs of a row, T.
        form: How rows are filled.
        splits: Whether documents longer than a row go on in the next one; else they are cut.
    """

    context: int
    form: Form
    splits: bool
    pieces: list[tuple[int, int]] = field(default_factory=list)
    """First input and number of inputs of each piece that was not taken yet."""
    rows: list[int] = field(default_factory=list)
    """Number of the first piece of each packed row that was not taken yet."""
    num_pieces: int = 0
    num_split: int = 0
    """Documents that go on in another row."""
    num_cut: int = 0
    """Documents whose end was cut off."""
    num_left_out: int = 0
    """Documents without a token that counts, or of one token."""
    num_counted: int = 0
    """Labels that count."""
    _room: int = 0

    def add(self, start: int, length: int, counted: npt.NDArray[np.bool_] | None) -> None:
        """Place a document.

        Args:
            start: Number of its first token among all tokens.
            length: Its tokens.
            counted: For each token whether it is learnt, (length,); None for all.
        """
        if self.form == "windows":
            return
        inputs = length - 1
        if not self.splits and inputs > self.context:
            inputs, is_cut = self.context, True
        else:
            is_cut = False
        labels = inputs if counted is None else int(counted[1 : inputs + 1].sum())
        if labels < 1:
            self.num_left_out += 1
            return
        self.num_cut += is_cut
        self.num_counted += labels
        parts = 0
        while inputs:
            if self.form == "padded" or not self._room or (not self.splits and inputs > self._room):
                self._room = self.context
                self.rows.append(self.num_pieces)
            size = min(inputs, self._room)
            self.pieces.append((start, size))
            self.num_pieces += 1
            self._room -= size
            start, inputs, parts = start + size, inputs - size, parts + 1
        self.num_split += parts > 1

    def add_row(self, start: int, sizes: Sequence[int], num_counted: int, *, is_cut: bool) -> bool:
        """Place the pieces of a row that a document has for itself, and return whether there is one: none where a piece is empty.

        Args:
            start: Number of its first token among all tokens.
            sizes: Tokens of each piece, which come one after the other.
            num_counted: Labels of it that count.
            is_cut: Whether its end was cut off before.
        """
        if not all(sizes):
            self.num_left_out += 1
            return False
        self.rows.append(self.num_pieces)
        self.num_pieces += len(sizes)
        for size in sizes:
            self.pieces.append((start, size))
            start += size
        self.num_counted += num_counted
        self.num_cut += is_cut
        return True

    def take(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the pieces (P, 2) and rows (R,) since the last taking, and forget them."""
        taken = np.array(self.pieces, dtype=np.int64).reshape(-1, 2), np.array(self.rows, dtype=np.int64)
        self.pieces.clear()
        self.rows.clear()
        return taken
