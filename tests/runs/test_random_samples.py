"""Data sets with random transforms: every reading of a sample in an epoch is the same, and that of a plain loop that seeds it alike."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

import lowmem_pnn
from helpers.datasets import Drawn
from helpers.displays import Messages, StopsAt
from helpers.plainloops import assert_same_weights, backward_of, built, cross_entropy, loaded, train_epochs, training_split
from helpers.small_networks import vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import Stopped
from lowmem_pnn.seeds import permutation_of, seed_of, seeded

OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 10, "micro_batch": 4, "lr": 0.01, "seed": 3}
DATA: Any = Drawn(list(zip(*vectors(), strict=True)))


def network() -> nn.Module:
    """Draws itself, so that the generators of training are at stake."""
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))


def fit(folder: Path, data: Any = DATA, **options: Any) -> Any:
    return lowmem_pnn.fit(network, data, workdir=folder, max_gpu_mem="400MB", device="cpu", **{**OPTIONS, **options})


def drawn(*key: int | str) -> Any:
    """A sample, as the documentation says that it is drawn."""
    with seeded(seed_of(*key)):
        return DATA[key[-1]]


@functools.cache
def plainly() -> nn.Module:
    """A loop that reads anew in every epoch."""
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", method="exact", **OPTIONS)
    split: Any = training_split(DATA, **OPTIONS)
    model, epochs = built(network, config.seed).train(), [0]

    def order_of(epoch: int) -> np.ndarray:
        epochs.append(epoch)
        return permutation_of(len(split), config.seed, "epoch", epoch)

    train_epochs(
        model,
        backward_of(model, functools.partial(cross_entropy, config)),
        lambda places: default_collate([drawn(3, "sample", "epoch", epochs[-1], int(i)) for i in split.numbers[places]]),
        order_of,
        config,
        groups={0: list(model.parameters())},
        epochs=2,
        batch_size=10,
        place=("forward", 0),
    )
    return model


@pytest.mark.parametrize("options", [{"cuts": "1,2"}, {"method": "backprop"}], ids=str)
def test_as_a_plain_loop_that_seeds_each_sample(options: dict[str, Any], tmp_path: Path) -> None:
    display = Messages()
    options = {"method": "exact", **options}
    result = fit(tmp_path / "run", display=display, **options)
    assert_same_weights(loaded(network, result.weights_file), plainly())
    (note,) = [note for note in result.notes if "draws training samples at random, anew in every epoch" in note]
    assert note.endswith("; they are read between batches, with --workers N beside them")
    assert note in "".join(display.texts)
    with torch.no_grad():
        config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **OPTIONS)
        held_out = sorted(set(range(40)) - set(training_split(DATA, **OPTIONS).numbers.tolist()))  # type: ignore[attr-defined]
        x, y = default_collate([drawn("sample", number) for number in held_out])
        assert result.val_loss == pytest.approx(float(cross_entropy(config, plainly().eval()(x), y)), rel=1e-5)
        plainly().train()


def test_a_run_that_was_stopped_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    for at in (3, 6):
        with pytest.raises(Stopped):
            fit(tmp_path / "run", method="exact", cuts="1", commit_every=0, display=StopsAt(at), resume=at > 3)
        torch.rand(at)
    result = fit(tmp_path / "run", method="exact", cuts="1", commit_every=0, resume=True)
    assert_same_weights(loaded(network, result.weights_file), plainly())
