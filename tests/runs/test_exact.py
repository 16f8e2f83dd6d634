"""Exact training: whatever the cuts, the optimizer and the micro-batches, the bits are those of a loop in plain PyTorch."""

import functools
import itertools
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem_pnn.config.configure import configure
from torch import Tensor, nn

import lowmem_pnn
from helpers.plainloops import Trained, assert_same_weights, built, loaded, step_lines, train_by_exact, training_split
from helpers.small_networks import (
    Data,
    Forgets,
    Masked,
    SmallUnet,
    TiedThrice,
    averaging_mlp,
    images,
    small_conv,
    small_convnext,
    small_densenet,
    small_gpt,
    small_mlp,
    small_mobilenet,
    small_resnet,
    small_vit,
    tokens,
    vectors,
)
from lowmem_pnn import api as trainer
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.errors import CaptureError, ConfigError, DataError, DivergedError, Stopped
from lowmem_pnn.model.chain import TensorSpec, capture
from lowmem_pnn.optim.lr_schedules import factor
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.report import Result
from lowmem_pnn.sources.gpt import GptShape, make_gpt
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.training import setup as opening

pytestmark = pytest.mark.usefixtures("imports_are_no_garbage")


# Networks.


@dataclass
class Kind:
    """A network and its data.

    Args:
        build: makes the model.
        data: samples and labels.
        smallest: samples that it accepts at least.
    """

    build: Callable[[], nn.Module]
    data: Data
    smallest: int = 1


KINDS = {
    "mlp": Kind(small_mlp, vectors()),
    "conv": Kind(small_conv, images(), smallest=2),
    "resnet": Kind(small_resnet, images(), smallest=2),
    "mobilenet": Kind(small_mobilenet, images(side=16), smallest=2),
    "vit": Kind(small_vit, images()),
    "convnext": Kind(small_convnext, images(side=16)),
    "densenet": Kind(small_densenet, images(side=16), smallest=2),
    "unet": Kind(SmallUnet, images()),
    "averaging": Kind(averaging_mlp, vectors()),
    "masked": Kind(Masked, tokens()),
    "gpt": Kind(functools.partial(small_gpt, tied=False), tokens()),
}

# 36 samples for training, of 40, make a short last batch, and every batch a short last micro-batch.
COMMON: dict[str, Any] = {"epochs": 2, "batch_size": 10, "lr": 0.01, "seed": 3, "val_fraction": 0.1}


def fit(build: Callable[[], nn.Module], data: Any, folder: Path, **options: Any) -> Result:
    options = {"method": "exact", "max_gpu_mem": "400MB", "device": "cpu", **options}
    return lowmem_pnn.fit(build, data, workdir=folder, **options)


def num_layers(build: Callable[[], nn.Module], data: Data) -> int:
    with torch.device("meta"):
        model = build()
    return len(capture(model, TensorSpec(tuple(data[0].shape[1:]), data[0].dtype)).layers)


def check_equal(
    build: Callable[[], nn.Module], data: Data, folder: Path, plain: dict[str, Any] | None = None, **options: Any
) -> Trained:
    """A run has the weights, buffers and training loss of the plain loop, which moved them; the plain loop's are returned."""
    result = fit(build, data, folder, **options)
    expected = train_by_exact(build, data, **(plain or {}), **options)
    assert result.oom_retries == 0
    assert len(result.partitions) == options.get("partitions", options.get("cuts", "").count(",") + 2)
    assert {part["micro_batch"] for part in result.partitions} == {options.get("micro_batch") or options["batch_size"]}
    start = built(build, options.get("seed", 0)).state_dict()
    for name, tensor in expected.model.named_parameters():
        # What comes before BatchNorm has no use for a bias.
        assert not tensor.requires_grad or tensor.ndim < 2 or not torch.equal(tensor, start[name]), f"{name} did not move"
        assert tensor.requires_grad or torch.equal(tensor, start[name]), f"{name} is frozen"
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss
    return expected


# Cuts, networks, optimizers.


@pytest.mark.parametrize("kind", KINDS)
def test_exact_with_a_partition_for_every_layer_is_same_as_plain_pytorch(kind: str, tmp_path: Path) -> None:
    build, data = KINDS[kind].build, KINDS[kind].data
    layers = num_layers(build, data)
    assert layers >= 3
    cuts = ",".join(map(str, range(1, layers)))
    check_equal(build, data, tmp_path / "run", {"smallest": KINDS[kind].smallest}, cuts=cuts, micro_batch=4, **COMMON)


@pytest.mark.parametrize(("kind", "cuts"), [("conv", "1,3"), ("vit", "2"), ("unet", "1,3"), ("gpt", "2")])
def test_exact_with_partitions_of_some_layers_is_same_as_plain_pytorch(kind: str, cuts: str, tmp_path: Path) -> None:
    check_equal(KINDS[kind].build, KINDS[kind].data, tmp_path / "run", cuts=cuts, **COMMON)


def test_exact_in_one_partition_is_same_as_plain_pytorch(tmp_path: Path) -> None:
    check_equal(small_conv, images(), tmp_path / "run", partitions=1, micro_batch=4, **COMMON)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "loops"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_exact_is_same_as_plain_pytorch_with_every_optimizer(optimizer: str, fused: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **COMMON, "optimizer": optimizer, "fused": fused, "weight_decay": 0.02, "micro_batch": 4,
    }  # fmt: skip
    if optimizer == "sgd":
        options["momentum"] = 0.8
    check_equal(small_conv, images(), tmp_path / "run", partitions=3, **options)


def test_one_partition_that_commits_after_every_batch_keeps_its_state(tmp_path: Path) -> None:
    expected = train_by_exact(KINDS["conv"].build, KINDS["conv"].data, **COMMON)
    result = fit(KINDS["conv"].build, KINDS["conv"].data, tmp_path / "run", partitions=1, commit_every=0.0, **COMMON)
    assert_same_weights(loaded(KINDS["conv"].build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


class _SharesBuffers(nn.Module):
    """Layers that use one buffer, which the forward of the second may change."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 12))
        self.blocks = nn.Sequential(*(self.Block(self.scale, changes and number == 1) for number in range(3)), nn.Linear(12, 4))

    class Block(nn.Module):
        def __init__(self, scale: Tensor, changes: bool) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 12)
            self.register_buffer("scale", scale)
            self.changes = changes

        def forward(self, x: Tensor) -> Tensor:
            if self.changes:
                self.scale.add_(0.01)
            return self.linear(x) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.blocks(x)
        return scores


def test_a_buffer_of_several_partitions_is_kept_once_and_must_not_change(tmp_path: Path) -> None:
    options: dict[str, Any] = {**COMMON, "cuts": "1,2"}
    build = functools.partial(_SharesBuffers, changes=False)
    result = fit(build, vectors(), tmp_path / "constant", **options)
    assert_same_weights(loaded(build, result.weights_file), train_by_exact(build, vectors(), **options).model)
    with pytest.raises(CaptureError, match=r"buffer 'scale' is used on both sides of a cut, and a forward changes it"):
        fit(functools.partial(_SharesBuffers, changes=True), vectors(), tmp_path / "changing", **options)


def test_too_few_samples_for_the_modules_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 training samples make no batch that partition"):
        fit(
            KINDS["conv"].build,
            KINDS["conv"].data,
            tmp_path / "run",
            **{**COMMON, "train_limit": 1, "val_fraction": 0.0, "cuts": "1"},
        )


def test_a_slow_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What waits to be written must not be changed by what is computed meanwhile.
    write = TensorFile.write_from

    def slowly(self: TensorFile, *arguments: Any) -> None:
        time.sleep(0.003)
        write(self, *arguments)

    monkeypatch.setattr(TensorFile, "write_from", slowly)
    check_equal(small_conv, images(), tmp_path / "run", cuts="1,3", **COMMON)


def test_sgd_without_momentum_and_partitions_with_learning_rates_of_their_own(tmp_path: Path) -> None:
    def parts_of(model: Any) -> list[list[nn.Parameter]]:
        return [list(model[start:stop].parameters()) for start, stop in itertools.pairwise((0, 2, 4, 5))]

    options = {**COMMON, "optimizer": "sgd", "momentum": 0.0, "lr": (0.05, 0.1, 0.02), "cuts": "1,2"}
    check_equal(small_mlp, vectors(), tmp_path / "run", {"parts_of": parts_of}, **options)


def test_exact_is_same_as_backprop(tmp_path: Path) -> None:
    options = {**COMMON, "micro_batch": 5, "clip_norm": 0.3, "lr_schedule": "cosine", "label_smoothing": 0.1}
    exact = fit(small_conv, images(), tmp_path / "exact", cuts="1,2,3", test=images(30, seed=1), **options)
    whole = fit(small_conv, images(), tmp_path / "whole", method="backprop", test=images(30, seed=1), **options)
    assert_same_weights(loaded(small_conv, exact.weights_file), loaded(small_conv, whole.weights_file))
    for name in ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_f1"):
        assert getattr(exact, name) == getattr(whole, name) is not None, name


@pytest.mark.parametrize("micro_batch", [9, 4])
def test_a_rest_that_is_too_small_for_batchnorm_joins_what_comes_before_it_or_is_left_out(
    micro_batch: int, tmp_path: Path
) -> None:
    # Of 37 samples, batches of 9 leave one over; micro-batches of 4 leave one of every batch over.
    options = {**COMMON, "val_fraction": 0.075, "batch_size": 9, "micro_batch": micro_batch, "cuts": "1,3"}
    assert len(training_split(images(), **options, method="exact")) == 37
    check_equal(small_conv, images(), tmp_path / "run", {"smallest": 2}, **options)


def test_a_model_larger_than_its_budget_is_cut_by_itself_and_is_same_as_plain_pytorch(tmp_path: Path) -> None:
    def build() -> nn.Module:
        widths = (12, 900, 900, 900, 900, 4)
        layers = [module for ends in itertools.pairwise(widths) for module in (nn.Linear(*ends), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    options: dict[str, Any] = {"epochs": 1, "batch_size": 20, "lr": 1e-3, "val_fraction": 0.1}
    result = fit(build, vectors(), tmp_path / "run", max_gpu_mem="36MB", **options)
    assert result.training_state_bytes > 38_000_000
    assert len(result.partitions) > 1
    expected = train_by_exact(build, vectors(), **options)
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


# Frozen and shared weights.


def frozen_conv(*frozen: int) -> nn.Module:
    """The small network with some modules frozen; in training its BatchNorm goes on counting."""
    model = small_conv()
    assert isinstance(model, nn.Sequential)
    for number in frozen:
        model[number].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("frozen", "cuts"),
    [((0, 1, 4, 5), "1"), ((0, 1, 4, 5), "1,2,3"), ((4, 5, 9, 10), "1,2,3"), ((1, 9), "2")],
    ids=["first-half", "first", "middle", "scattered"],
)
def test_frozen_parameters_stay_and_the_gradient_passes_through_them(frozen: tuple[int, ...], cuts: str, tmp_path: Path) -> None:
    build = functools.partial(frozen_conv, *frozen)
    check_equal(build, images(), tmp_path / "run", {"smallest": 2}, cuts=cuts, micro_batch=5, clip_norm=0.5, **COMMON)


@pytest.mark.parametrize(
    ("cuts", "options"),
    [
        ("1", {}),
        ("1,2,3,4,5", {"micro_batch": 3}),
        ("1,2,3,4,5", {"micro_batch": 3, "clip_norm": 0.2}),
        ("3", {"clip_norm": 0.2}),
    ],
    ids=["whole", "accumulated", "clipped", "clipped-whole"],
)
def test_an_embedding_that_is_tied_to_the_head_is_same_as_in_plain_pytorch(
    cuts: str, options: dict[str, Any], tmp_path: Path
) -> None:
    build = functools.partial(small_gpt, tied=True)
    assert num_layers(build, tokens()) == 6
    check_equal(build, tokens(), tmp_path / "run", cuts=cuts, **options, **COMMON)


@pytest.mark.parametrize("cuts", ["1,2,3", "1,3", "2"])
def test_a_weight_that_several_partitions_use_several_times_accumulates_as_in_plain_pytorch(cuts: str, tmp_path: Path) -> None:
    # Plain PyTorch adds up a tied weight's gradients use by use, and then micro-batch by micro-batch: the order decides the last bits.
    check_equal(TiedThrice, vectors(), tmp_path / "run", cuts=cuts, micro_batch=3, **{**COMMON, "optimizer": "sgd"})


# Clipping, schedules, smoothing.


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
        ("exact", {"lr_schedule": "cosine"}),
        ("exact", {"lr_schedule": "cosine", "warmup_steps": 3}),
        ("exact", {"lr_schedule": "constant", "warmup_steps": 5}),
        ("exact", {"lr_schedule": "onecycle"}),
        ("backprop", {"lr_schedule": "cosine", "warmup_steps": 3}),
        ("backprop", {"lr_schedule": "onecycle"}),
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
    assert [line["lr"] for line in lines] == pytest.approx([0.01 * factor(name, line["step"] - 1, 12, warmup) for line in lines])
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


# The last layer in chunks of rows.


@pytest.mark.parametrize(
    ("cuts", "loss_chunk", "micro_batch"),
    [(None, 3, None), ("1", 3, 4), ("1,2", 7, None), ("1,2", 1, 4), ("1,2", 10, None)],
)
def test_a_loss_in_chunks_of_samples_is_same_as_a_plain_loop_over_them(
    cuts: str | None, loss_chunk: int, micro_batch: int | None, tmp_path: Path
) -> None:
    where = {"cuts": cuts} if cuts else {"partitions": 1}
    options = {**COMMON, "micro_batch": micro_batch, "loss_chunk": loss_chunk, "label_smoothing": 0.1, **where}
    check_chunked(small_mlp, vectors(), tmp_path / "run", lambda model: model[-1], **options)


@pytest.mark.parametrize(("cuts", "loss_chunk"), [("2", 5), ("1,2,3,4,5", 5), ("1,2,3,4,5", 24)])
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


# Language models.


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


# A run's life.


class _Interrupts(Display):
    """Stops a run when it tells something for the `at`th time."""

    def __init__(self, at: int | None = None) -> None:
        self.count, self._at = 0, at

    def _tell(self) -> None:
        self.count += 1
        if self.count == self._at:
            raise Stopped("enough")

    def enter(self, title: str) -> None:
        self._tell()

    def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
        self._tell()

    def advance(self, num_samples: int, used_bytes: int, budget_bytes: int) -> None:
        self._tell()

    def end_epoch(self, line: dict[str, Any]) -> None:
        self._tell()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("conv", {"cuts": "1,3"}), ("conv", {"cuts": "2", "clip_norm": 0.1}), ("gpt", {"cuts": "2,5", "lr_schedule": "onecycle"})],
    ids=["conv", "clipped", "tied"],
)
def test_a_run_that_was_interrupted_and_resumed_is_same_as_uninterrupted(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    build = functools.partial(small_gpt, tied=True) if kind == "gpt" else KINDS[kind].build
    options = {**COMMON, **options, "micro_batch": 10 if kind == "gpt" else 5, "commit_every": 0.0, "log_every": 1}
    display = _Interrupts()
    expected = fit(build, KINDS[kind].data, tmp_path / "whole", display=display, **options)
    assert display.count >= 6
    for at in (display.count // 3, display.count * 3 // 4):
        folder = tmp_path / f"run{at}"
        with pytest.raises(Stopped):
            fit(build, KINDS[kind].data, folder, display=_Interrupts(at), **options)
        result = fit(build, KINDS[kind].data, folder, resume=True, **options)
        assert result.resumed == 1
        assert_same_weights(loaded(build, result.weights_file), loaded(build, expected.weights_file))
        assert (result.train_loss, result.val_loss) == (expected.train_loss, expected.val_loss)
        assert [line["step"] for line in step_lines(folder)] == [line["step"] for line in step_lines(tmp_path / "whole")]


NAMED: dict[str, Any] = {
    "max_gpu_mem": "400MB", "device": "cpu", "model": "mlp:64-20-16-10", "data": "digits", "train_limit": 60, "test_limit": 50,
    "method": "exact", "cuts": "1,2", "epochs": 3, "batch_size": 16, "lr": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return trainer.start_run(configure(**NAMED), tmp_path_factory.mktemp("named") / "run")


def test_a_run_that_is_asked_to_stop_commits_and_goes_on_from_there(finished: Result, tmp_path: Path) -> None:
    asked = itertools.count()
    with pytest.raises(Stopped, match="--resume"):
        trainer.start_run(configure(**NAMED), tmp_path / "run", should_stop=lambda: next(asked) >= 5)
    result = trainer.resume_run(tmp_path / "run")
    assert result.resumed == 1
    assert Path(result.weights_file).read_bytes() == Path(finished.weights_file).read_bytes()
    assert (result.train_loss, result.test_loss) == (finished.train_loss, finished.test_loss)


def test_a_finished_run_is_evaluated_to_its_own_scores(finished: Result) -> None:
    assert lowmem_pnn.evaluate(finished.workdir) == {
        "test_loss": finished.test_loss, "test_accuracy": finished.test_accuracy, "test_f1": finished.test_f1,
    }  # fmt: skip


class _Squeeze(Display):
    """Takes memory away from the device when the second epoch begins."""

    def __init__(self, device: SimulatedDevice, capacity: int) -> None:
        self._device, self._capacity = device, capacity

    def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
        if epoch == 1:
            self._device.capacity_bytes = self._capacity


def test_a_batch_that_does_not_fit_is_done_again_with_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some partitions of the batch may have been stepped by then; all of them are to go back.
    options = {**COMMON, "batch_size": 12, "cuts": "1,3", "commit_every": 0.0}
    peaks = {}
    for size in (12, 6):
        device = SimulatedDevice(1 << 30)
        monkeypatch.setattr(opening, "_open_device", lambda config, rank=None, device=device: device)
        peaks[size] = fit(small_conv, images(), tmp_path / str(size), max_gpu_mem=1 << 30, micro_batch=size, **options).peak_bytes
    device = SimulatedDevice(1 << 30)
    display = _Squeeze(device, (peaks[12] + peaks[6]) // 2)
    monkeypatch.setattr(opening, "_open_device", lambda config, rank=None: device)
    result = fit(small_conv, images(), tmp_path / "run", max_gpu_mem=1 << 30, display=display, **options)
    assert result.oom_retries == 1
    assert {part["micro_batch"] for part in result.partitions} == {6}
    # 36 samples are 3 batches an epoch.
    expected = train_by_exact(small_conv, images(), micro_batch_of=lambda step: 12 if step < 3 else 6, smallest=2, **options)
    assert_same_weights(loaded(small_conv, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


# What cannot be trained.


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_parameter_without_gradient_is_an_error_that_names_it(clip_norm: float | None, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"parameter 'blocks\.1\.forgotten\.weight' got no gradient in partition 2 of 3 "):
        fit(Forgets, vectors(), tmp_path / "run", cuts="1,2", clip_norm=clip_norm, epochs=1)


@pytest.mark.parametrize("clip_norm", [None, 1e20])
def test_a_loss_that_is_no_number_ends_the_run_at_its_last_commit(clip_norm: float | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **COMMON, "optimizer": "sgd", "momentum": 0.0, "lr": 1e5, "cuts": "1,2", "clip_norm": clip_norm, "commit_every": 0.0,
        "log_every": 1,
    }  # fmt: skip
    with pytest.raises(DivergedError) as first:
        fit(small_mlp, vectors(), tmp_path / "run", **options)
    message = str(first.value)
    found = re.search(r"partition \d of 3 .*step (\d+)", message)
    assert found, message
    assert "last commit is kept" in message
    assert not (tmp_path / "run" / "result.json").exists()
    # Every step before it was committed, and none of them has to be done again to come to the same end.
    step = int(found[1])
    assert step > 1
    display = _Interrupts()
    with pytest.raises(DivergedError) as second:
        fit(small_mlp, vectors(), tmp_path / "run", resume=True, display=display, **options)
    assert str(second.value) == message
    assert [line["step"] for line in step_lines(tmp_path / "run")] == list(range(1, step))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kappa": 1.0}, "--kappa"),
        ({"epochs": (1, 2)}, "--epochs"),
        ({"batch_size": (8, 16)}, "--batch-size"),
        ({"lr": (0.1, 0.2, 0.3)}, "--lr"),
        ({"lr_schedule": "onecycle", "warmup_steps": 2}, "--warmup-steps"),
        ({"label_smoothing": 1.0}, "--label-smoothing"),
        ({"clip_norm": 0.0}, "--clip-norm"),
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


def test_batches_too_small_for_the_model_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch"):
        fit(small_conv, images(), tmp_path / "run", cuts="2", epochs=1, batch_size=1)
