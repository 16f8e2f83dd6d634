"""Options of exact training, held against plain PyTorch: clipping, schedules, label smoothing, loss chunks; language models."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers.exact_runs import COMMON, check_equal, fit
from helpers.plainloops import assert_same_weights, loaded, step_lines, train_by_exact
from helpers.small_networks import (
    Data,
    images,
    small_conv,
    small_gpt,
    small_mlp,
    tokens,
    vectors,
)
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.optim.lr_schedules import lr_factor
from lowmem_pnn.zoo.gpt_model import GptShape, make_gpt


@pytest.mark.parametrize(
    ("cuts", "clip_norm", "micro_batch"),
    [(None, 0.05, 4), ("1,2,3", 0.05, None), ("1,2,3", 0.05, 4), ("1,2,3", 1e6, 4)],
    ids=["one-partition", "whole", "accumulated", "inactive"],
)
def test_clipping_by_the_norm_of_all_partitions_is_same_as_in_plain_pytorch(
    cuts: str | None, clip_norm: float, micro_batch: int | None, tmp_path: Path
) -> None:
    where: dict[str, Any] = {"cuts": cuts} if cuts else {"partitions": 1}
    options = {**COMMON, "optimizer": "sgd", "micro_batch": micro_batch}
    clipped = check_equal(small_conv, images(), tmp_path / "run", clip_norm=clip_norm, **where, **options).model
    free = train_by_exact(small_conv, images(), **options).model
    assert torch.equal(clipped.state_dict()["0.weight"], free.state_dict()["0.weight"]) == (clip_norm == 1e6)


@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        ("exact", {"lr_schedule": "cosine", "warmup_steps": 3}),
        ("exact", {"lr_schedule": "constant", "warmup_steps": 5}),
        ("exact", {"lr_schedule": "onecycle"}),
        ("backprop", {"lr_schedule": "cosine", "warmup_steps": 3}),
    ],
)
def test_schedules_are_same_as_in_plain_pytorch(method: str, schedule: dict[str, Any], tmp_path: Path) -> None:
    options = {**COMMON, **schedule, "epochs": 3, "log_every": 2, "method": method}
    where = {"cuts": "1"} if method == "exact" else {}
    result = fit(small_mlp, vectors(), tmp_path / "run", **where, **options)
    expected = train_by_exact(small_mlp, vectors(), **options)
    assert_same_weights(loaded(small_mlp, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss
    # 36 samples are 4 steps an epoch.
    lines = step_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    name, warmup = options["lr_schedule"], options.get("warmup_steps", 0)
    assert [line["lr"] for line in lines] == pytest.approx(
        [0.01 * lr_factor(name, line["step"] - 1, 12, warmup) for line in lines]
    )
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_label_smoothing_is_of_the_training_loss_alone(method: str, tmp_path: Path) -> None:
    test = images(30, seed=1)
    options = {**COMMON, "label_smoothing": 0.2, "micro_batch": 4, "method": method}
    where = {"cuts": "2"} if method == "exact" else {}
    result = fit(small_conv, images(), tmp_path / "run", test=test, **where, **options)
    expected = train_by_exact(small_conv, images(), **options)
    model = loaded(small_conv, result.weights_file)
    assert_same_weights(model, expected.model)
    assert result.train_loss == expected.train_loss
    with torch.no_grad():
        assert result.test_loss == pytest.approx(float(nn.functional.cross_entropy(model(test[0]), test[1])), rel=1e-5)
    plain = train_by_exact(small_conv, images(), **{**options, "label_smoothing": 0.0})
    assert not torch.equal(plain.model.state_dict()["0.weight"], expected.model.state_dict()["0.weight"])


@pytest.mark.parametrize(
    ("cuts", "loss_chunk", "micro_batch"),
    [(None, 3, None), ("1,2", 7, None), ("1,2", 1, 4), ("1,2", 10, None)],
)
def test_a_loss_in_chunks_of_samples_is_same_as_a_plain_loop_over_them(
    cuts: str | None, loss_chunk: int, micro_batch: int | None, tmp_path: Path
) -> None:
    where = {"cuts": cuts} if cuts else {"partitions": 1}
    options = {**COMMON, "micro_batch": micro_batch, "loss_chunk": loss_chunk, "label_smoothing": 0.1, **where}
    check_chunked(small_mlp, vectors(), tmp_path / "run", lambda model: model[-1], **options)


@pytest.mark.parametrize(("cuts", "loss_chunk"), [("1,2,3,4,5", 5), ("1,2,3,4,5", 24)])
def test_a_loss_in_chunks_of_tokens_is_same_as_a_plain_loop_over_them(cuts: str, loss_chunk: int, tmp_path: Path) -> None:
    build = functools.partial(small_gpt, tied=False)
    options = {**COMMON, "micro_batch": 5, "loss_chunk": loss_chunk, "cuts": cuts}
    check_chunked(build, tokens(), tmp_path / "run", lambda model: model.head, **options)


def check_chunked(
    build: Callable[[], nn.Module], data: Data, folder: Path, head_of: Callable[[Any], nn.Linear], **options: Any
) -> None:
    result = fit(build, data, folder, **options)
    expected = train_by_exact(build, data, head_of=head_of, **options)
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == pytest.approx(expected.train_loss, rel=1e-6)
    # And it is what the loss at once would have come to.
    at_once = train_by_exact(build, data, **{name: value for name, value in options.items() if name != "loss_chunk"})
    assert result.train_loss == pytest.approx(at_once.train_loss, rel=1e-3)


def test_scores_of_a_language_model(tmp_path: Path) -> None:
    build = functools.partial(small_gpt, tied=True, dropout=0.0)
    test = tokens(14, seed=1)
    result = fit(build, tokens(), tmp_path / "run", cuts="2", test=test, **COMMON)
    model = loaded(build, result.weights_file)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(test[0]).flatten(0, 1), test[1].flatten()))
    assert result.test_loss == pytest.approx(loss, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert (result.test_accuracy, result.test_f1) == (None, None)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt_on_a_text_is_same_as_plain_pytorch(tied: bool, tmp_path: Path) -> None:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "so", "it", "was", "there"]
    text = " ".join(words[number * number % 11] for number in range(260)).encode()
    (tmp_path / "text.txt").write_bytes(text)
    name, data = f"gpt:layers=2,width=16,heads=2,context=32,tied={str(tied).lower()}", f"text:{tmp_path / 'text.txt'}"
    options = {**COMMON, "lr": 3e-3, "cuts": "1,3", "clip_norm": 1.0, "lr_schedule": "cosine", "warmup_steps": 2}
    where: dict[str, Any] = {"max_gpu_mem": "400MB", "device": "cpu", "workdir": tmp_path / "run"}
    result = lowmem_pnn.fit(name, data, method="exact", **where, **options)
    # Windows of the model's context, the last tenth of them for the test.
    num_windows = (len(text) - 1) // 32
    x, y = (torch.tensor(list(text[shift : shift + 32 * num_windows])).view(-1, 32) for shift in (0, 1))
    num_train = num_windows - num_windows // 10
    assert num_train > 25
    build = make_gpt(GptShape(layers=2, width=16, heads=2, context=32, tied=tied), 256)
    expected = train_by_exact(build, (x[:num_train], y[:num_train]), **options)
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss
    with torch.no_grad():
        scores = loaded(build, result.weights_file)(x[num_train:])
    loss = float(nn.functional.cross_entropy(scores.flatten(0, 1), y[num_train:].flatten()))
    assert result.test_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kappa": 1.0}, "--kappa"),
        ({"epochs": (1, 2)}, "--epochs"),
        ({"batch_size": (8, 16)}, "--batch-size"),
        ({"lr": (0.1, 0.2, 0.3)}, "--lr"),
        ({"lr_schedule": "onecycle", "warmup_steps": 2}, "--warmup-steps"),
        ({"label_smoothing": 1.0}, "--label-smoothing"),
        ({"clip_norm": -1.0}, "--clip-norm"),
        ({"method": "pnn", "loss_chunk": 0}, "--loss-chunk"),
        ({"recover": "1"}, "--recover"),
    ],
)
def test_options_that_do_not_fit_exact_training_are_errors(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        fit(small_mlp, vectors(), tmp_path / "run", cuts="1", **options)
    assert not (tmp_path / "run").exists()


def test_a_last_layer_that_mixes_rows_cannot_be_computed_in_chunks(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4))

    with pytest.raises(ConfigError, match="--loss-chunk"):
        fit(build, vectors(), tmp_path / "run", cuts="1", epochs=1, loss_chunk=2)
