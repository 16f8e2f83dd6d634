"""Rows of tokens: labels are the tokens after the inputs, -100 where nothing is learnt."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.language import write_jsonl
from lowmem_pnn.language.language_form import LanguageForm
from lowmem_pnn.language.open_language import open_language
from lowmem_pnn.language.token_rows import ChosenInputs
from lowmem_pnn.sources.subsets import labels_of, subset

ROWS = [{"prompt": "ab", "completion": "cd"}, {"prompt": "e", "completion": "f"}, {"prompt": "g", "completion": "hijklmnop"}]
OUT = -100


def rows(folder: Path, data: list[Any], **options: Any) -> Any:
    form = LanguageForm(
        **{"tokenizer": None, "context": 5, "packs": False, "loss_on": "completions", "root": folder / "root", **options}
    )
    return open_language(f"jsonl:{write_jsonl(folder / 'a.jsonl', data)}", form)


def text(values: torch.Tensor) -> str:
    return "".join("." if value in (0, OUT) else chr(value) for value in values.tolist())


def test_padded_rows(tmp_path: Path) -> None:
    dataset = rows(tmp_path, ROWS)
    (x, mask), y = dataset.train.batch([0, 1, 2, 0])
    assert [text(row) for row in x] == ["abc..", "e....", "ghijk", "abc.."]
    assert [text(row) for row in y] == [".cd..", "f....", "hijkl", ".cd.."]
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert {tensor.dtype for tensor in (x, mask, y)} == {torch.int64}
    assert dataset.preprocessing == (
        "3 documents, 16 tokens by bytes, a document a row of 5, padded, loss on completions, 8 labels count, 1 longer than a row, and cut"
    )
    assert dataset.train.batch([0])[1].tolist() == [[OUT, 99, 100, OUT, OUT]]


def test_packed_rows(tmp_path: Path) -> None:
    dataset = rows(tmp_path, ROWS, packs=True)
    (x, positions), y = dataset.train.batch([0, 1])
    assert [text(row) for row in x] == ["abce.", "ghijk"]
    assert [text(row) for row in y] == [".cdf.", "hijkl"]
    assert positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]


def test_loss_on_all(tmp_path: Path) -> None:
    _, y = rows(tmp_path, ROWS, loss_on="all").train.batch([0, 1])
    assert [text(row) for row in y] == ["bcd..", "f...."]


def test_long_text_is_split(tmp_path: Path) -> None:
    dataset = rows(tmp_path, [{"text": "abcdefgh"}, {"text": "ij"}])
    (x, _), y = dataset.train.batch([0, 1, 2])
    assert [text(row) for row in x] == ["abcde", "fg...", "i...."]
    assert [text(row) for row in y] == ["bcdef", "gh...", "j...."]
    assert "1 longer than a row, and split" in dataset.preprocessing


def test_windows_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("abcdefg")
    (tmp_path / "texts" / "b.txt").write_text("hijklmnop")
    form = LanguageForm("bytes", 5, False, "completions", tmp_path / "root")
    dataset = open_language(f"text:{tmp_path / 'texts'}", form)
    assert (len(dataset.train), len(dataset.test)) == (2, 1)  # type: ignore[arg-type]
    (x,), y = dataset.train.batch([1])
    assert (text(x[0]), text(y[0])) == ("fghij", "ghijk")
    (x,), y = dataset.test.batch([0])  # type: ignore[union-attr]
    assert (text(x[0]), text(y[0])) == ("klmno", "lmnop")


def test_chosen_inputs(tmp_path: Path) -> None:
    split = subset(rows(tmp_path, ROWS).train, [2, 0])  # type: ignore[arg-type]
    alone, both = ChosenInputs(split, (0,), as_one=True), ChosenInputs(split, (1, 0), as_one=False)
    x, y = alone.batch([1])
    assert isinstance(x, torch.Tensor)
    assert (text(x[0]), len(alone)) == ("abc..", 2)
    (mask, ids), _ = both.batch([1])
    assert (mask.tolist()[0], text(ids[0])) == ([1, 1, 1, 0, 0], "abc..")
    assert torch.equal(labels_of(alone, [1]), y)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        split.batch([2])
