"""Samples to predict or to score: their targets are in a form that holds them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import DataError
from lowmem_pnn.inference.samples import OpenPart, SamplesToPredict, open_samples
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.dataset import FRAME_COLUMNS
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.targets import TargetOptions, Targets
from lowmem_pnn.workload.data_form import DataForm
from lowmem_pnn.zoo.models import find_model


def test_masks_that_bytes_do_not_hold_keep_their_values() -> None:
    form = DataForm((TensorSpec((3, 4, 5), torch.float32),), None, Targets("mask", 2, (4, 5), torch.uint8, -100), ())
    masks = torch.ones(2, 4, 5, dtype=torch.int64)
    masks[1, 2] = -100
    split = from_torch((torch.rand(2, 3, 4, 5), masks), options=TargetOptions(ignored=-100))
    samples = SamplesToPredict([OpenPart.of_split(split, True)], form, None, "mine", None)
    assert torch.equal(samples.batch([0, 1])[1], masks)


def test_tables_that_a_function_returns_have_the_columns_of_the_training_data(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import pandas as pd\n\ndef frame():\n    return pd.DataFrame({'b': [1.0, 2.0], 'a': [3.0, 4.0]}), [0, 1]\n"
    )
    config = configure(max_gpu_mem="1GB", model="mlp:2-2", data="digits", device="cpu")
    form = DataForm((TensorSpec((2,), torch.float32),), None, Targets("class", 2), ())
    spec = f"{tmp_path / 'mine.py'}:frame"
    source = find_model("mlp:2-2", {}, 2)

    def opened(columns: list[str]) -> Any:
        return open_samples(spec, None, config, form, source, {FRAME_COLUMNS: columns}, TargetOptions())

    assert opened(["b", "a"]).split.batch([0, 1])[1].tolist() == [0, 1]
    with pytest.raises(DataError, match=r"mine.py:frame: column 1 is 'b', and 'a' in the training data; give its columns"):
        opened(["a", "b"])
