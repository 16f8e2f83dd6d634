"""Documents of every source, read in bounded memory; six bad inputs of each, one line each."""

import itertools
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from helpers.language import write_jsonl
from lowmem_pnn.errors import DataError
from lowmem_pnn.language import documents as module
from lowmem_pnn.language.columns import Wanted
from lowmem_pnn.language.documents import Documents, open_jsonl, open_parquet, open_rows, open_texts


def values(documents: Documents) -> list[Any]:
    return [document.values for document in documents.read()]


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


TURN = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("rows", "kind", "found"),
    [
        ([{"text": "a"}, {"text": "b", "more": 1}], "text", [("a",), ("b",)]),
        ([{"completion": "b", "prompt": "a", "text": "c"}], "completion", [("a", "b")]),
        ([{"messages": TURN, "text": "x"}], "chat", [(TURN, None)]),
    ],
)
def test_lines_of_json(rows: list[Any], kind: str, found: list[Any], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    path.write_text("\n" + path.read_text() + "\n \n")
    documents = open_jsonl(path)
    assert (documents.kind, values(documents), values(documents)) == (kind, found, found)
    assert documents.done() == documents.size == path.stat().st_size


def test_rows_of_parquet(tmp_path: Path) -> None:
    documents = open_parquet(write_parquet(tmp_path / "a.parquet", {"n": [1, 2], "prompt": ["a", "b"], "completion": ["c", "d"]}))
    assert (documents.kind, values(documents), documents.size) == ("completion", [("a", "c"), ("b", "d")], 2)
    turns = open_parquet(write_parquet(tmp_path / "b.parquet", {"messages": [TURN]}))
    assert values(turns) == [(TURN, None)]


def test_rows_of_a_hub_data_set() -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": [str(number) for number in range(600)]})
    documents = open_rows(rows, "hfdata:x")
    assert values(documents) == [(str(number),) for number in range(600)]
    other = open_rows(datasets.Dataset.from_dict({"text": [*(str(number) for number in range(599)), "x"]}), "hfdata:x")
    assert other.content != documents.content


def test_text_comes_in_pieces_that_are_cut_between_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 16)
    text = "one two three\n\nfour five\n six seven eight\nnine ten\n" * 9 + "x" * 300 + " " + "y" * 100
    path = tmp_path / "a.txt"
    path.write_text(text)
    pieces = list(open_texts(path).read())
    assert "".join(piece.values[0] for piece in pieces) == text
    assert [piece.is_begin for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.is_end for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 20
    cuts = [(one.values[0][-1], other.values[0][0]) for one, other in itertools.pairwise(pieces)]
    assert all((end == "\n" and not begin.isspace()) or begin in "x y" for end, begin in cuts)
    assert max(len(piece.values[0]) for piece in pieces) <= 80


def test_a_folder_of_text_is_a_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.md").write_text("a")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text("")
    documents = open_texts(tmp_path)
    assert [(one.values, one.is_begin, one.is_end) for one in documents.read()] == [(("b",), True, True), (("a",), True, True)]


def test_content_is_hashed_whole(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 100}])
    before = open_jsonl(path).content
    path.write_text(path.read_text().replace("aaaa", "aaba"))
    assert open_jsonl(path).content != before


JSONL = {
    "": "is empty; give a file with a JSON object on each line, with text, prompt and completion, or messages",
    "\n\n": "is empty; give a file",
    '{"text": "a"}\n{"text": ': "line 2 is not JSON: Expecting value at character 10; give an object on each line",
    '{"text": "a"}\n\n["b"]': "line 3 is a list; give an object on each line",
    '{"prompt": "a"}': "line 1 has the columns 'prompt', and lacks 'completion'; text is taken from text, prompt and completion, or messages",
    '{"q": "a", "a": "b"}': "line 1 has the columns 'q', 'a'; text is taken from text, prompt and completion, or messages: name them so",
    '{"text": "a"}\n{"txt": "a"}': "line 2 has no 'text'; it has 'txt'; give all lines the same columns",
    '{"text": 3}': "line 1: 'text' is a number; give text",
    '{"prompt": "a", "completion": null}': "line 1: 'completion' is a null; give text",
    '{"messages": []}': "line 1: 'messages' is empty; give a list of turns",
    '{"messages": "a"}': "line 1: 'messages' is a text; give a list of turns",
    '{"messages": [{"role": "user"}]}': "line 1: a turn of 'messages' has no 'role' or no 'content'; give both for each turn",
}


@pytest.mark.parametrize("content", JSONL)
def test_bad_lines_are_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        values(open_jsonl(path))
    assert JSONL[content] in str(error.value)
    assert str(error.value).startswith(f"jsonl:{path}")
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2 is not UTF-8: byte 11; give an object on each line"):
        values(open_jsonl(path))
    with pytest.raises(DataError, match=r"is not in UTF-8 .*; store it in UTF-8, or give --tokenizer bytes"):
        values(open_texts(path))


@pytest.mark.parametrize("open_it", [open_jsonl, open_texts, open_parquet])
def test_no_such_file(open_it: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"there is no file {tmp_path / 'none'}; give "):
        open_it(tmp_path / "none")
    if open_it is not open_texts:
        with pytest.raises(DataError, match=r"is a folder; give "):
            open_it(tmp_path)
    else:
        with pytest.raises(DataError, match=r"is a folder without \*.txt or \*.md; give one with such files, or one file"):
            open_it(tmp_path)
        (tmp_path / "a.txt").write_text("")
        with pytest.raises(DataError, match=r"is empty; give text"):
            open_it(tmp_path)


def test_bad_parquet_is_one_line(tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        "has the columns 'n'; text is taken from": {"n": [1]},
        "is empty: it has 0 rows; give at least 1": {"text": []},
        "row 2: 'text' is a null; give text": {"text": ["a", None]},
        "row 1: 'text' is a number; give text": {"text": [1, 2]},
        "and lacks 'prompt'": {"completion": ["a"]},
    }
    for text, columns in cases.items():
        with pytest.raises(DataError) as error:
            values(open_parquet(write_parquet(tmp_path / "a.parquet", columns)))
        assert text in str(error.value)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more PAR1")
    with pytest.raises(DataError, match=r"cannot be read: .*; repair it"):
        open_parquet(tmp_path / "a.parquet")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "word " * 2000}) + "\n"
    path.write_text(line * 3000)  # 30 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(len(document.values[0]) for document in open_jsonl(path).read())
    assert count == 3000 * 10_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000


TOOLS = [{"type": "function", "function": {"name": "clock"}}]
CALL = [{"role": "user", "content": "time?"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}]


@pytest.mark.parametrize("source", ["jsonl", "parquet", "hfdata"])
def test_conversations_come_with_their_tools_and_without_keys_that_a_table_fills_up(source: str, tmp_path: Path) -> None:
    import datasets

    columns = {"messages": [CALL, TURN], "tools": [TOOLS, None], "image": [1, 2]}
    if source == "jsonl":
        rows = [{name: column[row] for name, column in columns.items()} for row in (0, 1)]
        documents = open_jsonl(write_jsonl(tmp_path / "a.jsonl", rows))
    elif source == "parquet":
        documents = open_parquet(write_parquet(tmp_path / "a.parquet", columns))
    else:
        documents = open_rows(datasets.Dataset.from_dict(columns), "hfdata:x")
    assert values(documents) == [(CALL, TOOLS), (TURN, None)]


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (
            {"functions": TOOLS},
            "line 1 has 'functions' beside 'messages', which no template is given here; leave that column out",
        ),
        ({"tools": "clock"}, "line 1: 'tools' is no list of objects; give the JSON schema of each tool"),
        ({"tools": [1]}, "line 1: 'tools' is no list of objects"),
    ],
)
def test_what_else_a_template_would_be_given_is_refused(beside: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        values(open_jsonl(write_jsonl(tmp_path / "a.jsonl", [{"messages": TURN, **beside}])))
    as_text = open_jsonl(write_jsonl(tmp_path / "b.jsonl", [{"messages": TURN, "tools": json.dumps(TOOLS)}]))
    assert values(as_text) == [(TURN, TOOLS)]


def test_a_second_text_is_refused_and_columns_that_are_not_read_are_known(tmp_path: Path) -> None:
    row = {"text": "a", "label": 0, "idx": 3}
    path, wanted = write_jsonl(tmp_path / "a.jsonl", [{**row, "text_pair": "b"}]), Wanted(("labelled",))
    with pytest.raises(DataError, match=r"line 1 has 'text_pair' beside 'text', and of each row one text is read; join the two"):
        open_jsonl(path, wanted)
    with pytest.raises(DataError, match=r"line 2 has 'text_pair' beside 'text'"):
        values(open_jsonl(write_jsonl(path, [row, {**row, "text_pair": "b"}]), wanted))
    assert open_jsonl(write_jsonl(path, [row]), wanted).unread == ("idx",)
    assert open_parquet(write_parquet(tmp_path / "a.parquet", {name: [one] for name, one in row.items()})).unread == (
        "label",
        "idx",
    )


def test_columns_that_are_not_read_are_not_decoded() -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    broken = datasets.Dataset.from_dict({"text": ["a"], "image": [{"bytes": b"no image", "path": None}]}, features=features)
    documents = open_rows(broken, "hfdata:x")
    assert (values(documents), documents.unread) == ([("a",)], ("image",))
