"""What people hang on their models is kept: own `train()` methods, hooks on parameters, Python state; bit-equal to plain PyTorch."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowmem_pnn
from helpers.displays import StopsAt
from helpers.exact_runs import COMMON, fit
from helpers.plainloops import assert_same_weights, loaded, train_by_exact
from helpers.small_networks import images, small_conv, vectors
from lowmem_pnn.errors import BudgetError, CaptureError, CheckpointError, ConfigError, Stopped
from lowmem_pnn.reporting.plan_report import PlanReport
from lowmem_pnn.reporting.progress import Display

CUT_EVERYWHERE: dict[str, Any] = {**COMMON, "cuts": "1,2", "micro_batch": 4}


class FreezesItsNorms(nn.Sequential):
    """Keeps its BatchNorms in eval mode, and one of them from learning, as fine-tuning code does."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(64, 4),
        )
        nn.init.uniform_(self[1].running_mean)

    def train(self, mode: bool = True) -> "FreezesItsNorms":
        super().train(mode)
        self[1].eval()
        self[4].eval()
        self[4].weight.requires_grad_(False)
        return self


class Counts(nn.Module):
    """Divides by the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scaled: Tensor = self.linear(x) / (1 + 0.1 * self.calls)
        return scaled


def counting() -> nn.Module:
    return nn.Sequential(Counts(), nn.Linear(12, 12), Counts(), nn.Linear(12, 4))


def halve_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def clamping() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    model[2].weight.register_post_accumulate_grad_hook(halve_gradient)
    model[0].weight.factor = 3.0
    return model


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.lstm(x)[0]
        return outputs


def two_lstms() -> nn.Module:
    second = Recurrent()
    second.lstm = nn.LSTM(6, 6, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (4, 3)), Recurrent(), second, nn.Flatten(), nn.Linear(24, 4))


def tall(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), *middle, nn.Linear(12, 4))


class DropsAlways(nn.Module):
    """Draws at random in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.3, training=True)


def hooked_inside() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)), nn.Tanh(), nn.Linear(12, 4)
    )
    model[1].register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 0.5,))
    return model


KEPT: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "own train()": (FreezesItsNorms, images()),
    "hooks on parameters": (clamping, vectors()),
    "Python state": (counting, vectors()),
    "other kernels without gradients": (two_lstms, vectors()),
    "random draws in eval mode": (lambda: tall(DropsAlways(), nn.Linear(12, 12)), vectors()),
    "a hook on the backward of a container": (hooked_inside, vectors()),
    "weights that a forward changes": (
        lambda: nn.Sequential(nn.Embedding(11, 6, max_norm=0.5), nn.Flatten(), nn.Linear(36, 12), nn.Linear(12, 4)),
        (torch.arange(240).reshape(40, 6) % 11, torch.arange(40) % 4),
    ),
}


class Fading(torch.autograd.Function):
    """Its gradient gets smaller with every backward."""

    number = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Fading.number += 1
        return gradients[0] / Fading.number


class Fades(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        faded: Tensor = Fading.apply(x)
        return faded


class HooksAgain(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            self.weight.register_hook(lambda gradient: gradient * 0.9)
        return super().forward(x)


def masked_gradient() -> nn.Module:
    model, mask = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4)), torch.eye(12)
    model[0].weight.register_hook(lambda gradient: gradient * mask)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "state outside of modules": (
        lambda: tall(Fades()),
        r"^model .* changes Fading.number whenever it runs, which is outside of its modules",
    ),
    "hooks that add up": (
        lambda: tall(HooksAgain(12, 12)),
        r"registers a hook on parameter '1.weight' whenever it runs, and the hooks add up",
    ),
    "a hook with a tensor": (
        masked_gradient,
        r"^a hook on '0.weight' of Sequential uses 'mask', a tensor that was made with the model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(case: str, tmp_path: Path) -> None:
    build, text = REFUSED[case]
    with pytest.raises(CaptureError, match=text):
        fit(build, vectors(), tmp_path / "run", **COMMON)


@pytest.mark.parametrize("case", KEPT)
def test_what_people_hang_on_a_model_is_kept(case: str, tmp_path: Path) -> None:
    build, data = KEPT[case]
    # Validation would count as calls; and weights decay, before they are brought back to their norm or after.
    options = {**CUT_EVERYWHERE, "val_fraction": 0.0, "weight_decay": 0.1}
    if case == "own train()":
        data = (data[0][:, :, :8, :8].contiguous(), data[1])
    expected = train_by_exact(build, data, **options)
    result = fit(build, data, tmp_path / "run", **options)
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


class Shrinks(nn.Linear):
    """Makes its weight smaller whenever it learns."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.weight.data.mul_(0.9)
        return super().forward(x)


@pytest.mark.parametrize("options", [{"clip_norm": 0.05}, {"partitions": 1, "cuts": None, "clip_norm": 0.05}, {}], ids=str)
def test_a_forward_that_changes_weights_which_learn_does_so_once_a_batch(options: dict[str, Any], tmp_path: Path) -> None:
    build = lambda: nn.Sequential(Shrinks(12, 12), nn.ReLU(), Shrinks(12, 12), nn.ReLU(), nn.Linear(12, 4))  # noqa: E731
    options = {**COMMON, "cuts": "1,2", **options}
    expected = train_by_exact(build, vectors(), **options)
    result = fit(build, vectors(), tmp_path / "run", **options)
    assert_same_weights(loaded(build, result.weights_file), expected.model)


def test_backprop_runs_hooks_on_parameters(tmp_path: Path) -> None:
    options: dict[str, Any] = {**COMMON, "method": "backprop"}
    result = fit(clamping, vectors(), tmp_path / "run", **options)
    assert_same_weights(loaded(clamping, result.weights_file), train_by_exact(clamping, vectors(), **COMMON).model)


def test_python_state_survives_a_stop(tmp_path: Path) -> None:
    options = {**CUT_EVERYWHERE, "val_fraction": 0.0}
    expected = train_by_exact(counting, vectors(), **options)
    with pytest.raises(Stopped):
        fit(counting, vectors(), tmp_path / "run", display=StopsAt(8), commit_every=0.0, **options)
    result = fit(counting, vectors(), tmp_path / "run", resume=True, commit_every=0.0, **options)
    assert result.resumed == 1
    assert_same_weights(loaded(counting, result.weights_file), expected.model)


def test_what_micro_batches_change_is_said(tmp_path: Path) -> None:
    said = Tells()
    for build in (clamping, counting):
        result = fit(build, vectors(), tmp_path / build.__name__, display=said, **CUT_EVERYWHERE)
        assert len(result.notes) == 1
        assert result.notes[0] in said.messages
        assert result.notes[0] in str(result)
    assert any(
        text.startswith("hooks on gradients (of '0.weight' and 5 more) run for each gradient of 4 of the 10 samples")
        for text in said.messages
    )
    assert fit(clamping, vectors(), tmp_path / "whole", **COMMON).notes == []


def test_compiling_refuses_python_state(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--compile: a forward changes '0\.calls', whose value compiled code would freeze"):
        fit(counting, vectors(), tmp_path / "run", compile=True, **{**COMMON, "cuts": "1"})


def test_a_hook_sees_all_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--loss-chunk 2: the last layer .* cannot be computed in parts"):
        fit(functools.partial(clamping), vectors(), tmp_path / "run", loss_chunk=2, **COMMON)


def test_a_model_has_what_was_trained_and_is_else_as_it_was(tmp_path: Path) -> None:
    model = counting()
    result = fit(model, vectors(), tmp_path / "run", **COMMON)
    assert 0 < model[0].calls == lowmem_pnn.load(result, counting())[0].calls
    frozen = FreezesItsNorms()
    fit(frozen, (images()[0][:, :, :8, :8].contiguous(), images()[1]), tmp_path / "other", **COMMON)
    assert frozen[1].training
    assert frozen[4].weight.requires_grad
    assert torch.is_tensor(frozen[1].running_mean)


class AsksForItsVersion(nn.Linear):
    """Loads no weights without their version, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *others: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version should be 2 instead of {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_a_model_that_asks_for_versions_loads_its_own_weights(tmp_path: Path) -> None:
    build = lambda: nn.Sequential(nn.Linear(12, 12), AsksForItsVersion(12, 4))  # noqa: E731
    said = Tells()
    result = fit(build, vectors(), tmp_path / "run", display=said, **COMMON)
    assert "load its weights by lowmem_pnn.load_weights()" in " ".join(said.messages)
    model = lowmem_pnn.load_weights(build(), result.weights_file)
    expected = load_file(result.weights_file)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match="cannot be loaded into Linear: "):
        lowmem_pnn.load_weights(nn.Linear(2, 2), result.weights_file)


def wide_conv() -> nn.Module:
    def block(channels_in: int, channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels_in, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU())

    return nn.Sequential(block(3, 32), block(32, 64), block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))


class Tells(Display):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_batchnorm_under_micro_batches_is_said_or_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {**COMMON, "cuts": "1,2"}
    said = Tells()
    result = fit(small_conv, images(), tmp_path / "micro", display=said, micro_batch=4, **options)
    norms = sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in small_conv().modules())
    assert result.batch_norm == {"layers": norms, "samples": 4, "batch": 10}
    assert "over 4 of the 10 samples of a batch" in " ".join(said.messages)
    assert "BatchNorm" in str(result)
    whole = fit(small_conv, images(), tmp_path / "whole", batch_norm="refuse", **options)
    assert whole.batch_norm == {}
    assert {part["micro_batch"] for part in whole.partitions} == {10}
    with pytest.raises(
        ConfigError, match=r"--micro-batch 4 of --batch-size 10: a batch has to go through at once here, by --batch-norm refuse"
    ):
        fit(small_conv, images(), tmp_path / "both", batch_norm="refuse", micro_batch=4, **options)
    with pytest.raises(BudgetError, match=r"give --max-gpu-mem \d+MB"):
        fit(
            wide_conv,
            images(side=64),
            tmp_path / "tight",
            **{**options, "batch_norm": "refuse", "max_gpu_mem": "12MB", "cuts": None},
        )


class OwnNorm(nn.Module):
    """Centres over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def with_own_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), OwnNorm(), nn.ReLU(), nn.Linear(12, 4))


def test_a_normalisation_of_ones_own_is_said_or_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {**COMMON, "cuts": "1,2", "epochs": 1}
    said = Tells()
    result = fit(with_own_norm, vectors(), tmp_path / "micro", display=said, micro_batch=4, **options)
    note = "samples are mixed: module '3' mixes 4 of the 10 samples of a batch, and in plain PyTorch all of them"
    assert result.notes == [note]
    assert f"{note} (--micro-batch 4)" in said.messages
    assert note in str(result)
    with pytest.raises(
        ConfigError, match=r"--micro-batch 4 of --batch-size 10: a batch has to go through at once here, by --batch-norm"
    ):
        fit(with_own_norm, vectors(), tmp_path / "both", batch_norm="refuse", micro_batch=4, **options)
    whole = fit(with_own_norm, vectors(), tmp_path / "whole", batch_norm="refuse", **options)
    assert whole.notes == []


class WideOwnNorm(nn.Module):
    """Maps of many channels, normalised over the batch by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 32, 3, 1, 1), OwnNorm(), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), OwnNorm(), nn.ReLU()
        )
        self.scores = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.maps(x))
        return scores


def test_where_a_batch_does_not_fit_at_once_the_budget_is_named_from_which_it_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "exact", "batch_size": 20, "epochs": 1, "max_gpu_mem": "22MB"}
    said, data = Tells(), images(22, side=32)
    fit(WideOwnNorm, data, tmp_path / "micro", display=said, **options)
    found = re.search(r"samples are mixed: module 'maps\.1' .* from --max-gpu-mem (\d+)\.0MB on", " ".join(said.messages))
    assert found is not None
    refused = (
        r"^module 'maps.1' mixes the samples of a batch, which is to .* \(--batch-norm refuse\): .* give --max-gpu-mem "
        + found[1]
    )
    with pytest.raises(BudgetError, match=refused):
        fit(WideOwnNorm, data, tmp_path / "tight", batch_norm="refuse", **options)
    whole = fit(WideOwnNorm, data, tmp_path / "whole", batch_norm="refuse", **{**options, "max_gpu_mem": f"{found[1]}MB"})
    assert whole.notes == []
    assert {part["micro_batch"] for part in whole.partitions} == {20}


@pytest.mark.parametrize(
    "options", [{"method": "pnn", "recovery_epochs": 1}, {"method": "exact", "fused": False, "batch_norm": "refuse"}]
)
def test_the_budget_that_an_error_names_is_enough_and_a_tenth_less_is_not(options: dict[str, Any]) -> None:
    def report(megabytes: int) -> PlanReport:
        return lowmem_pnn.plan(
            wide_conv, images(side=64), max_gpu_mem=f"{megabytes}MB", timing=False, device="cpu", batch_size=20, **options
        )

    named = re.search(r"give --max-gpu-mem (\d+)MB", report(9).reason)
    assert named is not None
    assert report(int(named[1])).fits
    assert not report(int(named[1]) * 9 // 10).fits
