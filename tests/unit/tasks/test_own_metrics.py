"""Metrics of the user's own, beside a task's scores: over all samples, whatever the micro-batches; and what is refused."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks.make_task import Own, make_task
from lowmem_pnn.tasks.task import Task
from lowmem_pnn.workload.option_checks import try_own

PARTS = (slice(0, 30), slice(30, 33), slice(33, 90))
CLASSES = Targets("class", 4)
MASKS = Targets("mask", 3, (4, 4), torch.uint8, 255)


def task(targets: Targets, metrics: dict[str, Any]) -> Task:
    config = configure(max_gpu_mem="100MB", device="cpu", method="exact", model="mlp:64-10", data="digits")
    # A model that returns a dictionary, as those of transformers do.
    chain = SimpleNamespace(output_form=None, rebuild=lambda tensors: {"scores": tensors[0]})
    return make_task(dataclasses.replace(config, task="auto"), targets, Own(metrics=metrics), chain)  # type: ignore[arg-type]


class Zeros:
    """A part of the data whose targets are all zeros."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return 9

    def batch(self, indices: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(indices), 1), self.targets.zeros(len(indices))


def tried(targets: Targets, metrics: dict[str, Any], shape: tuple[int, ...] = (4,)) -> None:
    try_own(task(targets, metrics), Zeros(targets), (TensorSpec(shape, torch.float32),))


def test_metrics_are_those_of_all_samples_beside_the_scores_of_the_task() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    random = torch.Generator().manual_seed(1)
    outputs, targets = torch.randn(90, 4, generator=random), torch.randint(0, 4, (90,), generator=random)

    class Recall(torchmetrics.classification.MulticlassRecall):  # type: ignore[misc, name-defined]
        def update(self, outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> None:
            super().update(outputs["scores"], targets)

    metrics = {
        "recall": Recall(4),
        "margin": lambda out, y: (out["scores"].gather(1, y[:, None]).sum(), len(y)),
    }
    one = task(CLASSES, metrics)
    total = one.scores()
    for part in PARTS:
        scores = one.scores()
        scores.add((outputs[part],), targets[part])
        total.merge(scores)
    found = total.result()
    assert found["recall"] == pytest.approx(
        float(torchmetrics.functional.recall(outputs, targets, "multiclass", num_classes=4, average="macro"))
    )
    assert found["margin"] == pytest.approx(float(outputs.gather(1, targets[:, None]).mean()), rel=1e-5)
    assert total.loss == found["loss"]
    assert one.score_names((TensorSpec((4,), torch.float32),)) == ("loss", "accuracy", "f1", "recall", "margin")
    # What is measured is measured of whole samples.
    assert (one.is_by_rows, task(CLASSES, {}).is_by_rows) == (False, True)


def test_masks_are_class_numbers_for_metrics() -> None:
    seen: list[torch.dtype] = []
    tried(MASKS, {"own": lambda out, y: (seen.append(y.dtype) or 1.0, 1)}, (3, 4, 4))
    assert set(seen) == {torch.int64}


def test_labels_are_integers_for_torchmetrics_alone() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    seen: list[torch.dtype] = []

    class Precision(torchmetrics.classification.MultilabelAveragePrecision):  # type: ignore[misc, name-defined]
        def update(self, outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> None:
            super().update(outputs["scores"], targets)

    labels = Targets("labels", 4, (4,), torch.float32)
    tried(labels, {"own": lambda out, y: (seen.append(y.dtype) or 1.0, 1), "precision": Precision(4)})
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize(("metrics", "message"), [
    ({"accuracy": lambda out, y: (0.0, 1)}, "metrics: 'accuracy' is a score that is reported anyway; call your metric otherwise"),
    ({"own": lambda out, y: out["scores"].mean()}, r"metric 'own' failed on outputs \(4, 4\): TypeError: .*; give a function of outputs and"),
    ({"own": lambda out, y: out[:, 0]}, r"metric 'own' failed on outputs \(4, 4\): (Type|Key)Error"),
    ({"own": SimpleNamespace(reset=lambda: 0, update=lambda o: 0, compute=lambda: 0)}, "metric 'own' failed: TypeError: .* torchmetrics"),
])  # fmt: skip
def test_metrics_that_cannot_be_used_are_refused_before_training(metrics: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tried(CLASSES, metrics)
