"""Layer-wise learning rates, and frozen parameters that learn from some epoch on: the same as in plain PyTorch."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers.displays import StopsAt
from helpers.exact_runs import COMMON, fit
from helpers.frozen import FrozenByItsCode, freeze_plainly
from helpers.plainloops import OPTIMIZERS, assert_same_weights, built, cross_entropy, loaded, training_split
from helpers.small_networks import images, small_resnet
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.optim.lr_schedules import lr_factor
from lowmem_pnn.seeds import permutation_of, seed_of


class Learns(FrozenByItsCode):
    """A small network of which all learns."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.requires_grad_(True)


def train_in_groups(
    build: Callable[[], nn.Module], rate_of: Callable[[str], float], frozen: str = "", unfreeze_at: int = 0, **options: Any
) -> nn.Module:
    """What one writes for rates by name, and for parameters that get a group of their own once they are unfrozen."""
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", method="exact", **options)
    split = training_split(images(), method="exact", **options)
    # The model twice, over the same values: as it is frozen, and as it is.
    model, epochs, size = built(build, config.seed), config.value_for("epochs", 0), config.value_for("batch_size", 0)
    steps, step, known = math.ceil(len(split) / size), 0, set()
    kind = OPTIMIZERS[config.value_for("optimizer", 0)]
    optimizers: list[tuple[float, torch.optim.Optimizer]] = []
    for epoch in range(epochs):
        if epoch < unfreeze_at and epoch == 0:
            state = model.state_dict()
            model = freeze_plainly(build(), frozen, norms=True)
            model.load_state_dict(state)
        elif epoch == unfreeze_at and unfreeze_at:
            for module in model.modules():
                vars(module).pop("train", None)
            model.requires_grad_(True)
        model.train()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in known:
                known.add(name)
                optimizers.append((rate_of(name), kind([parameter], weight_decay=config.weight_decay, fused=True)))
        order = permutation_of(len(split), config.seed, "epoch", epoch)
        for begin in range(0, len(order), size):
            x, y = split.batch(order[begin : begin + size])
            torch.manual_seed(seed_of(config.seed, "forward", 0, step, 0))
            cross_entropy(config, model(x), y).backward()
            for rate, optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate * lr_factor(config.lr_schedule, step, epochs * steps, config.warmup_steps)
                optimizer.step()
                optimizer.zero_grad()
            step += 1
    return model


def with_rates(name: str) -> float:
    return 0.05 if name.startswith("10.") else 0.002 if name.endswith(".bias") else 0.01


RATES = ["*.bias=0.002", "10.*=0.05"]


@pytest.mark.parametrize(
    "options", [{}, {"cuts": "1,2,3"}, {"cuts": "2", "lr_schedule": "cosine"}, {"clip_norm": 1e9, "cuts": "2"}]
)
def test_layer_wise_rates_are_same_as_groups_of_plain_pytorch(options: dict[str, Any], tmp_path: Path) -> None:
    result = fit(Learns, images(), tmp_path / "run", lr_for=RATES, **COMMON, **options)
    plain = {name: value for name, value in options.items() if name == "lr_schedule"}
    assert_same_weights(loaded(Learns, result.weights_file), train_in_groups(Learns, with_rates, **COMMON, **plain))


@pytest.mark.parametrize("method", ["backprop", "pnn", "neuroflux"])
def test_layer_wise_rates_hold_for_every_method(method: str, tmp_path: Path) -> None:
    options = {**COMMON, "method": method, "lr_for": {"[013].*": 1e-30}}
    result = fit(Learns, images(), tmp_path / "run", **options)
    before, after = built(Learns, COMMON["seed"]).state_dict(), loaded(Learns, result.weights_file).state_dict()
    slow = {f"{number}.{name}" for number in (0, 1, 3) for name in ("weight", "bias")}
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-20) for name in slow)
    assert not torch.equal(before["10.weight"], after["10.weight"])
    if method == "backprop":
        assert_same_weights(
            loaded(Learns, result.weights_file),
            train_in_groups(Learns, lambda name: 1e-30 if name in slow else 0.01, **COMMON),
        )


@pytest.mark.parametrize(
    "more",
    [{}, {"cuts": "1,2,3"}, pytest.param({"cuts": "1,2,3"}, marks=pytest.mark.resident), {"method": "backprop"}],
    ids=["whole", "cut", "cut-resident", "backprop"],
)
@pytest.mark.parametrize("until", [1, 2])
def test_unfrozen_parameters_learn_as_in_plain_pytorch(until: int, more: dict[str, Any], tmp_path: Path) -> None:
    build = functools.partial(Learns, 0.2)
    options = {**COMMON, "epochs": 3, "lr_schedule": "cosine"}
    result = fit(build, images(), tmp_path / "run", freeze="[0134].*", unfreeze_at=until, **{**options, **more})
    expected = train_in_groups(build, lambda name: 0.01, "[0134].*", until, **options)
    assert_same_weights(loaded(build, result.weights_file), expected)
    when = "in the first epoch" if until == 1 else "in the first 2 epochs"
    assert f"frozen: 8 of 14 parameters (276 of 500 values); 2 BatchNorms in eval mode, {when}" in result.notes
    assert [part["epochs"] for part in result.partitions] == [3] * len(result.partitions)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["action"] in ("sweep", "learn")] == [1, 2, 3]


def test_unfrozen_blocks_learn_as_in_plain_pytorch(tmp_path: Path) -> None:
    # The whole model is cut between blocks here, and could be cut inside them.
    options = {**COMMON, "epochs": 2}
    result = fit(small_resnet, images(), tmp_path / "run", method="backprop", freeze="[013].*", unfreeze_at=1, **options)
    expected = train_in_groups(small_resnet, lambda name: 0.01, "[013].*", 1, **options)
    assert_same_weights(loaded(small_resnet, result.weights_file), expected)


@pytest.mark.parametrize("cuts", [None, "1,2,3"])
def test_what_is_frozen_at_first_learns_at_a_rate_of_its_own(cuts: str | None, tmp_path: Path) -> None:
    options, more = {**COMMON, "epochs": 2}, {"cuts": cuts} if cuts else {}
    result = fit(
        Learns, images(), tmp_path / "run", freeze="[0134].*", unfreeze_at=1, lr_for=["[0134].*=0.002"], **more, **options
    )
    expected = train_in_groups(
        Learns, lambda name: 0.002 if name[:2] in ("0.", "1.", "3.", "4.") else 0.01, "[0134].*", 1, **options
    )
    assert_same_weights(loaded(Learns, result.weights_file), expected)


@pytest.mark.parametrize(
    ("at", "method"),
    [
        *((4, "exact"), (8, "exact"), (12, "exact"), (16, "exact"), (2, "backprop"), (7, "backprop")),
        *(pytest.param(at, "exact", marks=pytest.mark.resident, id=f"{at}-exact-resident") for at in (4, 12)),
    ],
)
def test_a_run_that_unfreezes_is_resumed(at: int, method: str, tmp_path: Path) -> None:
    options = {**COMMON, "method": method, "epochs": 2, "freeze": "[0134].*", "unfreeze_at": 1, "commit_every": 0}
    options |= {"cuts": "1,2"} if method == "exact" else {}
    with pytest.raises(Stopped):
        fit(Learns, images(), tmp_path / "run", display=StopsAt(at), **options)
    result = fit(Learns, images(), tmp_path / "run", resume=True, **options)
    expected = train_in_groups(Learns, lambda name: 0.01, "[0134].*", 1, **COMMON)
    assert_same_weights(loaded(Learns, result.weights_file), expected)


def test_patience_begins_anew_where_parameters_are_unfrozen(tmp_path: Path) -> None:
    # Nothing gets better at such a rate: the frozen epochs are all trained, and after them as many as patience lasts.
    options = {**COMMON, "epochs": 6, "lr": 1e-30, "freeze": "[0134].*", "unfreeze_at": 3, "early_stop": 1}
    result = fit(Learns, images(), tmp_path / "run", **options)
    assert json.loads((tmp_path / "run" / "journal.json").read_text())["body"]["stopped_after"] == 4
    last_line = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert result.macs == json.loads(last_line)["macs"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"unfreeze_at": 1}, "--unfreeze-at has no effect here: it needs --freeze or --train-only"),
        (
            {"unfreeze_at": 1, "freeze": "0.*", "method": "pnn"},
            "--unfreeze-at has no effect here: it needs --method exact or backprop",
        ),
        ({"unfreeze_at": 2, "freeze": "0.*"}, "--unfreeze-at 2: the epochs are 0 to 1; give at most 1, or more --epochs"),
        (
            {"unfreeze_at": 1, "freeze": "0.*", "compile": True},
            "--unfreeze-at trains layers in two ways, and --compile makes code of one",
        ),
        ({"lr_for": "10.*"}, "--lr-for '10.*': '10.*' is not PATTERN=X; write, for example, --lr-for 'features.*=1e-4'"),
        ({"lr_for": "10.*=0"}, "--lr-for"),
        ({"lr_for": "9.*=0.1"}, "--lr-for '9.*' matches no parameter of the model; "),
        ({"lr_for": "0.*=0.1", "freeze": "0.*"}, "--lr-for '0.*' matches only parameters that are frozen; leave it out"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        fit(Learns, images(), tmp_path / "run", **{**COMMON, **options})
    assert str(raised.value).startswith(text)
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_what_learns_later() -> None:
    options: dict[str, Any] = {"method": "exact", "epochs": 2, "max_gpu_mem": "100MB", "device": "cpu", "timing": False}
    whole = lowmem_pnn.plan(Learns, images(), **options)
    later = lowmem_pnn.plan(Learns, images(), freeze="[0134].*", unfreeze_at=1, **options)
    assert later.training_state_bytes == whole.training_state_bytes
