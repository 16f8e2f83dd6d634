"""Image processors of trained models: transformers shows a model images as its run did, or no words for that are left."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.datasets import everything
from lowmem_pnn.config.configure import configure
from lowmem_pnn.exporting.image_processor import image_processor, keeps_processor
from lowmem_pnn.workload.data_form import DataForm
from lowmem_pnn.workload.inputs import open_data


def run_of(folder: Path, sizes: list[tuple[int, int]], **options: Any) -> tuple[Any, Any, list[Path], torch.Tensor]:
    """Options and result of a run on photos of some sizes, as far as they are looked at; the photos, and what the model is shown."""
    paths = [folder / "data" / "test" / "all" / f"{number}.png" for number in range(len(sizes))]
    paths[0].parent.mkdir(parents=True)
    draws = np.random.RandomState(0)
    for path, (width, height) in zip(paths, sizes, strict=True):
        Image.fromarray(draws.randint(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    shutil.copytree(folder / "data" / "test", folder / "data" / "train")
    config = configure(
        max_gpu_mem="100MB", model="resnet18", data=f"imagefolder:{folder / 'data'}", device="cpu", val_fraction=0, **options
    )
    _, dataset, splits, _ = open_data(config)
    form = DataForm.of(dataset).to_dict()
    result = SimpleNamespace(preprocessing=dataset.preprocessing, preparation=dataset.preparation, form=form)
    return config, result, paths, everything(splits["test"])[0]


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ([(10, 7), (10, 7)], {}),
        ([(16, 8), (8, 12), (24, 16)], {"image_size": 8, "normalize": "0.4/0.3"}),
        ([(16, 9), (7, 12)], {"image_size": "8x6", "resize": "squash", "normalize": "imagenet"}),
    ],
)
def test_images_are_prepared_as_in_training(sizes: list[tuple[int, int]], options: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    config, result, paths, x = run_of(tmp_path, sizes, **options)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor(config, result)))
    found = AutoImageProcessor.from_pretrained(tmp_path)([Image.open(path) for path in paths], return_tensors="pt")
    torch.testing.assert_close(found["pixel_values"], x, rtol=0, atol=1e-5)


def test_where_there_are_no_words_for_it_there_is_no_file(tmp_path: Path) -> None:
    config, result, _, _ = run_of(tmp_path, [(16, 9), (7, 12)], image_size=8, resize="pad")
    assert image_processor(config, result) is None
    digits = SimpleNamespace(**{**vars(result), "preprocessing": "values / 16"})
    given = SimpleNamespace(**{**vars(result), "preprocessing": "float64 to float32"})
    plain = SimpleNamespace(image_shape=None, resize="crop")
    assert image_processor(plain, digits) is None  # type: ignore[arg-type]
    source = SimpleNamespace(transformers=SimpleNamespace(task="image-classification"))
    text = SimpleNamespace(transformers=SimpleNamespace(task="causal-lm"))
    kept = [
        keeps_processor(*each)
        for each in ((source, config, given), (source, plain, given), (source, plain, digits), (text, config, result))
    ]  # type: ignore[arg-type]
    assert kept == [False, True, False, True]
