"""Mixing of batches: torchvision's own values, to the bit, from a seed of the batch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from lowmem_pnn.errors import DataError
from lowmem_pnn.samples.batch_mixer import BatchMixer, mixing_seed

KEY = ("epoch", 3)
OF: dict[str, tuple[dict[str, float], Callable[[], Any]]] = {
    "mixup": ({"mixup": 0.3}, lambda: v2.MixUp(alpha=0.3, num_classes=5)),
    "cutmix": ({"cutmix": 1.0}, lambda: v2.CutMix(alpha=1.0, num_classes=5)),
    "both": (
        {"mixup": 0.3, "cutmix": 1.0},
        lambda: v2.RandomChoice([v2.MixUp(alpha=0.3, num_classes=5), v2.CutMix(alpha=1.0, num_classes=5)]),
    ),
}


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(7, 3, 12, 9, generator=torch.Generator().manual_seed(1)), torch.arange(7) % 5


@pytest.mark.parametrize("kind", OF)
def test_mixed_as_torchvision_mixes(kind: str) -> None:
    options, make = OF[kind]
    mixer, theirs = BatchMixer(7, 5, **options), make()
    x, y = batch()
    seen = set()
    for number in range(12):
        ours = mixer(x, y, KEY, number)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixing_seed(7, KEY, number))
            expected = theirs(x, y)
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])
        seen.add(float((ours[0] == x).float().mean()) > 0.02)  # a box leaves the rest of an image as it was
    assert seen == {"mixup": {False}, "cutmix": {True}, "both": {False, True}}[kind]
    assert torch.equal(x, batch()[0]), "the samples stay as they are"


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    BatchMixer(0, 5, 0.2, 0.7)(*batch(), KEY, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_epoch_and_batch_each_draw_anew() -> None:
    x, y = batch()
    places = [(0, ("epoch", 0), 0), (1, ("epoch", 0), 0), (0, ("epoch", 1), 0), (0, ("epoch", 0), 1), (0, ("recovery", 0), 0)]
    labels = [BatchMixer(seed, 5, 1.0)(x, y, key, number)[1] for seed, key, number in places]
    assert len({tuple(one.flatten().tolist()) for one in labels}) == len(places)


def test_probabilities_are_mixed_as_they_are() -> None:
    x, y = batch()
    mixer = BatchMixer(0, 5, 1.0)
    assert torch.equal(mixer(x, y, KEY, 0)[1], mixer(x, torch.eye(5)[y], KEY, 0)[1])


def test_samples_without_height_and_width_are_added_in_the_share_of_the_box() -> None:
    x = torch.rand(4, 6)
    mixed, labels = BatchMixer(0, 4, cutmix=1.0)(x, torch.arange(4), KEY, 0)
    share = labels[0, 0]
    assert 0 < share < 1
    assert torch.allclose(mixed, x * share + x.roll(1, 0) * (1 - share))


def test_a_label_that_is_left_out_is_refused() -> None:
    with pytest.raises(DataError) as error:
        BatchMixer(0, 5, cutmix=1.0)(batch()[0], torch.tensor([0, 1, -100, 2, 3, 4, 0]), KEY, 0)
    assert str(error.value) == (
        "label -100 is none of the 5 classes, and --cutmix mixes the labels of all samples; leave the samples that have it out of the "
        "data, or leave --cutmix out"
    )
