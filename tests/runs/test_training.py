"""Training as a whole: the same bits as plain PyTorch, partitions left alone once trained, and weights that anybody can load."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import lowmem_pnn
from helpers import networks, plainloops
from helpers.plainloops import assert_same_weights, loaded, train_by_backprop, train_by_pnn
from helpers.simulated import chain_of, fit_on
from helpers.small_networks import Data, images, small_conv, small_mlp, vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.errors import CheckpointError, ConfigError, DataError, Stopped
from lowmem_pnn.reporting.plan_report import PlanReport
from lowmem_pnn.reporting.progress import TerminalDisplay
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.process import Process
from lowmem_pnn.stores.encoding import WORK_BYTES
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.training import start
from lowmem_pnn.units import format_bytes

KINDS: dict[str, tuple[Callable[[], nn.Module], Data]] = {"mlp": (small_mlp, vectors()), "conv": (small_conv, images())}


def fit(build: Callable[[], nn.Module], data: Data, folder: Path, **options: Any) -> Result:
    return lowmem_pnn.fit(build, data, max_gpu_mem="400MB", device="cpu", workdir=folder, **options)


@pytest.mark.parametrize(
    ("kind", "optimizer", "fused", "micro_batch"),
    [
        ("conv", "sgd", True, None),
        ("conv", "sgd", False, 4),
        ("conv", "adam", True, 4),
        ("mlp", "adam", False, None),
        ("mlp", "adamw", True, 4),
        ("conv", "adamw", True, None),
        ("conv", "adamw", False, 4),
    ],
)
def test_backprop_is_same_as_plain_pytorch(
    kind: str, optimizer: str, fused: bool, micro_batch: int | None, tmp_path: Path
) -> None:
    build, data = KINDS[kind]
    # 36 samples make a short last batch, and every batch a short last micro-batch.
    options: dict[str, Any] = {
        "optimizer": optimizer, "fused": fused, "micro_batch": micro_batch, "epochs": 2, "batch_size": 10, "weight_decay": 0.01,
        "lr": 0.01, "seed": 3,
    }  # fmt: skip
    result = fit(build, data, tmp_path / "run", method="backprop", **options)
    assert result.oom_retries == 0
    assert [part["micro_batch"] for part in result.partitions] == [micro_batch or 10]
    assert_same_weights(loaded(build, result.weights_file), train_by_backprop(build, data, **options))


def test_pnn_of_one_partition_is_same_as_backprop(tmp_path: Path) -> None:
    build, data = KINDS["conv"]
    whole = fit(build, data, tmp_path / "backprop", method="backprop", epochs=2, batch_size=12)
    one = fit(build, data, tmp_path / "pnn", method="pnn", partitions=1, epochs=2, batch_size=12)
    assert_same_weights(loaded(build, one.weights_file), loaded(build, whole.weights_file))
    assert (one.train_loss, one.val_loss) == (whole.train_loss, whole.val_loss)


def test_pnn_is_same_as_a_plain_loop_for_each_partition(tmp_path: Path) -> None:
    build, data = KINDS["conv"]
    options: dict[str, Any] = {
        "epochs": (2, 1, 3), "lr": (0.01, 0.02, 0.005), "batch_size": (12, 9, 18), "kappa": (2.0, 5.0), "optimizer": "adam", "seed": 1,
    }  # fmt: skip
    result = fit(build, data, tmp_path / "run", cuts="1,3", **options)
    assert [(part["epochs"], part["batch"]) for part in result.partitions] == [(2, 12), (1, 9), (3, 18)]
    assert_same_weights(loaded(build, result.weights_file), train_by_pnn(build, [4, 12], data, **options))  # type: ignore[arg-type]


def _as_int8(x: torch.Tensor) -> torch.Tensor:
    """Every channel of a map, or every vector, through int8 with a scale of its own."""
    rows = x.flatten(2) if x.dim() > 2 else x.unsqueeze(1)
    low, high = rows.amin(2, keepdim=True), rows.amax(2, keepdim=True)
    symmetric = torch.maximum(high, -low) / 127
    one_sided = high / 255
    signed = (rows / symmetric).round() * symmetric
    unsigned = (rows / one_sided).round() * one_sided
    return torch.where(low >= 0, unsigned, signed).nan_to_num(0.0).view(x.shape)


@pytest.mark.parametrize(
    ("activation_dtype", "kind", "cuts", "starts"),
    [
        ("bfloat16", "conv", "1,3", [4, 12]),
        ("float16", "conv", "1,3", [4, 12]),
        ("int8", "conv", "1,3", [4, 12]),
        ("int8", "mlp", "1,2", [2, 4]),
    ],
)
def test_pnn_on_kept_activations_is_same_as_a_plain_loop_that_rounds_them(
    activation_dtype: str, kind: str, cuts: str, starts: list[int], tmp_path: Path
) -> None:
    build, data = KINDS[kind]
    options: dict[str, Any] = {
        "epochs": 2,
        "lr": 0.01,
        "batch_size": 12,
        "kappa": 2.0,
        "seed": 1,
        "activation_dtype": activation_dtype,
    }

    def kept(outputs: torch.Tensor) -> torch.Tensor:
        return _as_int8(outputs) if activation_dtype == "int8" else outputs.to(getattr(torch, activation_dtype)).float()

    result = lowmem_pnn.fit(
        build, data, max_gpu_mem="400MB", device="cpu", workdir=tmp_path / "run", test=data, cuts=cuts, **options
    )
    model = loaded(build, result.weights_file)
    assert_same_weights(model, train_by_pnn(build, starts, data, kept=kept, **options))  # type: ignore[arg-type]
    # What the weights file is said to reach is what it reaches on activations as they are.
    x, y = data
    scores = model(x).detach()
    assert result.test_accuracy == pytest.approx(float((scores.argmax(1) == y).float().mean()))
    assert result.test_loss == pytest.approx(float(nn.functional.cross_entropy(scores, y)), rel=1e-6)


KEPT: dict[str, Any] = {
    "max_gpu_mem": "400MB", "device": "cpu", "model": "mlp:64-20-16-10", "data": "digits", "train_limit": 60, "test_limit": 50,
    "cuts": "1,2", "epochs": 3, "batch_size": 16, "lr": 0.01, "commit_every": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(("activation_dtype", "method"), [("bfloat16", "pnn"), ("int8", "neuroflux")])
def test_a_run_on_kept_activations_that_is_stopped_anywhere_goes_on_to_the_same_bytes(
    activation_dtype: str, method: str, tmp_path: Path
) -> None:
    config = configure(**KEPT, method=method, activation_dtype=activation_dtype)
    whole = start.begin(config, tmp_path / "whole")
    assert whole is not None
    for stops_at in (5, 23):  # in the first partition, and in one that reads stores
        folder, asked = tmp_path / str(stops_at), itertools.count()
        process = Process(should_stop=lambda asked=asked, at=stops_at: next(asked) >= at)  # type: ignore[misc]
        with pytest.raises(Stopped):
            start.begin(config, folder, process=process)
        result = start.resume(folder)
        assert result is not None
        assert Path(result.weights_file).read_bytes() == Path(whole.weights_file).read_bytes()
        assert (result.train_loss, result.val_loss, result.test_loss) == (whole.train_loss, whole.val_loss, whole.test_loss)
    assert lowmem_pnn.evaluate(whole.workdir)["test_loss"] == whole.test_loss


def test_a_resumed_run_verifies_what_its_activations_are_kept_in(tmp_path: Path) -> None:
    config, asked = configure(**KEPT, activation_dtype="int8"), itertools.count()
    with pytest.raises(Stopped):
        start.begin(config, tmp_path / "run", process=Process(should_stop=lambda: next(asked) >= 23))
    shard = next((tmp_path / "run" / "activations").glob("*-train/00000.safetensors"))
    with TensorFile.open(shard, writable=True) as file:
        file.write_from("0.scales", file.read("0.scales") + 1)
    with pytest.raises(CheckpointError, match=r"00000\.safetensors' has CRC-32"):
        start.resume(tmp_path / "run")


def test_a_value_beyond_float16_is_an_error_that_says_where(tmp_path: Path) -> None:
    def large() -> nn.Module:
        model = small_mlp()
        with torch.no_grad():
            model.get_parameter("0.weight").mul_(1e6)
        return model

    options = {"epochs": 1, "batch_size": 12, "cuts": "1,2", "lr": 1e-6, "kappa": 1.0}
    text = (
        r"^partition 1 of 3 \(.*\) gives \S+ at its boundary, and --activation-dtype float16 ends at 65504; "
        "begin again with bfloat16 or float32$"
    )
    with pytest.raises(ConfigError, match=text):
        fit(large, vectors(), tmp_path / "run", activation_dtype="float16", **options)
    fit(large, vectors(), tmp_path / "other", activation_dtype="bfloat16", **options)


def test_a_plan_shows_what_activations_are_kept_in() -> None:
    def planned(**options: Any) -> PlanReport:
        return lowmem_pnn.plan("mlp:64-512-256-10", "digits", max_gpu_mem="100MB", cuts="1,2", device="cpu", **options)

    plans = {
        activation_dtype: planned(activation_dtype=activation_dtype)
        for activation_dtype in ("float32", "bfloat16", "float16", "int8")
    }
    samples = plans["float32"].partitions[0]["activation_bytes"] // (4 * 512)
    assert planned().partitions == plans["float32"].partitions
    for activation_dtype, each, beside in (("float32", 4, 0), ("bfloat16", 2, 0), ("float16", 2, 0), ("int8", 1, 4)):
        sizes = [part["activation_bytes"] for part in plans[activation_dtype].partitions]
        assert sizes == [samples * (512 * each + beside), samples * (256 * each + beside), 0]
        assert str(plans[activation_dtype]).count(format_bytes(sizes[0])) >= 1
        saved = samples * ((512 + 256) * (4 - each) - 2 * beside)
        # And the headers of the shards that are not needed.
        assert saved <= plans["float32"].disk_bytes - plans[activation_dtype].disk_bytes <= saved + 40 * 4096
        for part, exact in zip(plans[activation_dtype].partitions, plans["float32"].partitions, strict=True):
            # Twice: what lies in the heap has slack beside it.
            assert part["predicted_peak_bytes"] <= exact["predicted_peak_bytes"] + 2 * WORK_BYTES


@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_kept_activations_have_no_effect_where_none_are_kept(method: str) -> None:
    given = {"max_gpu_mem": "1GB", "model": "mlp:64-10", "data": "digits", "activation_dtype": "int8"}
    with pytest.raises(
        ConfigError, match=r"^--activation-dtype has no effect here: it needs --method pnn, neuroflux or incubate$"
    ):
        configure(**given, method=method)
    with pytest.raises(
        ConfigError, match=r"^--activation-dtype has no effect here: it needs partitions that learn from activations"
    ):
        configure(**given, parallel_sil=True)
    with pytest.raises(ConfigError, match=r"^--activation-dtype 'bf16' is none of float32, bfloat16, float16, int8"):
        configure(**{**given, "activation_dtype": "bf16"})


def test_a_partition_is_left_alone_while_later_ones_train(tmp_path: Path) -> None:
    data = images()
    short = fit(small_conv, data, tmp_path / "short", cuts="1,2", epochs=(2, 2, 1), batch_size=12)
    long = fit(small_conv, data, tmp_path / "long", cuts="1,2", epochs=(2, 2, 4), batch_size=12)
    one, other = (loaded(small_conv, run.weights_file).state_dict() for run in (short, long))
    # Modules 0 to 8 are the first two partitions; their buffers count as well.
    same = {name: torch.equal(one[name], other[name]) for name in one}
    assert {name for name, equal in same.items() if not equal} == {name for name in one if int(name.split(".")[0]) >= 9}


def test_the_seed_decides_all_that_is_random(tmp_path: Path) -> None:
    runs = [
        fit(small_conv, images(), tmp_path / str(number), cuts="2", epochs=1, batch_size=12, seed=seed)
        for number, seed in enumerate((5, 5, 6))
    ]
    first, again, other = (loaded(small_conv, run.weights_file).state_dict() for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["12.weight"], other["12.weight"])


class _Tied(nn.Module):
    """A weight used twice, a frozen parameter, a buffer that nothing reads, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)])
        self.layers[1].weight = self.layers[0].weight
        self.layers[2].bias.requires_grad_(False)
        self.register_buffer("note", torch.arange(3.0))
        self.register_buffer("scale", torch.full((12,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x).relu() * self.scale
        return self.layers[2](self.layers[1](x).relu())


@pytest.mark.parametrize("method", ["pnn", "backprop"])
def test_ties_frozen_parameters_and_unused_buffers_come_through(method: str, tmp_path: Path) -> None:
    data = vectors()
    options = {"epochs": 2, "batch_size": 12, "val_fraction": 0.0}
    result = lowmem_pnn.fit(
        _Tied, data, max_gpu_mem="400MB", device="cpu", workdir=tmp_path / "run", test=data, method=method, **options
    )
    model = loaded(_Tied, result.weights_file)
    start = plainloops.built(_Tied)
    assert model.layers[0].weight is model.layers[1].weight
    assert not torch.equal(model.layers[0].weight, start.layers[0].weight)
    assert torch.equal(model.layers[2].bias, start.layers[2].bias)
    assert torch.equal(model.note, start.note)
    if method == "backprop":
        assert_same_weights(model, train_by_backprop(_Tied, data, **options))
    x, y = data
    scores = model(x).detach()
    assert result.test_accuracy == pytest.approx(float((scores.argmax(1) == y).float().mean()))
    assert result.test_loss == pytest.approx(float(nn.functional.cross_entropy(scores, y)), rel=1e-5)


def test_a_model_that_is_given_is_trained_from_its_own_values_and_holds_what_was_learnt(tmp_path: Path) -> None:
    model = plainloops.built(small_conv, seed=17)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"epochs": 1, "batch_size": 12}
    result = fit(model, images(), tmp_path / "run", method="backprop", **options)  # type: ignore[arg-type]
    assert_same_weights(model, loaded(small_conv, result.weights_file))

    def same_start() -> nn.Module:
        twin = small_conv()
        twin.load_state_dict(before)
        return twin

    assert_same_weights(loaded(small_conv, result.weights_file), train_by_backprop(same_start, images(), **options))


def test_batches_too_small_for_the_model_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^--batch-size 1: in train mode the model takes at least 2 samples at once .*; give --batch"
    ):
        fit(small_conv, images(), tmp_path / "run", method="backprop", epochs=1, batch_size=1)
    with pytest.raises(
        DataError, match=r"^a validation fraction of 0\.1 of 1 samples leaves none to train on; use more samples or"
    ):
        fit(small_conv, images(1), tmp_path / "other", method="backprop", epochs=1, batch_size=8)


def test_boundaries_of_several_tensors_train_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, side = networks.FAMILIES["densenet"]
    data = images(24, side, 7)
    chain = chain_of(build, 3, side, side)
    cut = max(range(1, len(chain.layers)), key=lambda number: len(chain.boundaries[number]))
    assert len(chain.boundaries[cut]) > 1
    device = SimulatedDevice(1 << 30)
    result = fit_on(
        device, monkeypatch, build, data, workdir=tmp_path / "run", cuts=str(cut), epochs=(3, 2), batch_size=8, test=data,
        lr=3e-3, kappa=1.0,
    )  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [float(line.split('"train_loss": ')[1].split(",")[0]) for line in lines if "train_loss" in line]
    assert losses[2] < losses[0]
    with torch.no_grad():
        scores = loaded(build, result.weights_file)(data[0])
    assert result.test_accuracy == pytest.approx(float((scores.argmax(1) == data[1]).float().mean()))
    assert all(part["peak_bytes"] <= part["predicted_peak_bytes"] * 1.02 for part in result.partitions), [
        (part["peak_bytes"], part["predicted_peak_bytes"]) for part in result.partitions
    ]


class _Averaged(nn.Module):
    """Keeps a running mean by assigning to its buffer, as many moving averages do."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x + 0 * self.mean


def test_a_buffer_that_a_forward_replaces_is_kept(tmp_path: Path) -> None:
    x, y = torch.rand(64, 8), torch.arange(64) % 3
    build = lambda: nn.Sequential(nn.Linear(8, 8), _Averaged(), nn.Linear(8, 3))  # noqa: E731
    options = {"max_gpu_mem": "100MB", "method": "backprop", "epochs": 1, "batch_size": 32, "val_fraction": 0.0, "device": "cpu"}
    result = lowmem_pnn.fit(build, (x, y), workdir=tmp_path / "run", **options)
    assert load_file(result.weights_file)["1.mean"].abs().sum() > 0


def test_the_callers_random_state_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    lowmem_pnn.fit("mlp:64-8-10", "digits", max_gpu_mem="100MB", epochs=1, train_limit=40, workdir=tmp_path / "run", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_test_loss_that_is_no_number_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.rand(32, 8), torch.arange(32) % 3
    options = {"max_gpu_mem": "100MB", "method": "backprop", "epochs": 1, "batch_size": 32, "val_fraction": 0.0, "device": "cpu"}
    display = TerminalDisplay(Console(stderr=True, width=200))
    result = lowmem_pnn.fit(
        "mlp:8-8-3", (x, y), test=(x, y), optimizer="sgd", lr=1e38, workdir=tmp_path / "run", display=display, **options
    )
    assert result.test_loss is None
    assert re.search(r"test loss is (nan|inf), and left out of the result", capsys.readouterr().err)
