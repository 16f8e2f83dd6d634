"""Files of tokens, as nanoGPT writes them: mapped, cast batch by batch, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.language import write_tokenizer
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.language.token_file import open_token_file
from lowmem_pnn.memory.process_meter import private_bytes


def write(folder: Path, values: Any, dtype: str = "uint16") -> Path:
    path = folder / "train.bin"
    np.asarray(values).astype(dtype).tofile(path)
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_windows_and_the_tokens_after(dtype: str, tmp_path: Path) -> None:
    dataset = open_token_file(f"{write(tmp_path, range(12), dtype)},dtype={dtype}", 4, None)
    x, y = dataset.train.batch([1, 0])
    assert (x.tolist(), y.tolist()) == ([[4, 5, 6, 7], [0, 1, 2, 3]], [[5, 6, 7, 8], [1, 2, 3, 4]])
    assert (x.dtype, y.dtype, len(dataset.train), dataset.test, dataset.num_classes) == (torch.int64, torch.int64, 2, None, 12)
    assert dataset.preprocessing == f"12 tokens ({dtype}), windows of 4 with the token after each as its label"


def test_the_vocabulary_may_be_said(tmp_path: Path) -> None:
    path = write(tmp_path, range(20))
    assert open_token_file(f"{path},vocab=50257", 4, None).num_classes == 50257
    assert open_token_file(f"{path},vocab=30,dtype=uint16", 4, None).num_classes == 30
    assert open_token_file(str(path), 4, str(write_tokenizer(tmp_path / "t"))).num_classes == 279
    assert len(open_token_file(str(path), 4, None).train) == 4


def test_the_file_stays_on_disk(tmp_path: Path) -> None:
    path = write(tmp_path, np.arange(8_000_000) % 50_000)  # 16 MB
    before = private_bytes()
    dataset = open_token_file(str(path), 1024, None)
    for number in range(0, len(dataset.train), 64):
        dataset.train.batch([number])
    assert private_bytes() - before < 4_000_000


@pytest.mark.parametrize(
    ("values", "more", "text"),
    [
        ([], "", "is empty; a window of 4 tokens and the token after it are 5; give a longer file"),
        (
            [1, 2, 3],
            "",
            "has 3 tokens; a window of 4 tokens and the token after it are 5; give a longer file, or --context 2 at most",
        ),
        (range(9), ",dtype=int64", "has 18 bytes, no whole number of int64 (8 each); give its dtype"),
        ([65535] * 10, ",dtype=int32", "holds -1, and tokens are numbers from 0; give its dtype"),
        (range(9), ",vocab=8", "holds token 8, and there are 8; give its dtype, or a larger vocab=N"),
        (range(9), ",dtype=float32", "dtype 'float32' is none of uint8, uint16, uint32, int32, int64"),
        (range(9), ",vocab=0", "vocab=0 is no number of tokens; give one from 1"),
        (range(9), ",order=up", "has no option 'order'; write tokens:FILE,dtype=uint16,vocab=N"),
    ],
)
def test_what_is_refused(values: Any, more: str, text: str, tmp_path: Path) -> None:
    path = write(tmp_path, values)
    with pytest.raises((ConfigError, DataError)) as error:
        open_token_file(f"{path}{more}", 4, None)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"there is no file {tmp_path / 'x.bin'}; give tokens:FILE"):
        open_token_file(str(tmp_path / "x.bin"), 4, None)
    with pytest.raises(DataError, match=r"is a folder; give tokens:FILE with one file"):
        open_token_file(str(tmp_path), 4, None)
