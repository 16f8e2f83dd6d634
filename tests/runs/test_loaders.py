"""Data loaders as people bring them: a last batch that is left out, a sampler of their own, a function that pads; held against plain loops."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler, default_collate

import lowmem_pnn
from helpers.datasets import Pairs
from helpers.displays import StopsAt
from helpers.plainloops import assert_same_weights, backward_of, built, cross_entropy, loaded, train_epochs, training_split
from helpers.small_networks import small_mlp, vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import Stopped
from lowmem_pnn.seeds import permutation_of, seed_of, seeded

OPTIONS: dict[str, Any] = {"epochs": 2, "lr": 0.01, "seed": 3, "lr_schedule": "cosine"}
DATA = TensorDataset(*vectors())


def fit(build: Callable[[], nn.Module], loader: Any, folder: Path, **options: Any) -> Any:
    options = {"method": "exact", "max_gpu_mem": "400MB", "device": "cpu", **OPTIONS, **options}
    return lowmem_pnn.fit(build, loader, workdir=folder, **options)


def plainly(
    build: Callable[[], nn.Module], order_of: Callable[[int], np.ndarray], batch_of: Callable[[np.ndarray], Any], batch_size: int
) -> nn.Module:
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", method="exact", **OPTIONS)
    model = built(build, config.seed).train()
    backward = backward_of(model, functools.partial(cross_entropy, config))
    groups = {0: list(model.parameters())}
    train_epochs(
        model, backward, batch_of, order_of, config, groups=groups, epochs=2, batch_size=batch_size, place=("forward", 0)
    )
    return model


@pytest.mark.parametrize("options", [{"cuts": "1"}, {"method": "backprop"}], ids=["exact", "backprop"])
def test_the_last_batch_is_left_out(options: dict[str, Any], tmp_path: Path) -> None:
    result = fit(small_mlp, DataLoader(DATA, batch_size=10, shuffle=True, drop_last=True), tmp_path / "run", **options)
    split: Any = training_split(vectors(), **OPTIONS)
    assert len(split) == 36
    model = plainly(small_mlp, lambda epoch: permutation_of(36, 3, "epoch", epoch)[:30], split.batch, 10)
    assert_same_weights(loaded(small_mlp, result.weights_file), model)
    assert "the last 6 of the 36 training samples of an epoch are no whole batch, and left out (--drop-last)" in result.notes


def test_partitions_that_learn_from_activations_leave_out_the_same_samples(tmp_path: Path) -> None:
    result = fit(small_mlp, vectors(), tmp_path / "run", method="pnn", cuts="1", batch_size=10, drop_last=True)
    (note,) = [note for note in result.notes if note.startswith("the last 6 of the 36 training samples of an epoch")]
    assert note.endswith("; partitions that learn from kept activations leave out the same ones in every epoch")


def test_a_sampler_is_followed_and_a_resume_draws_the_same(tmp_path: Path) -> None:
    weights = [1.0 + number % 4 for number in range(40)]
    loader = DataLoader(DATA, batch_size=10, sampler=WeightedRandomSampler(weights, 55), drop_last=True)
    for at in (3, 6):
        with pytest.raises(Stopped):
            fit(small_mlp, loader, tmp_path / "run", cuts="1", commit_every=0, display=StopsAt(at), resume=at > 3)
    result = fit(small_mlp, loader, tmp_path / "run", cuts="1", commit_every=0, resume=True)

    def order_of(epoch: int) -> np.ndarray:
        with seeded(seed_of(3, "sampler", "epoch", epoch)):
            return np.array(list(WeightedRandomSampler(weights, 55)))[:50]

    model = plainly(small_mlp, order_of, lambda numbers: default_collate([DATA[int(number)] for number in numbers]), 10)
    assert_same_weights(loaded(small_mlp, result.weights_file), model)
    assert any(
        note.startswith("samples of an epoch are drawn by the loader's WeightedRandomSampler, 55 of 40") for note in result.notes
    )


class Masking(nn.Module):
    """Looks at the words of a text, and not at what it is padded with."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(9, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, words: Tensor, mask: Tensor) -> Any:
        shown = self.body(self.words(words)) * mask[..., None]
        return self.head(shown.sum(1) / mask.sum(1, keepdim=True))


def padded(items: list[Any]) -> Any:
    texts, labels = zip(*items, strict=True)
    masks = [torch.ones(len(text)) for text in texts]
    return {"words": pad_sequence(texts, batch_first=True), "mask": pad_sequence(masks, batch_first=True)}, torch.tensor(labels)


def test_padding_to_the_longest_of_all_is_the_same_behind_a_mask(tmp_path: Path) -> None:
    texts = Pairs([(torch.arange(2 + 5 * n % 7) * (n + 1) % 9, n % 3) for n in range(40)])
    val = Pairs([(torch.arange(9) % 9, 1), (torch.arange(4) % 9, 2)])
    loaders = [DataLoader(part, batch_size=8, shuffle=True, collate_fn=padded) for part in (texts, val)]
    result = fit(Masking, loaders[0], tmp_path / "run", val=loaders[1])
    split: Any = training_split((torch.zeros(40, 1), torch.arange(40) % 3), **{**OPTIONS, "val_fraction": 0})
    numbers = split.numbers

    class Plain(Masking):
        def forward(self, both: Any) -> Any:  # type: ignore[override]
            return super().forward(**both)

    class Clonable(dict[str, Tensor]):
        def __getitem__(self, part: Any) -> Any:
            return (
                super().__getitem__(part) if isinstance(part, str) else Clonable({name: one[part] for name, one in self.items()})
            )

        def clone(self) -> Any:
            return self

    def batch_of(places: np.ndarray) -> Any:
        x, y = padded([texts[int(number)] for number in numbers[places]])
        return Clonable(x), y

    model = plainly(Plain, lambda epoch: permutation_of(40, 3, "epoch", epoch), batch_of, 8)
    ours = loaded(Masking, result.weights_file).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ours[name], tensor)
    assert any(
        note.startswith("collate_fn pads samples to the longest of the data, (9,), not of each batch") for note in result.notes
    )
