"""Rows of documents: every label once, none across documents, and what is counted."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lowmem_pnn.language.packing import Form, Layout

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=20)


def lay_out(
    sizes: list[int], context: int, form: Form, splits: bool, counted: Any = None
) -> tuple[Layout, list[list[tuple[int, int]]]]:
    """The layout, and the pieces of each row; taken now and then, as a cache does."""
    layout, start = Layout(context, form, splits), 0
    pieces, rows = np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.int64)
    for number, size in enumerate(sizes):
        layout.add(start, size, None if counted is None else counted[number])
        start += size
        if number % 3 == 0:
            more = layout.take()
            pieces, rows = np.concatenate([pieces, more[0]]), np.concatenate([rows, more[1]])
    more = layout.take()
    pieces, rows = np.concatenate([pieces, more[0]]), np.concatenate([rows, more[1]])
    ends = [*rows, len(pieces)][1:]
    return layout, [[(int(a), int(b)) for a, b in pieces[begin:end]] for begin, end in zip(rows, ends, strict=True)]


@given(lengths, st.integers(1, 12), st.sampled_from(["padded", "packed"]))
def test_text_has_every_label_once(sizes: list[int], context: int, form: Form) -> None:
    layout, rows = lay_out(sizes, context, form, splits=True)
    starts = np.cumsum([0, *sizes])
    expected = [start + n for start, size in zip(starts, sizes, strict=False) for n in range(size - 1)]
    found = [start + n for row in rows for start, size in row for n in range(size)]
    assert found == expected
    assert all(1 <= sum(size for _, size in row) <= context for row in rows)
    assert layout.num_counted == len(expected)
    assert layout.num_left_out == sum(size == 1 for size in sizes)
    assert layout.num_cut == 0
    if form == "padded":
        assert all(len(row) == 1 for row in rows)
    else:  # full but for the last
        assert all(sum(size for _, size in row) == context for row in rows[:-1])


@given(lengths, st.integers(1, 12))
def test_completions_stay_in_one_row_and_are_cut(sizes: list[int], context: int) -> None:
    layout, rows = lay_out(sizes, context, "packed", splits=False)
    starts = np.cumsum([0, *sizes])
    expected = [(int(start), min(size - 1, context)) for start, size in zip(starts, sizes, strict=False) if size > 1]
    assert [piece for row in rows for piece in row] == expected
    assert all(sum(size for _, size in row) <= context for row in rows)
    assert (layout.num_split, layout.num_cut) == (0, sum(size - 1 > context for size in sizes))


def test_documents_of_which_nothing_counts_are_left_out() -> None:
    learnt = [np.array([False, False, True, True]), np.array([False] * 5 + [True]), np.array([True, False])]
    layout, rows = lay_out([4, 6, 2], 3, "padded", False, learnt)
    # Of the second the completion is cut off, of the third only the first token counts, which is no label.
    assert rows == [[(0, 3)]]
    assert (layout.num_left_out, layout.num_cut, layout.num_counted) == (2, 0, 2)


def test_windows_have_no_pieces() -> None:
    assert lay_out([5, 5], 3, "windows", True)[1] == []
