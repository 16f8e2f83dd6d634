"""Tasks and losses: a run learns what plain PyTorch learns by the same loss, whole batches bit for bit, parts of batches up to rounding."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem_pnn
from helpers.plainloops import assert_same_weights, built, loaded, make_optimizer
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.seeds import permutation_of
from lowmem_pnn.workload.inputs import python_inputs

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(37, 6)).astype(np.float32)
VALUES = (X @ RANDOM.normal(size=6)).astype(np.float32)
LABELS = (X[:, :3] > 0.2).astype(np.float32)
CLASSES = (2 * (X[:, 0] > 0) + (X[:, 1] > 0.5)).astype(np.int64)
SHARES = F.one_hot(torch.tensor(CLASSES) % 3, 3).float() * 0.8 + 0.2 / 3
SOME = np.where(RANDOM.random(37) < 0.3, -100, CLASSES)
IMAGES = RANDOM.normal(size=(21, 3, 8, 8)).astype(np.float32)
MASKS = np.where(RANDOM.random((21, 8, 8)) < 0.2, 255, IMAGES[:, 0] > 0).astype(np.uint8)
TOKENS = RANDOM.integers(0, 9, (21, 5))
NEXT = np.where(RANDOM.random((21, 5)) < 0.3, -100, (TOKENS + 1) % 9)
WEIGHTS = (0.5, 2.0, 1.0, 3.0)


def net(outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs))


def fully_convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))


def of_tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 9))


def both(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(outputs[:, 0], targets["value"]) + F.cross_entropy(outputs[:, 1:], targets["class"])


def summed(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    counted = targets != -100
    return F.cross_entropy(outputs, targets, reduction="sum"), counted.sum()


@dataclass
class Case:
    build: Callable[[], nn.Module]
    data: Any
    plain: Callable[[Any, Any], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    loss: Any = "auto"
    task: str = "classification"


CASES = {
    "values": Case(net(1), (X, VALUES), lambda o, y: F.mse_loss(o, y[:, None]), task="regression"),
    "huber": Case(net(2), (X, X[:, :2] * 3), F.huber_loss, loss="huber", task="regression"),
    "labels": Case(net(3), (X, LABELS), F.binary_cross_entropy_with_logits, task="multilabel"),
    "weighted labels": Case(
        net(3),
        (X, LABELS),
        lambda o, y: F.binary_cross_entropy_with_logits(o, y * 0.9 + 0.05, pos_weight=torch.tensor(WEIGHTS[:3])),
        {"class_weights": WEIGHTS[:3], "label_smoothing": 0.1},
        task="multilabel",
    ),
    "weighted classes": Case(
        net(4),
        (X, CLASSES),
        lambda o, y: F.cross_entropy(o, y, torch.tensor(WEIGHTS), label_smoothing=0.1),
        {"class_weights": WEIGHTS, "label_smoothing": 0.1},
    ),
    "some classes": Case(net(4), (X, SOME), F.cross_entropy),
    "another ignored class": Case(
        net(4), (X, np.where(SOME == -100, 9, SOME)), lambda o, y: F.cross_entropy(o, y, ignore_index=9), {"ignore_index": 9}
    ),
    "probabilities": Case(net(3), (X, SHARES), F.cross_entropy, {"task": "classification"}),
    "masks": Case(
        fully_convolutional, (IMAGES, MASKS), lambda o, y: F.cross_entropy(o, y.long(), ignore_index=255), task="segmentation"
    ),
    "some tokens": Case(of_tokens, (TOKENS, NEXT), lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten())),
    "own": Case(net(1), (X, VALUES), lambda o, y: (o[:, 0] - y).abs().mean(), loss=lambda o, y: (o[:, 0] - y).abs().mean(), task="own"),
    "own of several targets": Case(net(5), (X, {"class": CLASSES, "value": VALUES}), both, loss=both, task="own"),
    "own sum and count": Case(net(4), (X, SOME), lambda o, y: summed(o, y)[0] / summed(o, y)[1], loss=summed, task="own"),
}  # fmt: skip


def train_plainly(case: Case, options: dict[str, Any]) -> nn.Module:
    """The loop that everybody writes, by whole batches."""
    own = None if isinstance(case.loss, str) else case.loss
    names = {"loss": case.loss} if own is None and case.loss != "auto" else {}
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options, **names)
    _, dataset, splits, _ = python_inputs(case.build, case.data, None, None, loss=own)(config)
    split, model = splits["train"], built(case.build).train()
    optimizer = make_optimizer(config, 0, list(model.parameters()))
    for epoch in range(config.value_for("epochs", 0)):
        order = permutation_of(len(split), config.seed, "epoch", epoch)
        for begin in range(0, len(order), config.value_for("batch_size", 0)):
            x, kept = split.batch(order[begin : begin + config.value_for("batch_size", 0)])
            case.plain(model(x), dataset.targets.unpack(kept)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def fit(case: Case, folder: Path, **options: Any) -> Any:
    return lowmem_pnn.fit(
        case.build,
        case.data,
        test=case.data,
        max_gpu_mem="1GB",
        workdir=folder,
        device="cpu",
        loss=case.loss,
        **case.options,
        **options,
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_whole_batches_are_learnt_as_by_a_plain_loop(name: str, method: str, tmp_path: Path) -> None:
    case, options = CASES[name], {"epochs": 2, "batch_size": 8, "method": method}
    cuts = {"cuts": "1"} if method == "exact" else {}
    result = fit(case, tmp_path / "run", **options, **cuts)
    plain = train_plainly(case, {**case.options, **options})
    assert_same_weights(loaded(case.build, result.weights_file), plain)
    assert (result.task, result.compared) == (case.task, "yes")
    assert math.isfinite(result.scores["test"]["loss"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_parts_of_batches_weigh_what_counts_in_them(name: str, method: str, tmp_path: Path) -> None:
    case = CASES[name]
    options = {"epochs": 2, "batch_size": 16, "method": method, "optimizer": "sgd", "lr": 0.05}
    result = fit(case, tmp_path / "run", **options, micro_batch=3)
    plain = train_plainly(case, {**case.options, **options})
    weights = loaded(case.build, result.weights_file).state_dict()
    for key, tensor in plain.state_dict().items():
        assert torch.allclose(weights[key], tensor, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_the_loss_of_an_epoch_is_over_what_counted_in_it(method: str, tmp_path: Path) -> None:
    labels = torch.full((12,), -100)
    labels[:5] = torch.tensor([1, 0, 3, 2, 1])
    run = {"max_gpu_mem": "50MB", "device": "cpu", "workdir": tmp_path / "run", "compare": False, "val_fraction": 0}
    options = {"method": method, "epochs": 1, "batch_size": 4, "optimizer": "sgd", "lr": 1e-30}
    result = lowmem_pnn.fit(net(4), (X[:12], labels), test=(X[:12], labels), **options, **run)
    whole = F.cross_entropy(built(net(4))(torch.tensor(X[:12])), labels).item()
    assert result.train_loss == pytest.approx(whole, rel=1e-6)
    assert result.scores["test"]["loss"] == pytest.approx(whole, rel=1e-6)


def test_data_in_which_nothing_counts_are_refused(tmp_path: Path) -> None:
    targets = SOME.copy()
    case = Case(net(4), (X, targets), F.cross_entropy)
    options = {"epochs": 1, "batch_size": 4, "method": "exact", "val_fraction": 0.0, "shuffle": "no", "optimizer": "sgd"}
    targets[:] = -100
    with pytest.raises(
        DataError, match=r"training samples make no batch .* and a label that counts; give more samples, or labels"
    ):
        fit(case, tmp_path / "nothing", **options, micro_batch=2)


@pytest.mark.parametrize("name", ["values", "labels", "weighted classes", "some classes", "some tokens"])
def test_heads_learn_other_tasks_than_classes(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    result = fit(case, tmp_path / "run", epochs=2, batch_size=8, method="neuroflux", cuts="1")
    assert math.isfinite(result.scores["test"]["loss"])
    assert result.scores["val"]["loss"] == pytest.approx(result.val_loss, rel=1e-5)


@pytest.mark.parametrize(("name", "method", "text"), [
    ("values", "pnn", "--method pnn needs a class for each sample, and data .* has numbers to predict; use --method exact"),
    ("masks", "neuroflux", "--method neuroflux needs targets that a head can learn .* has one for each pixel; use --method exact"),
    ("own", "neuroflux", "has targets for a loss of your own; use --method exact"),
])  # fmt: skip
def test_methods_say_which_targets_they_cannot_learn(name: str, method: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        fit(CASES[name], tmp_path / "run", method=method, epochs=1)


@pytest.mark.parametrize("loss", ["own", "l1"])
def test_metrics_are_of_all_samples(loss: str, tmp_path: Path) -> None:
    metrics = {"distance": lambda o, y: ((o[:, 0] - y).abs().sum(), len(y)), "most": _Most()}
    result = lowmem_pnn.fit(
        net(1), (X, VALUES), test=(X, VALUES), loss=CASES["own"].loss if loss == "own" else loss, metrics=metrics, max_gpu_mem="1GB",
        workdir=tmp_path / "run", device="cpu", method="exact", epochs=1, micro_batch=5, batch_size=16,
    )  # fmt: skip
    outputs = loaded(net(1), result.weights_file)(torch.from_numpy(X))[:, 0].detach()
    differences = (outputs - torch.from_numpy(VALUES)).abs()
    test = result.scores["test"]
    assert test["distance"] == pytest.approx(float(differences.mean()), rel=1e-5)
    assert test["loss"] == pytest.approx(test["distance"], rel=1e-5)
    assert test["most"] == pytest.approx(float(differences.max()), rel=1e-5)


class _Most:
    """A metric with the methods that those of torchmetrics have."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.most = torch.tensor(0.0)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.most = torch.maximum(self.most, (outputs[:, 0] - targets).abs().max())

    def compute(self) -> Tensor:
        return self.most


def test_a_loss_over_the_batch_as_a_whole_gets_whole_batches(tmp_path: Path) -> None:
    case = Case(net(1), (X, VALUES), lambda o, y: (o.mean() - y.mean()) ** 2, loss=lambda o, y: (o.mean() - y.mean()) ** 2)
    options = {"epochs": 1, "batch_size": 16, "method": "exact"}
    result = fit(case, tmp_path / "run", **options)
    assert_same_weights(loaded(case.build, result.weights_file), train_plainly(case, options))
    assert result.notes == ["the loss of a batch is not made up of the losses of its parts: every batch goes through at once"]
    with pytest.raises(ConfigError, match=r"--micro-batch 4 of --batch-size 16: a batch has to go through at once here"):
        fit(case, tmp_path / "parts", **options, micro_batch=4)


@pytest.mark.parametrize(("loss", "text"), [
    (lambda o, y: o[:, 0] - y, r"loss python:<lambda> returned a tensor of shape \(4,\); return one number"),
    (lambda o, y: 1.0, r"returned a float; return one number as a tensor, the mean over samples, or a pair \(sum, count\)"),
    (lambda o, y: o.reshape(3, 7).mean(), r"loss python:<lambda> failed on outputs \('batch', 1\) and targets of 4 samples: RuntimeError"),
    (nn.Linear(1, 1), r"loss python:Linear has parameters of its own, which no step would train; make it a part of the model"),
])  # fmt: skip
def test_losses_that_cannot_be_used_are_refused_before_training(loss: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        lowmem_pnn.fit(net(1), (X, VALUES), loss=loss, max_gpu_mem="1GB", workdir=tmp_path / "run", device="cpu", method="exact")


class Remembers(nn.Module):
    """A loss with a running mean in a buffer, or a count in an attribute."""

    def __init__(self, *, in_buffer: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.in_buffer, self.calls = in_buffer, 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += not self.in_buffer
        self.mean += 0.1 * self.in_buffer
        return (outputs[:, 0] - targets - self.mean).square().mean()


@pytest.mark.parametrize(("in_buffer", "name"), [(True, "mean"), (False, "calls")])
def test_a_loss_that_remembers_is_refused_and_left_as_it_was(in_buffer: bool, name: str, tmp_path: Path) -> None:
    loss = Remembers(in_buffer=in_buffer)
    with pytest.raises(ConfigError, match=f"loss python:Remembers changes its '{name}' when it is called, which no commit keeps"):
        lowmem_pnn.fit(net(1), (X, VALUES), loss=loss, max_gpu_mem="1GB", workdir=tmp_path / "run", device="cpu", method="exact")
    assert (float(loss.mean), loss.calls) == (0.0, 0)


@pytest.mark.parametrize(("options", "text"), [
    ({"loss": "bce"}, "--loss bce is no loss of regression, which the targets of the data are for; give mse, l1, smooth-l1, huber"),
    ({"label_smoothing": 0.1}, "--label-smoothing has no meaning for regression; leave it out"),
    ({"class_weights": "balanced"}, "--class-weights has no meaning for regression; leave it out"),
    ({"task": "multilabel"}, r"--task multilabel takes targets \(N, labels\) of 0 and 1, and these have shape \(37,\)"),
    ({"task": "segmentation"}, r"--task segmentation takes a class number for each pixel"),
    ({"task": "classification"}, r"a label is .*; labels are class numbers, whole and from 0"),
])  # fmt: skip
def test_options_that_are_for_another_task_are_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=text):
        lowmem_pnn.fit(net(1), (X, VALUES), max_gpu_mem="1GB", workdir=tmp_path / "run", device="cpu", method="exact", **options)


def test_balanced_weights_are_by_how_rare_classes_are(tmp_path: Path) -> None:
    counts = np.bincount(CLASSES, minlength=4)
    weights = tuple(len(CLASSES) / (4 * counts))
    options = {"epochs": 1, "method": "exact", "val_fraction": 0.0}
    case = Case(net(4), (X, CLASSES), F.cross_entropy)
    balanced = fit(case, tmp_path / "balanced", class_weights="balanced", **options)
    given = fit(case, tmp_path / "given", class_weights=weights, **options)
    assert_same_weights(loaded(case.build, balanced.weights_file), loaded(case.build, given.weights_file))
    with pytest.raises(
        ConfigError, match=r"--class-weights has 2 values, and data .* has 4 classes; give one for each, or balanced"
    ):
        fit(case, tmp_path / "two", class_weights=(1.0, 2.0), **options)
