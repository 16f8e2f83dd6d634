"""Preprocessing: what the model sees of bytes and other numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.datasets import NOWHERE, everything, image_bytes, save
from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.datasets import find_dataset, make_dataset
from lowmem_pnn.sources.map_split import from_torch


@pytest.mark.parametrize(
    ("raw", "input_form", "shape", "words"),
    [
        ((4, 5), "any", (1, 4, 5), "uint8 / 255, HW to CHW"),
        ((4, 5), "flat", (20,), "uint8 / 255, HW to CHW, flattened"),
        ((4, 5), "image3", (3, 4, 5), "uint8 / 255, HW to CHW, grey repeated to 3 channels"),
        ((4, 5, 3), "any", (3, 4, 5), "uint8 / 255, HWC to CHW"),
        ((4, 5, 3), "flat", (60,), "uint8 / 255, HWC to CHW, flattened"),
        ((4, 5, 3), "image3", (3, 4, 5), "uint8 / 255, HWC to CHW"),
        ((4, 5, 1), "image3", (3, 4, 5), "uint8 / 255, HWC to CHW, grey repeated to 3 channels"),
        ((3, 4, 5), "image3", (3, 4, 5), "uint8 / 255"),
        ((1, 4, 5), "any", (1, 4, 5), "uint8 / 255"),
        ((7,), "flat", (7,), "uint8 / 255"),
    ],
)
def test_bytes_are_presented_as_images(
    raw: tuple[int, ...], input_form: Any, shape: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    x = image_bytes(raw)
    dataset = find_dataset(save(tmp_path / "a.npz", x_train=x, y_train=np.arange(6)), NOWHERE, input_form)
    found, _ = dataset.train.batch([3, 1])
    expected = torch.from_numpy(x[[3, 1]]).float().div(255)
    if "HWC" in words:
        expected = expected.permute(0, 3, 1, 2)
    if "repeated" in words:
        expected = expected.reshape(2, 1, 4, 5).repeat(1, 3, 1, 1)
    assert torch.equal(found, expected.reshape(2, *shape))
    assert found.is_contiguous()
    assert (dataset.sample_shape, dataset.dtype, dataset.preprocessing) == (shape, torch.float32, words)


def test_bytes_are_as_torchvision_presents_them() -> None:
    from torchvision.transforms.functional import to_tensor

    x = image_bytes((8, 9, 3))
    found, _ = from_torch((x, np.arange(6))).batch([2])
    assert torch.equal(found[0], to_tensor(x[2]))


@pytest.mark.parametrize(
    ("dtype", "input_form", "shape", "expected_shape", "expected_dtype"),
    [
        (torch.float32, "any", (4, 5), (4, 5), torch.float32),
        (torch.float32, "any", (4, 5, 3), (4, 5, 3), torch.float32),
        (torch.float64, "flat", (4, 5), (20,), torch.float32),
        (torch.float16, "image3", (4, 5), (3, 4, 5), torch.float32),
        (torch.float32, "image3", (4, 5, 3), (3, 4, 5), torch.float32),
        (torch.float32, "image3", (3, 3, 3), (3, 3, 3), torch.float32),
        (torch.int64, "any", (7,), (7,), torch.int64),
        (torch.int32, "any", (7,), (7,), torch.int64),
        (torch.int64, "flat", (7,), (7,), torch.float32),
        (torch.bool, "any", (7,), (7,), torch.float32),
    ],
)
def test_other_numbers_keep_their_values(
    dtype: torch.dtype, input_form: Any, shape: tuple[int, ...], expected_shape: tuple[int, ...], expected_dtype: torch.dtype
) -> None:
    x = torch.arange(6 * int(np.prod(shape))).reshape(6, *shape).to(dtype)
    dataset = make_dataset((x, torch.arange(6)), name="numbers", input_form=input_form)
    found, _ = everything(dataset.train)
    assert (found.shape[1:], found.dtype) == (expected_shape, expected_dtype)
    assert (dataset.sample_shape, dataset.dtype) == (expected_shape, expected_dtype)
    if shape == expected_shape:
        assert torch.equal(found, x.to(expected_dtype))


@pytest.mark.parametrize("shape", [(7,), (4, 5, 4), (2, 3, 4, 5)])
def test_what_is_no_image_is_refused_where_images_are_wanted(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"samples have shape \(.*\), but the model takes images of three channels; give images"):
        from_torch((image_bytes(shape), np.arange(6)), input_form="image3")
