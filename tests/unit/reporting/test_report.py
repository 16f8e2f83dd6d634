"""Results and plans as text and JSON; scores."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from lowmem_pnn.evaluation.scores import Scores
from lowmem_pnn.reporting.report import PlanReport, Result, text_table

RESULT = Result(
    method="pnn", model="mlp:64-32-10", data="digits", seed=0, device="cpu", budget_bytes=100_000_000, budget_scope="process",
    floor_bytes=400_000_000, peak_bytes=42_000_000, host_peak_bytes=42_000_000, predicted_peak_bytes=40_000_000,
    reserve_bytes=4_000_000, check={"partition": 0, "predicted_bytes": 10, "measured_bytes": 12, "unexplained_bytes": 2},
    training_state_bytes=30_000_000,
    partitions=[
        {"start": 0, "stop": 2, "layers": ["0", "2"], "params": 1234, "micro_batch": 16, "batch": 64, "epochs": 2,
         "predicted_peak_bytes": 40_000_000, "peak_bytes": 42_000_000, "seconds": 1.25},
        {"start": 2, "stop": 3, "layers": ["4"], "params": 330, "micro_batch": 64, "batch": 64, "epochs": 3,
         "predicted_peak_bytes": 1_000_000, "peak_bytes": 900_000, "seconds": 0.5},
    ],
    epochs=[2, 3], seconds=2.0, samples_per_second=3000.0, train_loss=0.25, val_loss=0.5, val_accuracy=0.9, test_loss=0.4,
    test_accuracy=0.875, test_f1=0.87, macs=10**9, bytes_read=10**6, bytes_written=2 * 10**6, oom_retries=0, resumed=0,
    workdir="runs/one", weights_file="runs/one/model.safetensors", preprocessing="uint8 / 255", versions={"torch": "2.15"},
)  # fmt: skip


def test_a_result_comes_back_from_its_json() -> None:
    body = json.loads(RESULT.to_json())
    assert set(body) == {field.name for field in dataclasses.fields(Result)}
    assert (body["exits"], body["chosen_exit"]) == ([], None)
    assert json.loads(Result.from_json(RESULT.to_json()).to_json()) == body


def test_a_result_is_a_page_whose_last_line_says_model_budget_and_peak() -> None:
    lines = str(RESULT).splitlines()
    assert lines[0] == "mlp:64-32-10 on digits, method pnn, cpu"
    assert lines[-1] == "model 30.0 MB (weights, gradients and optimizer state), budget 100.0 MB, peak 42.0 MB"
    text = str(RESULT)
    for part in ("0 to 2", "16 of 64", "1,234", "training loss 0.25", "test accuracy 87.5%", "test F1 0.870", "unexplained 2 B"):
        assert part in text
    assert "did not fit" not in text
    assert "3 batches did not fit" in str(dataclasses.replace(RESULT, oom_retries=3))


def test_a_language_model_has_loss_and_perplexity() -> None:
    text = str(
        dataclasses.replace(RESULT, test_accuracy=None, test_f1=None, val_accuracy=None, test_loss=1.692, perplexity=5.4304)
    )
    assert "validation loss 0.5, test loss 1.692, perplexity 5.43\n" in text
    assert "accuracy" not in text
    assert "test loss" not in str(RESULT)
    assert "perplexity" not in str(RESULT)


def test_a_result_without_a_perplexity_is_read() -> None:
    body = json.loads(RESULT.to_json())
    del body["perplexity"]
    assert Result.from_json(json.dumps(body)) == Result.from_json(RESULT.to_json())


def test_what_was_not_measured_is_not_shown() -> None:
    nothing = dict.fromkeys(("val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_f1"))
    text = str(dataclasses.replace(RESULT, **nothing, check={}))
    assert "validation" not in text
    assert "test" not in text
    assert "checked" not in text


def plan_report(**changes: Any) -> PlanReport:
    partition: Mapping[str, Any] = {
        "layers": ["0"], "params": 5, "micro_batch": 2, "batch": 4, "state_bytes": 100, "predicted_peak_bytes": 200,
        "activation_bytes": 0,
    }  # fmt: skip
    report = PlanReport(
        method="pnn", model="m", data="d", device="cpu", budget_bytes=1000, reserve_bytes=100, training_state_bytes=80,
        predicted_peak_bytes=200, disk_bytes=50, partitions=[partition], fits=True, reason="", exit_code=0,
    )  # fmt: skip
    return dataclasses.replace(report, **changes)


def test_a_plan_says_whether_it_fits() -> None:
    assert str(plan_report()).endswith("fits: predicted peak 200 B and a reserve of 100 B within 1.0 kB")
    refused = plan_report(fits=False, reason="layer 'x' alone needs more", partitions=[])
    assert str(refused).endswith("does not fit: layer 'x' alone needs more")
    assert json.loads(refused.to_json())["fits"] is False


def test_a_table_aligns_its_columns_and_cuts_nothing_off() -> None:
    long = "layer." * 40
    lines = text_table(("name", "what", "bytes"), [("1", long, "12"), ("2", "b", "3,456")]).splitlines()
    assert lines[0].split() == ["name", "what", "bytes"]
    assert lines[2].split() == ["1", long, "12"]
    assert len(lines[2]) == len(lines[3])
    assert lines[2].endswith(" 12")


@pytest.mark.parametrize("num_classes", [2, 7])
def test_scores_are_those_of_scikit_learn_whatever_the_micro_batches(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    # One class more than occurs, as a model's last layer may have.
    outputs = torch.randn(50, num_classes + 1, generator=generator)
    labels = torch.randint(0, num_classes, (50,), generator=generator)
    scores = Scores()
    for part in (slice(0, 30), slice(30, 33), slice(33, 50)):
        scores.add((outputs[part],), labels[part])
    found = scores.result()
    predicted = outputs.argmax(1).numpy()
    assert found["test_loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, labels)), rel=1e-5)
    assert found["test_accuracy"] == pytest.approx(float(np.mean(predicted == labels.numpy())))
    assert found["test_f1"] == pytest.approx(f1_score(labels.numpy(), predicted, average="macro"))


def test_scores_of_tokens_are_loss_and_perplexity_whatever_the_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(6, 5, 9, generator=generator)
    labels = torch.randint(0, 8, (6, 5), generator=generator)
    expected = float(nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten()))
    rows = outputs.flatten(0, 1), labels.flatten()
    parted = [
        [(outputs, labels)],
        [(outputs[:1], labels[:1]), (outputs[1:], labels[1:])],
        [(rows[0][:7], rows[1][:7]), (rows[0][7:], rows[1][7:])],
        [(outputs.reshape(3, 2, 5, 9), labels.reshape(3, 2, 5))],
    ]
    for parts in parted:
        scores = Scores(tokens=True)
        for output, label in parts:
            scores.add((output,), label)
        found = scores.result()
        assert found == {
            "test_loss": pytest.approx(expected, rel=1e-5),
            "perplexity": pytest.approx(math.exp(expected), rel=1e-5),
        }


def test_scores_of_low_precision_are_summed_in_float32() -> None:
    outputs, labels = torch.randn(2, 300, 4).bfloat16(), torch.zeros(2, 300, dtype=torch.int64)
    scores = Scores(tokens=True)
    scores.add((outputs,), labels)
    expected = float(nn.functional.cross_entropy(outputs.double().flatten(0, 1), labels.flatten()))
    assert scores.result()["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_hopeless_perplexity_is_infinite() -> None:
    scores = Scores(tokens=True)
    scores.add((torch.tensor([[[0.0, 5000.0]]]),), torch.tensor([[0]]))
    assert scores.result() == {"test_loss": 5000.0, "perplexity": math.inf}
