"""Augmentation: torchvision's own policies, each image's choices a function of seed, epoch and sample, and of nothing else."""

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from helpers.datasets import image_bytes
from lowmem_pnn.errors import DataError
from lowmem_pnn.samples.augment import Augmenter, RandomCropFlip, policy_seed

IMAGES = torch.from_numpy(image_bytes((3, 16, 16), num=12)) / 255
NUMBERS = np.arange(12)
POLICIES = [("randaugment", v2.RandAugment()), ("trivial", v2.TrivialAugmentWide())]


def augmented(kind: Any, numbers: np.ndarray = NUMBERS, seed: int = 3, epoch: int = 1) -> torch.Tensor:
    return Augmenter(kind, 12, seed)(IMAGES[numbers], numbers, ("epoch", epoch))


@pytest.mark.parametrize(("kind", "policy"), POLICIES)
def test_policies_are_those_of_torchvision_after_crops_and_flips(kind: Any, policy: Any) -> None:
    cropped = RandomCropFlip(12, 3, ("epoch", 1))(IMAGES, NUMBERS)
    made = augmented(kind)
    for number in range(12):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(policy_seed(3, kind, ("epoch", 1), number))
            assert torch.equal(made[number], policy(cropped[number]))
    assert sum(not torch.equal(*pair) for pair in zip(made, cropped, strict=True)) >= 8


@pytest.mark.parametrize("kind", ["basic", "randaugment", "trivial"])
def test_pixels_are_a_function_of_seed_epoch_and_sample(kind: Any) -> None:
    made = augmented(kind)
    for numbers in (np.array([7]), np.array([5, 0, 11, 5])):
        assert torch.equal(augmented(kind, numbers), made[numbers])
    assert not torch.equal(augmented(kind, epoch=2), made)
    assert not torch.equal(augmented(kind, seed=4), made)


@pytest.mark.parametrize("kind", ["basic", "randaugment", "trivial"])
def test_the_generators_of_torch_and_numpy_stay_as_they_are(kind: Any) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for epoch in range(20):
        augmented(kind, epoch=epoch)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_basic_alone_is_crops_and_flips() -> None:
    augment = Augmenter("basic", 12, 3)
    for key in (("epoch", 0), ("epoch", 1), ("view", 0), ("epoch", 0)):
        assert torch.equal(augment(IMAGES, NUMBERS, key), RandomCropFlip(12, 3, key)(IMAGES, NUMBERS))


def test_policies_refuse_what_has_no_brightness() -> None:
    with pytest.raises(
        DataError,
        match=r"--augment trivial is for images with values from 0 to 1, and those of data a are from \d+ to 255; bring them to that range, "
        r"or give --augment basic$",
    ):
        Augmenter("trivial", 1, 0, "data a")(torch.full((1, 3, 8, 8), 255.0), np.array([0]), ("epoch", 0))
