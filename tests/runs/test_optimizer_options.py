"""Options of the optimizer's step and of the schedule: the same as PyTorch's own, also through an end in the midst of an epoch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from helpers.displays import StopsAt
from helpers.exact_runs import COMMON, fit
from helpers.plainloops import assert_same_weights, built, loaded, step_lines, training_split
from helpers.small_networks import images, small_conv, small_mlp, vectors
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.seeds import permutation_of

OPTIONS: dict[str, Any] = {
    **COMMON,
    "weight_decay": 0.3,
    "betas": "0.8,0.95",
    "eps": 1e-3,
    "lr_schedule": "linear",
    "log_every": 1,
}


def plain(*, no_decay: Any, min_lr: float = 0.0, max_steps: int = 8, warmup: int = 0) -> nn.Module:
    """PyTorch's AdamW with two groups, and the linear schedule of `transformers.get_linear_schedule_with_warmup`, in 2 epochs of 4 steps."""
    split, model = training_split(vectors(), **COMMON), built(small_mlp, COMMON["seed"])
    named = dict(model.named_parameters())
    groups = [
        {"params": [one for name, one in named.items() if not no_decay(name, one)], "weight_decay": 0.3},
        {"params": [one for name, one in named.items() if no_decay(name, one)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr = COMMON["lr"]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.95), eps=1e-3, fused=True)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        factor = (max_steps - step) / (max_steps - warmup)
        return (min_lr + (lr - min_lr) * factor) / lr if min_lr else factor

    scheduler, step = LambdaLR(optimizer, rate), 0
    for epoch in range(2):
        order = permutation_of(len(split), COMMON["seed"], "epoch", epoch)
        for begin in range(0, len(order), COMMON["batch_size"]):
            if step == max_steps:
                return model
            x, y = split.batch(order[begin : begin + COMMON["batch_size"]])
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
    return model


@pytest.mark.parametrize("method", ["exact", "backprop"])
@pytest.mark.parametrize(
    ("options", "no_decay"),
    [
        ({}, lambda name, one: False),
        ({"no_decay": "*bias,2.*"}, lambda name, one: name.endswith("bias") or name.startswith("2.")),
        ({"no_decay_norms": True}, lambda name, one: one.dim() < 2),
    ],
)
def test_the_step_is_pytorchs(options: dict[str, Any], no_decay: Any, method: str, tmp_path: Path) -> None:
    cuts = {"cuts": "2"} if method == "exact" else {}
    result = fit(small_mlp, vectors(), tmp_path / "run", method=method, **cuts, **options, **OPTIONS)
    assert_same_weights(loaded(small_mlp, result.weights_file), plain(no_decay=no_decay))
    assert result.training["betas"] == [0.8, 0.95]
    assert result.training["lr_schedule"] == "linear"


@pytest.mark.parametrize("options", [{"min_lr": 0.004}, {"warmup_steps": 3}])
def test_the_schedule_is_the_usual_one(options: dict[str, Any], tmp_path: Path) -> None:
    fit(small_mlp, vectors(), tmp_path / "run", cuts="2", **options, **OPTIONS)
    rates = [line["lr"] for line in step_lines(tmp_path / "run")]
    lr, low, warmup = 0.01, options.get("min_lr", 0.0), options.get("warmup_steps", 0)
    assert rates == [
        lr * ((step + 1) / warmup) if step < warmup else low + (lr - low) * ((8 - step) / (8 - warmup)) for step in range(8)
    ]


@pytest.mark.parametrize("method", ["exact", "backprop"])
@pytest.mark.parametrize("most", [2, 4, 6])
def test_training_ends_in_the_midst_of_an_epoch(most: int, method: str, tmp_path: Path) -> None:
    result = fit(small_mlp, vectors(), tmp_path / "run", method=method, max_steps=most, **OPTIONS)
    assert_same_weights(loaded(small_mlp, result.weights_file), plain(no_decay=lambda name, one: False, max_steps=most))
    lines = step_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, most + 1))
    assert result.epochs == [1 if most <= 4 else 2]
    assert result.training["max_steps"] == most
    whole = fit(small_mlp, vectors(), tmp_path / "whole", method=method, **OPTIONS)
    samples = {2: 20, 4: 36, 6: 56}[most]
    assert result.macs * 72 == whole.macs * samples


@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_a_resume_before_the_last_step_is_exact(method: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "method": method, "epochs": 5, "max_steps": 6, "commit_every": 0}
    whole = fit(small_mlp, vectors(), tmp_path / "whole", **options)
    # What was asked is kept, so that the same command goes on with the run; the epochs up to the last step are trained.
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["epochs"] == [5]
    assert whole.epochs == [2]
    stops = 0
    for at in range(2, 9, 3):
        folder = tmp_path / str(at)
        try:
            fit(small_mlp, vectors(), folder, display=StopsAt(at), **options)
        except Stopped:
            stops += 1
        resumed = fit(small_mlp, vectors(), folder, resume=True, **options)
        assert_same_weights(loaded(small_mlp, resumed.weights_file), loaded(small_mlp, whole.weights_file))
    assert stops == 3


def test_quantized_state_takes_them_too(tmp_path: Path) -> None:
    options = {**COMMON, "weight_decay": 0.5, "optimizer_state": "bf16", "cuts": "1"}
    build = lambda: nn.Sequential(nn.Linear(12, 400), nn.ReLU(), nn.Linear(400, 4))  # noqa: E731
    runs = [
        fit(build, vectors(), tmp_path / str(number), **options, **more)
        for number, more in enumerate([{}, {"no_decay": "0.weight"}, {"betas": "0.5,0.9"}])
    ]
    one, kept, other = (json.dumps(loaded(build, run.weights_file)[0].weight.tolist()) for run in runs)
    assert len({one, kept, other}) == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_steps": 9}, "--max-steps 9: 2 epochs of 36 samples have 8 steps; give --epochs 3, or fewer steps"),
        ({"max_steps": 3, "method": "pnn"}, "--max-steps has no effect here: it needs --method exact or backprop"),
        ({"max_steps": 3, "recovery_epochs": 1}, "--max-steps ends training, and --recovery-epochs goes on after it; give one"),
        ({"min_lr": 0.1}, "--min-lr has no effect here: it needs --lr-schedule linear or cosine"),
        ({"min_lr": 0.1, "lr_schedule": "cosine"}, "--min-lr 0.1 is above --lr 0.01; give less"),
        ({"no_decay": "0.*"}, "--no-decay has no effect here: it needs --weight-decay above 0"),
        ({"no_decay": "nothing", "weight_decay": 0.1}, "--no-decay 'nothing' matches no parameter"),
        ({"betas": "0.9"}, "--betas '0.9': two numbers are needed; write A,B, such as 0.9,0.95"),
        ({"betas": "0.9,1"}, "--betas"),
        ({"betas": "0.9,0.9", "optimizer": "sgd"}, "--betas has no effect here: it needs --optimizer adam or adamw"),
        (
            {"freeze": "0.*", "unfreeze_at": 1, "max_steps": 3},
            "--unfreeze-at 1: --max-steps 3 ends training in epoch 0, counted from 0",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        fit(small_conv, images(), tmp_path / "run", **{**COMMON, **options})
    assert text in str(error.value)
