"""Models of several inputs, and of outputs in a structure: trained as by a plain loop, bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem_pnn
from helpers.plainloops import assert_same_weights, built, loaded, make_optimizer
from helpers.small_networks import Attending, biased_tokens
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.seeds import permutation_of
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.workload.inputs import python_inputs

RANDOM = np.random.default_rng(1)
A, B = RANDOM.normal(size=(29, 5)).astype(np.float32), RANDOM.integers(0, 7, (29, 4))
Y = (A[:, 0] + B[:, 0] > 3).astype(np.int64)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.words = nn.Linear(5, 8), nn.Embedding(7, 8)
        self.body = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
        self.head = nn.Linear(12, 2)

    def forward(self, numbers: Tensor, words: Tensor) -> Any:
        both = torch.cat([torch.relu(self.numbers(numbers)), self.words(words).mean(1)], 1)
        return self.head(self.body(both))


class InOneTuple(TwoInputs):
    def forward(self, both: tuple[Tensor, Tensor]) -> Any:  # type: ignore[override]
        return super().forward(*both)


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor
    scale: float = 2.0


class Answers(TwoInputs):
    """Returns a structure, of which the loss takes what it wants."""

    kind: str = "dict"

    def forward(self, numbers: Tensor, words: Tensor) -> Any:
        both = torch.cat([torch.relu(self.numbers(numbers)), self.words(words).mean(1)], 1)
        hidden = self.body(both)
        logits = self.head(hidden)
        return {"dict": {"logits": logits, "hidden": hidden}, "tuple": (hidden, logits), "dataclass": Answer(logits, hidden)}[
            self.kind
        ]


class AnswersTuple(Answers):
    kind = "tuple"


class AnswersDataclass(Answers):
    kind = "dataclass"


def both_parts(outputs: Any, targets: Tensor) -> Tensor:
    if isinstance(outputs, dict):
        logits, hidden = outputs["logits"], outputs["hidden"]
    else:
        hidden, logits = outputs if isinstance(outputs, tuple) else (outputs.hidden * outputs.scale, outputs.logits)
    return F.cross_entropy(logits, targets) + 0.1 * hidden.square().mean()


def train_plainly(build: Callable[[], nn.Module], data: Any, call: Callable[[nn.Module, Any], Any], loss: Any) -> nn.Module:
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", epochs=2, batch_size=8, method="exact")
    _, dataset, splits, _ = python_inputs(build, data, None, None, loss=loss)(config)
    split, model = splits["train"], built(build).train()
    optimizer = make_optimizer(config, 0, list(model.parameters()))
    function = loss or F.cross_entropy
    for epoch in range(2):
        order = permutation_of(len(split), config.seed, "epoch", epoch)
        for begin in range(0, len(order), 8):
            x, kept = split.batch(order[begin : begin + 8])
            function(call(model, x), dataset.targets.unpack(kept)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def pairs(structure: Callable[[int], Any]) -> Any:
    return [(structure(number), int(Y[number])) for number in range(len(Y))]


DATA: dict[str, Any] = {
    "tuple of arrays": ((A, B), Y),
    "dict of arrays": ({"words": B, "numbers": A}, Y),
    "samples that are tuples": pairs(lambda n: (A[n], B[n])),
    "samples that are dicts": pairs(lambda n: {"words": B[n], "numbers": A[n]}),
    "samples with their label": [{"words": B[n], "label": int(Y[n]), "numbers": A[n]} for n in range(len(Y))],
}


@pytest.mark.parametrize("name", DATA)
def test_two_inputs_go_where_the_model_wants_them(name: str, tmp_path: Path) -> None:
    by_name = "dict" in name or "label" in name

    def call(model: nn.Module, x: Any) -> Any:
        return model(words=x[0], numbers=x[1]) if by_name else model(*x)

    result = fit(TwoInputs, DATA[name], tmp_path)
    assert_same_weights(loaded(TwoInputs, result.weights_file), train_plainly(TwoInputs, DATA[name], call, None))


def fit(build: Callable[[], nn.Module], data: Any, folder: Path, **options: Any) -> Any:
    result = lowmem_pnn.fit(
        build, data, test=data, max_gpu_mem="1GB", method="exact", partitions=2, epochs=2, batch_size=8, device="cpu", workdir=folder / "run",
        **options,
    )  # fmt: skip
    assert result.compared == "yes"
    assert result.scores["test"]["loss"] > 0
    return result


def test_a_model_may_take_one_tuple(tmp_path: Path) -> None:
    data = DATA["tuple of arrays"]
    result = fit(InOneTuple, data, tmp_path)
    assert_same_weights(loaded(InOneTuple, result.weights_file), train_plainly(InOneTuple, data, lambda model, x: model(x), None))


def test_attention_with_a_bias_for_each_sample(tmp_path: Path) -> None:
    data = biased_tokens()
    result = fit(Attending, data, tmp_path)
    assert_same_weights(loaded(Attending, result.weights_file), train_plainly(Attending, data, lambda model, x: model(*x), None))


@pytest.mark.parametrize("build", [Answers, AnswersTuple, AnswersDataclass])
def test_a_loss_takes_what_it_wants_of_a_structure(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    data = DATA["tuple of arrays"]
    result = fit(build, data, tmp_path, loss=both_parts)
    assert_same_weights(loaded(build, result.weights_file), train_plainly(build, data, lambda model, x: model(*x), both_parts))


class WithAuxiliary(TwoInputs):
    """Returns what a loss by name takes, and something else that nothing learns from."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(12, 3)

    def forward(self, numbers: Tensor, words: Tensor) -> Any:
        hidden = self.body(torch.cat([torch.relu(self.numbers(numbers)), self.words(words).mean(1)], 1))
        return {"aux": self.auxiliary(hidden), "out": self.head(hidden)}


def test_what_a_loss_by_name_does_not_take_stays_as_it_is(tmp_path: Path) -> None:
    data = DATA["tuple of arrays"]
    result = fit(WithAuxiliary, data, tmp_path)
    assert_same_weights(
        loaded(WithAuxiliary, result.weights_file), train_plainly(WithAuxiliary, data, lambda model, x: model(*x)["out"], None)
    )
    assert any("'auxiliary.weight' and 1 more parameters get no gradient" in note for note in result.notes)


def test_a_run_of_two_inputs_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    class StopsAt(lowmem_pnn.Callback):
        def on_step_end(self, info: Any) -> None:
            if info["step"] == 5:
                raise KeyboardInterrupt

    data = DATA["dict of arrays"]
    whole = fit(TwoInputs, data, tmp_path / "whole")
    options = {
        "max_gpu_mem": "1GB",
        "method": "exact",
        "partitions": 2,
        "epochs": 2,
        "batch_size": 8,
        "device": "cpu",
        "commit_every": 0.0,
    }
    with pytest.raises(KeyboardInterrupt):
        lowmem_pnn.fit(TwoInputs, data, test=data, workdir=tmp_path / "cut", callbacks=[StopsAt()], **options)
    cut = lowmem_pnn.fit(TwoInputs, data, test=data, workdir=tmp_path / "cut", max_gpu_mem="1GB", resume=True)
    assert_same_weights(loaded(TwoInputs, cut.weights_file), loaded(TwoInputs, whole.weights_file))


def test_a_loss_by_name_needs_one_output_or_a_usual_name(tmp_path: Path) -> None:
    data = DATA["tuple of arrays"]
    with pytest.raises(ConfigError, match=r"the model returns tuple of 2 \(0, 1\), of which no loss by name knows which to take"):
        fit(AnswersTuple, data, tmp_path)


@pytest.mark.parametrize(("data", "text"), [
    (((A, B[:3]), Y), "arrays have 3 and 29 samples; give as many of each"),
    (pairs(lambda n: (A[n], B[n][: 1 + n % 2])), r"sample 1 of .* is of another form than sample 0 \(it holds \(5,\) float32, \(2,\) int64\)"),
    ((({"a": A}), Y), "does not run on|missing|unexpected|required"),
])  # fmt: skip
def test_samples_that_do_not_fit_are_said(data: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError, lowmem_pnn.errors.CaptureError), match=text):
        fit(TwoInputs, data, tmp_path)


def test_a_label_that_is_no_class_is_named_and_samples_are_read_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sample 3 of .* has label -1, outside 0 to 1 \(2 classes\); number the classes from 0"):
        fit(TwoInputs, ((A, B), np.where(np.arange(len(Y)) == 3, -1, Y)), tmp_path)
    read: list[int] = []

    class Counts(list[Any]):
        def __getitem__(self, number: Any) -> Any:
            read.append(number)
            return super().__getitem__(number)

    split = from_torch(Counts(DATA["samples that are dicts"]))
    read.clear()
    split.batch([2, 5])
    assert read == [2, 5]


def test_what_is_for_one_tensor_is_refused_in_words(tmp_path: Path) -> None:
    data = DATA["tuple of arrays"]
    with pytest.raises(ConfigError, match=r"--skip-broken: samples of .* are several tensors, of which none is left out"):
        fit(TwoInputs, data, tmp_path, skip_broken=True)
