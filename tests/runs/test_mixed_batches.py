"""MixUp and CutMix: training on mixed batches is that of a plain loop with torchvision's transforms, whatever the cuts and micro-batches."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

import lowmem_pnn
from helpers.plainloops import (
    assert_same_weights,
    backward_of,
    built,
    loaded,
    train_epochs,
    training_split,
)
from helpers.small_networks import Data, conv_layers, images, small_conv, small_mlp, vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, DataError, Stopped
from lowmem_pnn.samples.batch_mixer import mixing_seed
from lowmem_pnn.seeds import permutation_of

OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 0.01, "val_fraction": 0.2, "seed": 3, "compare": False}
MIXING: dict[str, Callable[[int], Any]] = {
    "mixup": lambda classes: v2.MixUp(alpha=0.4, num_classes=classes),
    "cutmix": lambda classes: v2.CutMix(alpha=1.0, num_classes=classes),
    "both": lambda classes: v2.RandomChoice(
        [v2.MixUp(alpha=0.4, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)]
    ),
}
ASKED = {"mixup": {"mixup": 0.4}, "cutmix": {"cutmix": 1.0}, "both": {"mixup": 0.4, "cutmix": 1.0}}


class StopsAt(lowmem_pnn.Callback):
    """Ends a run after some steps, as a signal would, but without a commit of its own."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, info: Mapping[str, Any]) -> None:
        if info["step"] == self.step:
            raise Stopped("enough")


def fit(folder: Path, data: Data, build: Any = small_conv, **options: Any) -> Any:
    return lowmem_pnn.fit(build, data, max_gpu_mem="1GB", device="cpu", workdir=folder, **{**OPTIONS, **options})


def mixed_plainly(
    data: Data,
    mixing: Any,
    build: Callable[[], nn.Module] = small_conv,
    smallest: int = 2,
    weights: Any = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    **options: Any,
) -> nn.Module:
    """What a loop with torchvision's transform, applied to each batch after our seed, comes to."""
    options = {**OPTIONS, **options}
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", method="exact", **options)
    split, step = training_split(data, **options), itertools.count()
    model = built(build, config.seed).train()
    batches = -(-len(split) // config.batch_sizes[0])

    def batch_of(numbers: np.ndarray) -> Data:
        epoch, number = divmod(next(step), batches)
        torch.manual_seed(mixing_seed(config.seed, ("epoch", epoch), number))
        mixed: Data = mixing(*split.batch(numbers))
        return mixed

    def loss_of(output: Tensor, targets: Tensor) -> Tensor:
        if loss is not None:
            return loss(output, targets)
        return nn.functional.cross_entropy(output, targets, weights, label_smoothing=config.label_smoothing)

    train_epochs(
        model,
        backward_of(model, loss_of),
        batch_of,
        lambda epoch: permutation_of(len(split), config.seed, "epoch", epoch),
        config,
        groups={0: list(model.parameters())},
        epochs=config.epochs[0],
        batch_size=config.batch_sizes[0],
        place=("forward", 0),
        smallest=smallest,
    )
    return model


@pytest.mark.parametrize(("kind", "method"), [*((kind, "exact") for kind in ASKED), ("both", "backprop")])
def test_mixed_training_is_same_as_plain_pytorch(kind: str, method: str, tmp_path: Path) -> None:
    # A last batch that is short, micro-batches that do not divide it.
    data, cuts = images(70), {"cuts": "1,3"} if method == "exact" else {}
    result = fit(tmp_path / "run", data, method=method, micro_batch=5, **ASKED[kind], **cuts)
    expected = mixed_plainly(data, MIXING[kind](4), micro_batch=5)
    assert_same_weights(loaded(small_conv, result.weights_file), expected)


def test_several_labels_are_mixed_in_the_same_share(tmp_path: Path) -> None:
    data = images(70)[0], (torch.rand(70, 4, generator=torch.Generator().manual_seed(5)) > 0.6).float()
    result = fit(tmp_path / "run", data, method="exact", micro_batch=5, cuts="1,3", **ASKED["both"])
    expected = mixed_plainly(data, MIXING["both"](4), micro_batch=5, loss=nn.functional.binary_cross_entropy_with_logits)
    assert_same_weights(loaded(small_conv, result.weights_file), expected)
    assert set(result.scores["val"]) >= {"f1", "average_precision"}


def test_smoothing_and_class_weights_are_as_pytorch_has_them_for_probabilities(tmp_path: Path) -> None:
    weights = (0.5, 1.0, 2.0, 3.0)
    more = {"label_smoothing": 0.1, "micro_batch": 4}
    result = fit(tmp_path / "run", vectors(60), small_mlp, method="exact", class_weights=weights, **ASKED["mixup"], **more)
    plainly = mixed_plainly(vectors(60), _mixup_of_vectors, small_mlp, 1, torch.tensor(weights), **more)
    assert_same_weights(loaded(small_mlp, result.weights_file), plainly)


def _mixup_of_vectors(x: Tensor, y: Tensor) -> Data:
    mixed, labels = v2.MixUp(alpha=0.4, num_classes=4)(x[:, :, None, None], y)
    return mixed[:, :, 0, 0], labels


def test_more_scores_than_classes(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 6))

    more = {"label_smoothing": 0.1}
    result = fit(tmp_path / "run", images(), build, method="exact", **ASKED["mixup"], **more)
    assert_same_weights(loaded(build, result.weights_file), mixed_plainly(images(), MIXING["mixup"](6), build, 1, **more))


@pytest.mark.parametrize(("method", "step"), [("exact", 5), ("neuroflux", 3)])
def test_a_resume_mixes_on_as_a_run_that_was_left_alone(method: str, step: int, tmp_path: Path) -> None:
    build = conv_layers if method == "neuroflux" else small_conv
    options = {"method": method, **ASKED["both"]}
    whole = fit(tmp_path / "whole", images(50), build, **options)
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", images(50), build, commit_every=0.0, callbacks=[StopsAt(step)], **options)
    again = fit(tmp_path / "cut", images(50), build, resume=True, **options)
    assert again.resumed == 1
    assert_same_weights(loaded(build, again.weights_file), loaded(build, whole.weights_file))


@pytest.mark.parametrize("visits", ["sequential", "interleaved"])
def test_every_block_of_neuroflux_mixes_what_it_learns_from(visits: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "method": "neuroflux",
        "visits": visits,
        "cuts": "1,2",
        **({"macro_batches": 2} if visits == "interleaved" else {}),
    }
    plain = fit(tmp_path / "plain", images(), conv_layers, **more)
    mixed = fit(tmp_path / "mixed", images(), conv_layers, **ASKED["both"], **more)
    small = fit(tmp_path / "small", images(), conv_layers, micro_batch=16, **ASKED["both"], **more)
    assert_same_weights(loaded(conv_layers, mixed.weights_file), loaded(conv_layers, small.weights_file))
    before, after = (loaded(conv_layers, result.weights_file).state_dict() for result in (plain, mixed))
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    assert "training batches are mixed (MixUp 0.4 or CutMix 1)" in mixed.notes[0]
    assert mixed.notes[0].endswith("; every block mixes what it learns from")


def test_frozen_outputs_are_not_cached(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))

    frozen = {"method": "exact", "freeze": "0.*"}
    assert "written once" in fit(tmp_path / "plain", vectors(), build, **frozen).notes[1]
    notes = fit(tmp_path / "mixed", vectors(), build, mixup=0.2, **frozen).notes
    assert notes[1] == (
        "training batches are mixed (MixUp 0.2), and so is what the training loss is taken of; outputs of frozen layers are computed in "
        "every epoch"
    )
    assert not any("written once" in note for note in notes)


@pytest.mark.parametrize(
    ("data", "options", "text"),
    [
        (images(), {"mixup": 0}, "--mixup 0: must be greater than 0"),
        (images(), {"cutmix": "x"}, "--cutmix 'x': must be a valid number, unable to parse string as a number"),
        (images(), {"mixup": 1, "method": "pnn"}, "--mixup has no effect here: it needs --method exact, backprop, neuroflux or incubate"),
        (images(), {"cutmix": 1, "method": "pnn"}, "--cutmix has no effect here: it needs --method exact, backprop, neuroflux or incubate"),
        (
            images(),
            {"cutmix": 1, "ignore_index": 3},
            "--cutmix mixes the labels of all samples, and --ignore-index leaves some out; leave one out",
        ),
        (
            vectors(),
            {"cutmix": 1},
            "--cutmix is for images (channels, height, width), and samples of data python-tuple are (12,); give --mixup, or leave it out",
        ),
        ((vectors()[0], torch.rand(40, 4) + 0.5), {"mixup": 1}, "--mixup has no meaning for regression; leave it out"),
        (
            ({"a": vectors()[0], "b": vectors()[0]}, vectors()[1]),
            {"mixup": 1},
            "--mixup: samples of data python-tuple are several tensors, and one is mixed; leave it out",
        ),
        (images(), {"mixup": 1, "loss_chunk": 4}, "--loss-chunk 4: the loss of classification is no sum over rows; leave it out"),
    ],
)  # fmt: skip
def test_refused_in_one_line(data: Any, options: dict[str, Any], text: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        if isinstance(data[0], dict):
            return _OfTwo()
        return nn.Sequential(nn.Flatten(), nn.Linear(data[0][0].numel(), 4))

    with pytest.raises(ConfigError) as error:
        fit(tmp_path / "run", data, build, **{"method": "exact", **options})
    assert str(error.value) == text


class _OfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.linear(a + b)


def test_masks_tokens_and_own_losses_are_refused(tmp_path: Path) -> None:
    masks = images()[0], torch.randint(0, 4, (40, 8, 8))
    with pytest.raises(ConfigError, match=r"^--cutmix has no meaning for segmentation; leave it out$"):
        fit(tmp_path / "masks", masks, lambda: nn.Conv2d(3, 4, 1), method="exact", cutmix=1)
    tokens = torch.randint(0, 4, (40, 6)), torch.randint(0, 4, (40, 6))
    with pytest.raises(ConfigError, match=r"^--mixup has no meaning for a label for each token; leave it out$"):
        fit(tmp_path / "tokens", tokens, lambda: nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4)), method="exact", mixup=1)
    words = torch.randint(0, 4, (40, 6)), torch.arange(40) % 4
    looks_up = lambda: nn.Sequential(nn.Embedding(4, 8), nn.Flatten(), nn.Linear(48, 4))  # noqa: E731
    with pytest.raises(ConfigError, match=r"^--mixup: samples of data python-tuple are int64, which have no mean; leave it out$"):
        fit(tmp_path / "words", words, looks_up, method="exact", mixup=1)
    with pytest.raises(ConfigError, match=r"^--mixup has no meaning for a loss of your own \(.*\); leave it out$"):
        fit(tmp_path / "own", vectors(), small_mlp, method="exact", mixup=1, loss=nn.functional.cross_entropy)


def test_labels_that_are_left_out_end_the_run_in_one_line(tmp_path: Path) -> None:
    x, y = images()
    with pytest.raises(DataError, match=r"^label -100 is none of the 4 classes, and --mixup mixes the labels of all samples"):
        fit(tmp_path / "run", (x, torch.where(torch.arange(40) == 7, -100, y)), method="exact", mixup=1)
