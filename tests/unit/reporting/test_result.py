"""Results of runs as text and JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lowmem_pnn.reporting.result import Result

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


@pytest.mark.parametrize(
    ("model", "merging"),
    [
        ("resnet18", "lowmem-pnn export runs/one --merge"),
        ("net.py:build", "lowmem-pnn export runs/one --merge --trust"),
        ("python:Net", "lowmem_pnn.export('runs/one', merge=True, model=...)"),
    ],
)
def test_what_merges_an_adapter_is_given_as_one_types_it(model: str, merging: str) -> None:
    text = str(dataclasses.replace(RESULT, model=model, adapter="runs/one/adapter"))
    assert f"merged into its base: {merging}\n" in text


def test_a_result_is_a_page_that_ends_with_a_summary_of_six_lines() -> None:
    lines = str(RESULT).splitlines()
    assert lines[0] == "mlp:64-32-10 on digits, method pnn, cpu"
    assert lines[-7:] == [
        "",
        "needs   here 40.0 MB (predicted)",
        "budget  100.0 MB of cpu",
        "peak    42.0 MB",
        "time    2.0 s, 3000 samples/s",
        "score   test accuracy 87.5%",
        "next    lowmem-pnn predict runs/one --out predictions.csv",
    ]
    text = str(RESULT)
    for part in (
        "0 to 2",
        "16 of 64",
        "1,234",
        "training loss 0.25",
        "test accuracy 87.5%",
        "test F1 0.870",
        "measured 12 B, 2 B more",
    ):
        assert part in text
    assert "did not fit" not in text
    assert "3 batches did not fit" in str(dataclasses.replace(RESULT, oom_retries=3))


def test_the_summary_says_what_plain_pytorch_needs_and_what_is_read_ahead() -> None:
    first, second = RESULT.partitions
    result = dataclasses.replace(RESULT, plain_bytes=105_000_000, partitions=[{**first, "ahead_bytes": 15_000_000}, second])
    lines = str(result).splitlines()
    assert lines[-6] == "needs   105.0 MB plain PyTorch; here 25.0 MB and 15.0 MB to read ahead (predicted)"
    assert lines[-4] == "peak    42.0 MB, 60 % below plain PyTorch"
    heads, _, row = lines[2:5]
    assert heads.split()[-5:] == ["epochs", "needs", "ahead", "peak", "seconds"]
    assert row.split()[-8:] == ["2", "25.0", "MB", "15.0", "MB", "42.0", "MB", "1.2"]


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({"data": "it.py:data"}, "lowmem-pnn predict runs/one --out predictions.csv --trust"),
        ({"model": "package.module:build"}, "lowmem-pnn predict runs/one --out predictions.csv --trust"),
        ({"val_data": "it.py:data"}, "lowmem-pnn predict runs/one --out predictions.csv --trust"),
        ({"form": {"targets": {"kind": "mask"}}}, "lowmem-pnn predict runs/one --out masks/"),
        ({"form": {"targets": {"kind": "values", "shape": [2, 3]}}}, "lowmem-pnn predict runs/one --out predictions.npz"),
        ({"form": {"targets": {"kind": "tokens"}}, "data": "it.py:data"}, "lowmem-pnn export runs/one --to safetensors"),
        ({"perplexity": 5.4}, "lowmem-pnn export runs/one --to safetensors"),
        ({"perplexity": 5.4, "data": "text:book.txt"}, "lowmem-pnn generate runs/one --prompt 'Once upon a time'"),
        ({"model": "python:build"}, "lowmem_pnn.load('runs/one', model=...)"),
    ],
)
def test_the_next_command_suits_the_run(changes: dict[str, Any], command: str) -> None:
    assert str(dataclasses.replace(RESULT, **changes)).splitlines()[-1] == f"next    {command}"


def test_tables_fit_a_narrow_terminal() -> None:
    narrow = RESULT.describe(60).splitlines()
    assert max(map(len, narrow[2:6])) <= 60
    assert "predicted" not in narrow[2]
    assert max(map(len, str(RESULT).splitlines()[2:6])) > 60


def test_sentences_are_broken_between_words_in_a_terminal_and_the_command_is_not() -> None:
    result = dataclasses.replace(
        RESULT, data_parts="1,293 to train on, 144 to validate on, none to test on", workdir="runs/" + "w" * 60
    )
    *lines, command = result.describe(60).splitlines()
    assert any(line.startswith("  ") for line in lines)
    assert max(len(line) for line in lines if "w" * 60 not in line) <= 60
    assert command == f"next    lowmem-pnn predict runs/{'w' * 60} --out predictions.csv"
    assert f"weights: {result.weights_file}" in str(result)


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
    assert "test " not in text
    assert "checked" not in text
    assert "score   training loss 0.25" in text


def test_a_result_in_a_line_and_in_a_notebook() -> None:
    assert repr(RESULT) == "<Result of mlp:64-32-10 on digits by pnn: peak 42.0 MB of 100.0 MB, test accuracy 87.5%; runs/one>"
    html = dataclasses.replace(RESULT, model="<b>")._repr_html_()
    assert "&lt;b&gt; on digits" in html
    assert html.count("<tr>") == 6 + 1 + 2
    assert "lowmem-pnn predict runs/one" in html


def test_history_and_plan(tmp_path: Path) -> None:
    result = dataclasses.replace(RESULT, workdir=str(tmp_path))
    assert result.history == {}
    lines = [
        {"visit": 0, "action": "learn", "step": 100, "loss": 1.0},
        {"visit": 0, "action": "learn", "partition": 0, "epoch": 1, "train_loss": 0.5, "val_loss": None, "memory": [[0.1, 0, 5]]},
        {"visit": 0, "action": "learn", "partition": 0, "epoch": 2, "train_loss": 0.25, "val_loss": None, "val_f1": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    assert result.history == {
        "partition": [0, 0], "epoch": [1, 2], "train_loss": [0.5, 0.25], "val_loss": [None, None], "val_f1": [None, 0.5],
    }  # fmt: skip
    assert [part["micro_batch"] for part in result.plan["partitions"]] == [16, 64]
    assert "peak_bytes" not in result.plan["partitions"][0]
