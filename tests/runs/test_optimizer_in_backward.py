"""Steps in the midst of backward: the same bits as after it, gradients of one layer at a time, and what happens when memory runs out."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from helpers.plainloops import assert_same_weights, loaded, train_by_backprop
from helpers.simulated import Squeeze, fit_on
from helpers.small_networks import Data, Forgets, images, small_conv, small_gpt, small_mlp, tokens, vectors, wide_mlp
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.errors import CaptureError, DivergedError
from lowmem_pnn.reporting.result import Result

Build = Callable[[], nn.Module]

KINDS: dict[str, tuple[Build, Data, dict[str, Any]]] = {
    "conv": (small_conv, images(), {}),
    "gpt, tied": (functools.partial(small_gpt, tied=True), tokens(), {}),
    "loss in chunks": (small_mlp, vectors(), {"loss_chunk": 3}),
}


def wide_maps() -> nn.Module:
    """Convolutions whose maps outweigh all else: backward needs most when the last layer has stepped."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(8),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def fit(build: Build, data: Data, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Result:
    return fit_on(
        SimulatedDevice(1 << 22), monkeypatch, build, data, workdir=folder, **{"epochs": 2, "batch_size": 10, **options}
    )


def one_partition(method: str) -> dict[str, int]:
    return {} if method == "backprop" else {"partitions": 1}


# Training.


@pytest.mark.parametrize(
    ("kind", "method", "where"),
    [
        ("conv", "exact", {"cuts": "2"}),
        ("conv", "backprop", {}),
        ("conv", "pnn", {"cuts": "2"}),
        ("conv", "neuroflux", {}),
        ("gpt, tied", "exact", {"cuts": "2"}),
        ("gpt, tied", "backprop", {}),
        ("loss in chunks", "exact", {"cuts": "2"}),
        ("loss in chunks", "backprop", {}),
        ("loss in chunks", "pnn", {"cuts": "2"}),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_stepping_in_backward_is_same_as_after_it(
    kind: str, method: str, where: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, data, more = KINDS[kind]
    options = {"method": method, "epochs": 1, **where, **more}
    runs = {flag: fit(build, data, tmp_path / str(flag), monkeypatch, step_in_backward=flag, **options) for flag in (True, False)}
    assert_same_weights(*(loaded(build, run.weights_file) for run in runs.values()))
    assert runs[True].train_loss == runs[False].train_loss


@pytest.mark.parametrize(("method", "share"), [("exact", 0.9), ("backprop", 0.9), ("pnn", 0.9), ("neuroflux", 0.9)])
def test_gradients_of_one_layer_at_a_time_are_in_memory(
    method: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the comparison before training, which this device counts too, and which would set the peak of so small a network.
    options: dict[str, Any] = {"method": method, "epochs": 1, "compare": False, **one_partition(method)}
    runs = {
        flag: fit(wide_mlp, vectors(40, 96), tmp_path / str(flag), monkeypatch, step_in_backward=flag, **options)
        for flag in (True, False)
    }
    assert runs[True].predicted_peak_bytes < share * runs[False].predicted_peak_bytes
    if method == "exact":
        return  # what waits to be written is the host's, and this device counts it
    assert runs[True].peak_bytes < share * runs[False].peak_bytes
    for run in runs.values():
        assert run.peak_bytes <= 1.02 * run.predicted_peak_bytes
    # Where micro-batches add up, or the norm of all gradients is clipped, nothing is gained, and nothing is promised.
    for name, waiting in {"added": {"micro_batch": 5}, "clipped": {"clip_norm": 1.0}}.items():
        run = fit(wide_mlp, vectors(40, 96), tmp_path / name, monkeypatch, **options, **waiting)
        assert 1.02 * run.predicted_peak_bytes >= run.peak_bytes
        # Layers that learn by losses of their own are clipped one by one, as soon as their gradients are there.
        waits = name == "added" or method != "neuroflux"
        assert (run.peak_bytes > share * runs[False].peak_bytes) == waits


def test_exact_keeps_gradients_that_are_to_be_clipped_outside_of_memory_while_backward_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {
        flag: fit(
            wide_mlp,
            vectors(40, 96),
            tmp_path / str(flag),
            monkeypatch,
            method="exact",
            partitions=1,
            clip_norm=0.1,
            step_in_backward=flag,
        )
        for flag in (True, False)
    }
    assert_same_weights(*(loaded(wide_mlp, run.weights_file) for run in runs.values()))
    assert runs[True].partitions[0]["predicted_peak_bytes"] < runs[False].partitions[0]["predicted_peak_bytes"]


def test_a_batch_that_was_stepped_in_part_is_done_again_from_the_last_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 12, "commit_every": 0.0, "method": "backprop"}
    plain = fit(wide_maps, images(), tmp_path / "plain", monkeypatch, **options)
    device = SimulatedDevice(1 << 30)
    display = Squeeze(device, int(plain.peak_bytes * 0.85))
    result = fit_on(device, monkeypatch, wide_maps, images(), workdir=tmp_path / "run", display=display, **options)
    assert result.oom_retries == 1
    assert "out of memory; going on from the last commit with a micro-batch of 6" in display.messages
    # 36 samples are 3 batches an epoch.
    del options["method"]
    expected = train_by_backprop(wide_maps, images(), micro_batch_of=lambda step: 12 if step < 3 else 6, **options)
    assert_same_weights(loaded(wide_maps, result.weights_file), expected)


@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_a_parameter_without_gradient_is_an_error_though_others_have_stepped(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CaptureError, match=r"parameter 'forgotten\.weight' got no gradient in partition 1 of 1"):
        fit(Forgets, vectors(), tmp_path / "run", monkeypatch, method=method, loss=Forgets.loss, **one_partition(method))


@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_a_loss_that_is_not_finite_ends_the_run_before_anything_steps(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = vectors()
    x[:] = 3e38
    with pytest.raises(DivergedError, match=r"the loss became (nan|inf) in partition 1 of 1 \(0 to 2\), .* 1; .*lower --lr"):
        fit(small_mlp, (x, y), tmp_path / "run", monkeypatch, method=method, batch_size=40, **one_partition(method))
