"""Models whose vocabulary outweighs their blocks, in budgets that do not hold its gradient: trained as in plain PyTorch, up to rounding."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.displays import StopsAt
from helpers.exact_runs import fit
from helpers.plainloops import assert_same_weights, loaded, train_by_exact
from lowmem_pnn.errors import Stopped

WORDS, WIDTH = 12000, 256
HEAD_BYTES = 4 * WORDS * WIDTH
# Of the weight and its gradient one alone: a plan that makes gradients as a whole is refused.
BUDGET = {"max_gpu_mem": f"{HEAD_BYTES + 18_000_000}B"}
OPTIONS: dict[str, Any] = {
    "epochs": 1, "batch_size": 4, "optimizer": "adamw", "weight_decay": 0.1, "lr": 0.01, "seed": 3,
    "val_fraction": 0, "compare": False,
}  # fmt: skip


class Words(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, WORDS, bias=not tied)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(self.embedding(x)))
        return scores


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, WORDS, (8, 6), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    # As many in each sample, so that means over tokens are means over samples.
    targets[::2, 2] = -100
    targets[1::2, 4] = -100
    return ids[:, :-1], targets


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {"optimizer": "sgd", "momentum": 0.9}),
        (True, {"micro_batch": 1, "clip_norm": 0.1, "label_smoothing": 0.1}),
        (False, {"micro_batch": 2}),
    ],
    ids=["tied-sgd", "tied-accumulated-clipped-smoothed", "untied-accumulated"],
)
def test_a_budget_that_does_not_hold_the_gradient_trains_the_same(tied: bool, options: dict[str, Any], tmp_path: Path) -> None:
    build, options = functools.partial(Words, tied), {**OPTIONS, **options}
    result = fit(build, tokens(), tmp_path / "run", **options, **BUDGET)
    assert result.peak_bytes <= result.budget_bytes
    assert result.oom_retries == 0
    assert any("classes at a time" in note for note in result.notes)
    expected = train_by_exact(build, tokens(), **options)
    assert result.train_loss == pytest.approx(expected.train_loss, rel=1e-5)
    trained = loaded(build, result.weights_file).state_dict()
    for name, tensor in expected.model.state_dict().items():
        # AdamW divides gradients that are next to nothing, rounding included, by their own size.
        assert (trained[name] - tensor).norm() <= (1e-7 if options["optimizer"] == "sgd" else 1e-5) * tensor.norm()


def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    build, options = functools.partial(Words, True), {**OPTIONS, **BUDGET, "commit_every": 0.0, "log_every": 1}
    display = StopsAt()
    expected = fit(build, tokens(), tmp_path / "whole", display=display, **options)
    with pytest.raises(Stopped):
        fit(build, tokens(), tmp_path / "run", display=StopsAt(display.count // 2), **options)
    result = fit(build, tokens(), tmp_path / "run", resume=True, **options)
    assert result.resumed == 1
    assert_same_weights(loaded(build, result.weights_file), loaded(build, expected.weights_file))
    assert result.train_loss == expected.train_loss
