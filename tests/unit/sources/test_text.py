"""Text as data: windows of bytes, the held-out tail, and what is refused."""

import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.sources.datasets import Dataset, find_dataset
from lowmem_pnn.sources.subsets import subset, train_val_split
from lowmem_pnn.sources.text import open_text

NOWHERE = Path("no-such-root")


def write(folder: Path, content: bytes | int, name: str = "a.txt") -> Path:
    """A file of these bytes, or of as many random ones."""
    path = folder / name
    path.write_bytes(np.random.RandomState(0).bytes(content) if isinstance(content, int) else content)
    return path


def find(path: Path, context: int | None = None) -> Dataset:
    return find_dataset(f"text:{path}", NOWHERE, "any", context=context)


def everything(split: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return split.batch(range(len(split)))


def test_windows_are_bytes_and_their_successors(tmp_path: Path) -> None:
    dataset = find(write(tmp_path, b"abcdefghijkl!?"), context=3)
    assert dataset.test is not None
    # 14 bytes: windows 'abc', 'def', 'ghi', 'jkl'; '!' is a label only, '?' nothing.
    x, y = dataset.train.batch([2, 0, 2])
    assert [bytes(row.tolist()) for row in x] == [b"ghi", b"abc", b"ghi"]
    assert [bytes(row.tolist()) for row in y] == [b"hij", b"bcd", b"hij"]
    x, y = everything(dataset.test)
    assert (bytes(x[0].tolist()), bytes(y[0].tolist()), len(x)) == (b"jkl", b"kl!", 1)
    assert (dataset.name, dataset.num_classes, dataset.dtype) == ("a", 256, torch.int64)
    assert dataset.sample_shape == dataset.label_shape == (3,)
    assert dataset.preprocessing == (
        "bytes as tokens, windows of 3 with the byte after each token as its label, the last 1 of 4 windows for the test"
    )


def test_text_whose_test_part_is_apart_is_left_whole(tmp_path: Path) -> None:
    path = write(tmp_path, b"abcdefghijkl!?")
    whole = open_text(path, 3, whole=True)
    assert (len(whole.train), whole.test) == (4, None)
    assert whole.preprocessing == "bytes as tokens, windows of 3 with the byte after each token as its label"
    assert whole.fingerprint != open_text(path, 3).fingerprint
    assert len(open_text(path, 13, whole=True).train) == 1
    with pytest.raises(
        DataError, match=r"has 14 bytes; a window of 14 tokens .* and the byte after it are 15; give .* a context of at most 13$"
    ):
        open_text(path, 14, whole=True)


@given(st.integers(1, 9), st.integers(2, 45), st.integers(0, 8))
def test_every_window_is_once_in_train_or_test(context: int, num_windows: int, rest: int) -> None:
    size = num_windows * context + 1 + rest % context
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), size)
        dataset, content = find(path, context), path.read_bytes()
        assert dataset.test is not None
        assert len(dataset.test) == max(1, num_windows // 10)
        parts = [everything(part) for part in (dataset.train, dataset.test)]
    x, y = (torch.cat([part[which] for part in parts]) for which in (0, 1))
    assert bytes(x.flatten().tolist()) == content[: num_windows * context]
    assert bytes(y.flatten().tolist()) == content[1 : num_windows * context + 1]


def test_nothing_that_is_tested_is_seen_in_training(tmp_path: Path) -> None:
    path = write(tmp_path, 2000)
    before = everything(find(path, 10).train)
    test = find(path, 10).test
    assert test is not None
    first_label = len(before[0]) * 10 + 1
    content = bytearray(path.read_bytes())
    assert content[first_label] == test.batch([0])[1][0, 0]
    content[first_label:] = bytes(len(content) - first_label)
    after = everything(find(write(tmp_path, bytes(content)), 10).train)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_the_window_is_256_tokens_where_the_model_names_none(tmp_path: Path) -> None:
    path = write(tmp_path, 3000)
    assert find(path).sample_shape == (256,)
    assert len(find(path).train) == 10
    assert find(path, 100).sample_shape == (100,)


def test_a_batch_is_the_receivers_own_and_aligned(tmp_path: Path) -> None:
    path = write(tmp_path, 1000)
    split = find(path, 7).train
    x, y = split.batch([0, 5, 1])
    before = x.clone()
    assert x.dtype == y.dtype == torch.int64
    for tensor in (x, y):
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
    x.zero_()
    assert torch.equal(y, split.batch([0, 5, 1])[1])
    assert torch.equal(before, split.batch([0, 5, 1])[0])


def test_it_can_be_divided_further(tmp_path: Path) -> None:
    whole = find(write(tmp_path, 1101), 10).train
    train, val = train_val_split(whole, 0.2, seed=0, limit=50)
    assert val is not None
    assert (len(train), len(val)) == (40, 10)
    windows = [tuple(row.tolist()) for part in (train, val) for row in everything(part)[0]]
    assert len(set(windows)) == 50
    chosen = subset(whole, np.array([7, 3]))
    assert torch.equal(chosen.batch([1])[1], whole.batch([3])[1])
    for each in (whole, chosen):
        with pytest.raises(IndexError, match="indices"):
            each.batch([len(each)])


def test_a_fingerprint_changes_with_content_and_context_only(tmp_path: Path) -> None:
    path = write(tmp_path, 3_000_000)
    first = find(path, 10).fingerprint
    content = bytearray(path.read_bytes())
    assert find(write(tmp_path, bytes(content), "b.txt"), 10).fingerprint == first
    assert find(path, 11).fingerprint != first
    content[-1] ^= 1
    assert find(write(tmp_path, bytes(content), "b.txt"), 10).fingerprint != first
    assert find(write(tmp_path, bytes(content[:-1]), "b.txt"), 10).fingerprint != first


def test_a_large_file_takes_no_private_memory(tmp_path: Path) -> None:
    def private_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(200 * 10**6)
    before = private_bytes()
    dataset = find(path, 1000)
    x, _ = dataset.train.batch(range(0, len(dataset.train), 1000))
    assert private_bytes() - before < 20 * 10**6
    assert x.shape == (180, 1000)


@pytest.mark.parametrize("change", ["truncated", "longer", "rewritten"])
def test_a_file_that_is_changed_under_a_run_is_refused(change: str, tmp_path: Path) -> None:
    path = write(tmp_path, 100_000)
    dataset = find(path, 10)
    dataset.train.batch([0])
    if change == "rewritten":
        status = path.stat()
        path.write_bytes(bytes(100_000))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    else:
        os.truncate(path, 10 if change == "truncated" else 100_001)
    with pytest.raises(DataError, match=r"a.txt' was changed while it is used: it had 100,000 bytes, it has [\d,]+ and another"):
        dataset.train.batch([8000])


def test_a_file_that_is_replaced_or_deleted_stays_what_it_was(tmp_path: Path) -> None:
    path = write(tmp_path, 100_000)
    split = find(path, 10).train
    before = split.batch([8000])
    write(tmp_path, b"other", "b.txt").replace(path)
    assert torch.equal(split.batch([8000])[0], before[0])


def test_what_is_no_text_is_said(tmp_path: Path) -> None:
    for content, message in (
        (b"", r"a.txt' is empty; two windows of 8 tokens .* and the byte after them are 17; give a longer file$"),
        (b"ab", r"a.txt' has 2 bytes; .* are 17; give a longer file$"),
        (b"x" * 16, r"a.txt' has 16 bytes; .* are 17; give a longer file, or a model with a context of at most 7$"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            find(write(tmp_path, content), 8)
        assert "\n" not in str(raised.value)
    assert len(find(write(tmp_path, b"x" * 16), 7).train) == 1
    assert len(find(write(tmp_path, b"x" * 17), 8).train) == 1
    with pytest.raises(DataError, match=rf"there is no file {tmp_path}/none.txt; give text:FILE"):
        find(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"is a folder; give text:FILE with one file"):
        find(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe' is no regular file"):
        find(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"a.txt/b' cannot be read: Not a directory; give text:FILE"):
        find(tmp_path / "a.txt" / "b")


@pytest.mark.parametrize(("input_form", "word"), [("flat", "flat vectors"), ("image3", "images")])
def test_tokens_are_for_models_of_tokens(input_form: Any, word: str, tmp_path: Path) -> None:
    path = write(tmp_path, 2000)
    with pytest.raises(
        ConfigError, match=rf"holds tokens, and the model takes {word}; give a model of tokens, such as --model gpt:"
    ):
        find_dataset(f"text:{path}", NOWHERE, input_form)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text:", r"data set 'text:' says no place"),
        ("my.txt", r"'my.txt' looks like a file, which is not there; write text:my.txt"),
    ],
)
def test_a_name_without_a_place_or_a_form_is_said(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_dataset(spec, NOWHERE, "any")


def test_opening_leaves_no_file_open(tmp_path: Path) -> None:
    path = write(tmp_path, 1000)

    def count() -> int:
        # The descriptor that lists the folder is among them each time.
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()  # files of other tests' runs, which would close themselves meanwhile
    before = count()
    text = open_text(path, 10)
    assert count() > before
    del text
    assert count() == before


@pytest.mark.skipif(
    not Path(os.environ.get("LOWMEM_PNN_DATA", "none"), "tinyshakespeare.txt").is_file(),
    reason="needs tinyshakespeare.txt in LOWMEM_PNN_DATA",
)
def test_tinyshakespeare_opens() -> None:
    dataset = find(Path(os.environ["LOWMEM_PNN_DATA"]) / "tinyshakespeare.txt")
    assert dataset.test is not None
    # 1,115,394 bytes.
    assert (len(dataset.train), len(dataset.test), dataset.name) == (3922, 435, "tinyshakespeare")
    x, y = dataset.train.batch([0])
    assert bytes(x[0].tolist()).startswith(b"First Citizen:\nBefore we proceed any further, hear me speak.")
    assert torch.equal(x[0, 1:], y[0, :-1])
