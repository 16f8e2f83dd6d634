"""Normalisation: by given statistics, those of pretrained weights, or those of training samples; the same pixels as torchvision's."""

import re
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from helpers.datasets import image_bytes
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.samples.normalization import Normalization, find_normalization
from lowmem_pnn.sources.image_stats import ImageStats
from lowmem_pnn.sources.map_split import from_torch

IMAGES = torch.from_numpy(image_bytes((3, 8, 8), num=20))
TRAIN = from_torch((IMAGES, torch.arange(20)))
WEIGHTS = ImageStats(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), size=(224, 224))


def find(option: str, train: Any = TRAIN, known: ImageStats | None = None, seed: int = 0) -> Normalization:
    found = find_normalization(option, train, seed, known, "a")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("option", "known", "mean", "std", "words"),
    [
        ("imagenet", None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "mean 0.485, 0.456, 0.406 .*, those of ImageNet$"),
        ("auto", WEIGHTS, WEIGHTS.mean, WEIGHTS.std, "mean 0.5, 0.4, 0.3 and .*, those of the pretrained weights$"),
        ("0.5/0.25", WEIGHTS, (0.5,), (0.25,), "normalised by mean 0.5 and deviation 0.25$"),
        ("0.5,0.4,0.3/0.2,0.2,0.1", None, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "mean 0.5, 0.4, 0.3 and deviation 0.2, 0.2, 0.1$"),
    ],
)
def test_pixels_are_those_of_torchvision(option: str, known: ImageStats | None, mean: Any, std: Any, words: str) -> None:
    normalization = find(option, known=known)
    images = IMAGES / 255
    assert torch.equal(normalization(images.clone()), v2.Normalize(mean, std)(images))
    assert re.search(words, normalization.step)


def test_auto_takes_the_statistics_of_training_samples() -> None:
    normalization = find("auto")
    values = IMAGES.to(torch.float64).movedim(1, 0).flatten(1) / 255
    assert normalization.mean == pytest.approx(values.mean(dim=1).tolist(), rel=1e-3)
    assert normalization.std == pytest.approx(values.std(dim=1, correction=0).tolist(), rel=1e-3)
    assert all(len(f"{value:g}") <= 6 for value in normalization.mean + normalization.std)
    assert normalization.step.endswith(", those of 20 training samples")


def test_auto_of_many_samples_is_a_choice_of_the_seed() -> None:
    train = from_torch((torch.rand(3000, 1, 2, 2), torch.zeros(3000)))
    first, again, other = (find("auto", train, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first.step.endswith(", those of 1,024 training samples")


def test_a_channel_of_one_value_is_only_shifted() -> None:
    assert find("auto", from_torch((torch.full((4, 1, 2, 2), 0.25), torch.zeros(4)))) == Normalization(
        (0.25,), (1.0,), ", those of 4 training samples"
    )


def test_flat_samples_have_one_mean() -> None:
    train = from_torch((IMAGES, torch.arange(20)), input_form="flat")
    normalization = find("auto", train)
    x = train.batch(range(3))[0]
    assert torch.equal(normalization(x.clone()), (x - normalization.mean[0]) / normalization.std[0])


def test_as_many_means_as_channels_are_asked_for() -> None:
    grey = from_torch((IMAGES[:, :1], torch.arange(20)))
    for option, train, message in (
        (
            "imagenet",
            grey,
            r"--normalize imagenet has 3 means, and the samples of data a have 1 channel; give one mean and deviation, or",
        ),
        (
            "1,2/3,4",
            TRAIN,
            r"--normalize 1,2/3,4 has 2 means, and the samples of data a have 3 channels; give one mean .*, or 3, or ",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            find(option, train)
    with pytest.raises(ConfigError, match=r"the pretrained weights have 3 means, and the samples of data a have 1 channel"):
        find("auto", grey, WEIGHTS)
