"""Token caches: made once, made again when damaged or stale, whole or not at all, in bounded memory."""

import fcntl
import hashlib
import json
import os
import pickle
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.language import TEMPLATE, pairs, write_jsonl, write_tokenizer
from lowmem_pnn.errors import DataError, DiskError
from lowmem_pnn.language.columns import NEXT_TOKENS, SEQUENCES
from lowmem_pnn.language.documents import open_jsonl, open_texts
from lowmem_pnn.language.progress import telling
from lowmem_pnn.language.token_cache import TokenCache, open_cache
from lowmem_pnn.language.tokenizer import ByteTokenizer, open_tokenizer
from lowmem_pnn.language.unfinished_caches import unfinished
from lowmem_pnn.memory.process_meter import private_bytes


def make(
    path: Path, root: Path, tokenizer: Any = None, wanted: Any = NEXT_TOKENS, **options: Any
) -> tuple[TokenCache, list[str]]:
    told: list[str] = []
    open_it = open_texts if path.suffix == ".txt" or path.is_dir() else open_jsonl
    with telling(told.append):
        cache = open_cache(
            open_it(path) if open_it is open_texts else open_jsonl(path, wanted),
            tokenizer or ByteTokenizer(),
            root,
            **{"context": 8, "form": "padded", "on_completions": True, **options},
        )
    return cache, told


def test_prompt_and_completion_are_tokenised_apart_and_joined(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path / "t", begins=True)))
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the c", "completion": "at sat"}])
    cache, _ = make(path, tmp_path / "root", tokenizer)
    prompt, completion = (ids.tolist() for ids in tokenizer.encode(["the c", "at sat"]))
    assert cache.tokens.tolist() == [2, *prompt, *completion, 0]
    assert cache.counted is not None
    assert cache.counted.tolist() == [False] * (1 + len(prompt)) + [True] * (len(completion) + 1)
    whole, _ = make(path, tmp_path / "root", tokenizer, on_completions=False)
    assert (whole.tokens.tolist(), whole.counted) == (cache.tokens.tolist(), None)


def test_the_tokens_of_a_begin_and_an_end_are_not_put_twice(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path / "t", begins=True)))
    for row, form in (
        ({"prompt": "{}the cat", "completion": " sat{}"}, "padded"),
        ({"text": "{}the cat sat{}"}, "padded"),
        ({"source": "{}the cat", "target": "sat{}"}, "pairs"),
    ):
        made = []
        for begin, end in (("", ""), ("<begin>", "<end>")):
            texts = [text.format(begin if number == 0 else end, end) for number, text in enumerate(row.values())]
            path = write_jsonl(tmp_path / "a.jsonl", [dict(zip(row, texts, strict=True))])
            made.append(
                make(path, tmp_path / "root", tokenizer, form=form, wanted=SEQUENCES if form == "pairs" else NEXT_TOKENS)[0]
            )
        own, rendered = made
        assert own.tokens.tolist() == rendered.tokens.tolist()
        assert (own.counted is None) == (rendered.counted is None)
        assert own.counted is None or own.counted.tolist() == rendered.counted.tolist()  # type: ignore[union-attr]
        assert (own.stats.wrapped, rendered.stats.wrapped) == (0, 1)
        # Runs that were begun before such tokens were looked for go on where there are none.
        made_of = json.loads((own.folder / "cache.json").read_text())["made_of"]
        without = {name: value for name, value in made_of.items() if name != "reading"}
        assert own.fingerprint == hashlib.sha256(json.dumps(without, sort_keys=True).encode()).hexdigest()


def test_of_a_conversation_the_assistant_is_learnt(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path / "t", template=TEMPLATE)))
    turns = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on"},
        {"role": "user", "content": "mat"},
    ]
    cache, _ = make(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}]), tmp_path / "root", tokenizer, context=64)
    assert cache.counted is not None
    assert tokenizer.decode(cache.tokens[cache.counted].tolist()) == "sat on"  # and <end>, which is special
    assert cache.tokens[cache.counted].tolist()[-1] == 0
    assert tokenizer.decode(cache.tokens.tolist()) == "<user>the cat<assistant>sat on<user>mat"


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_tokens_have_the_shortest_type(size: int, dtype: str, tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        fingerprint = f"wide {size}"

        def encode(self, texts: Any) -> Any:
            return [ids + size - 256 for ids in super().encode(texts)]

    Wide.size = size
    cache, _ = make(write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}]), tmp_path / "root", Wide())
    assert (cache.tokens.dtype.name, cache.tokens.tolist()) == (dtype, [size - 256 + byte for byte in b"abc"])


def test_a_cache_is_made_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs())
    cache, told = make(path, tmp_path / "root")
    assert told[0].startswith(f"tokenised jsonl:{path}: 12 documents, ")
    assert make(path, tmp_path / "root")[1] == []
    assert pickle.loads(pickle.dumps(cache)).tokens.tolist() == cache.tokens.tolist()
    assert len(pickle.dumps(cache)) < 2000
    assert [file.name for file in (tmp_path / "root").iterdir()] == [cache.folder.name]


@pytest.mark.parametrize("change", [{"context": 9}, {"form": "packed"}, {"on_completions": False}])
def test_other_options_make_another(change: dict[str, Any], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs())
    cache, _ = make(path, tmp_path / "root")
    other, told = make(path, tmp_path / "root", **change)
    assert told
    assert cache.fingerprint != other.fingerprint
    path.write_text(path.read_text().replace("cat", "rat"))
    assert make(path, tmp_path / "root")[1]


@pytest.mark.parametrize("name", ["tokens.bin", "counted.bin", "pieces.bin", "rows.bin", "cache.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_cache_is_made_again(name: str, damage: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs())
    cache, _ = make(path, tmp_path / "root")
    expected = cache.tokens.tolist(), cache.pieces.tolist(), cache.rows.tolist()
    file = cache.folder / name
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-1])
    again, told = make(path, tmp_path / "root")
    assert told[-1] == f"{cache.folder} is damaged, or of another version, and was made again"
    assert (again.tokens.tolist(), again.pieces.tolist(), again.rows.tolist()) == expected
    assert make(path, tmp_path / "root")[1] == []


def test_a_fault_leaves_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*pairs(), {"prompt": "a", "completion": 1}])
    with pytest.raises(DataError, match=r"line 13: 'completion' is a number; give text"):
        make(path, tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(DiskError, match=r"tokens cannot be written to .*/root: .*; give --data-root a folder with room for them"):
        make(write_jsonl(tmp_path / "a.jsonl", pairs()), tmp_path / "root")


def test_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a" * 20, "completion": "b"}])
    with pytest.raises(
        DataError, match=r"in none of 1 documents is there a token to learn in the first 8; give a larger --context, or --loss"
    ):
        make(path, tmp_path / "root")
    text = tmp_path / "a.txt"
    text.write_text("abcdefgh")
    with pytest.raises(
        DataError, match=r"has 8 tokens, and a row of 8 with the token after it takes 9; give more text, or a smaller --context"
    ):
        make(text, tmp_path / "root", form="windows")


def test_files_of_a_folder_are_documents_with_an_end(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path / "t", begins=True)))
    (tmp_path / "texts").mkdir()
    for name, text in (("a.txt", "the cat"), ("b.txt", "the dog")):
        (tmp_path / "texts" / name).write_text(text)
    cache, _ = make(tmp_path / "texts", tmp_path / "root", tokenizer, form="packed")
    cat, dog = (ids.tolist() for ids in tokenizer.encode(["the cat", "the dog"]))
    assert cache.tokens.tolist() == [2, *cat, 0, 2, *dog, 0]
    assert cache.pieces.tolist()[0] == [0, len(cat) + 1]
    assert cache.stats.documents == 2


def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "word " * 2000}) + "\n"
    path.write_text(line * 150)  # more than is tokenised at once: the heap keeps what that takes
    make(path, tmp_path / "root", context=64)
    path.write_text(line * 1000)
    before = private_bytes()
    cache, _ = make(path, tmp_path / "root", context=64)
    assert len(cache.tokens) == 10_000_000
    assert int(np.asarray(cache.tokens).max()) < 256
    shutil.rmtree(tmp_path / "root")
    assert private_bytes() - before < 5_000_000


def test_texts_of_no_token_keep_their_row_where_answers_are_told_apart_by_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": ""}, {"text": "c"}])
    left_out, _ = make(path, tmp_path / "root", form="labelled")
    kept, _ = make(path, tmp_path / "root", form="labelled", filler=300)
    assert (left_out.stats.rows, left_out.stats.left_out, kept.stats.rows, kept.stats.left_out, kept.stats.filled) == (
        2,
        1,
        3,
        0,
        1,
    )
    assert [kept.tokens[start : start + size].tolist() for start, size in kept.pieces] == [[97, 98], [300], [99]]


def test_what_a_killed_process_has_left_goes_and_what_another_writes_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over_nfs(descriptor: int, operation: int) -> None:
        """Locks of folders count for one machine alone: another one gets them too."""
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            lock(descriptor, operation)

    lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", over_nfs)
    root = tmp_path / "root"
    root.mkdir()
    abandoned, new = (root / f".tokens-{'0' * 24}-{name}" for name in ("abcdefgh", "abcdefgi"))
    for folder in (abandoned, new):
        folder.mkdir()
    (abandoned / "tokens.bin").write_text("x")
    for name in (f"{abandoned.name}.lock", f"{abandoned.name[:-1]}x.lock"):  # of a process that was killed after the renaming too
        (root / name).write_text("")
    with unfinished(root / f"tokens-{'1' * 24}") as being_written:
        (being_written / "tokens.bin").write_text("x")
        cache, _ = make(write_jsonl(tmp_path / "a.jsonl", pairs()), root)
        lock_file = root / f"{being_written.name}.lock"
        assert sorted(root.iterdir()) == sorted([new, being_written, lock_file, cache.folder])
    assert sorted(root.iterdir()) == sorted([new, cache.folder])
