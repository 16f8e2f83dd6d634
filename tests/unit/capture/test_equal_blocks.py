"""Equal blocks on fake tensors: one runs, the others repeat it, and all that is known of the model is as if each had run."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.capture import setting
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.capture.fake_model import ModelRun, run_model
from lowmem_pnn.capture.setting import Setting
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.model.precision import FULL_PRECISION

calls: Counter[str] = Counter()


class Block(nn.Module):
    """A block with a number, a parameter that nothing depends on, a draw, and an output that no gradient comes to."""

    def __init__(self, number: int, kind: str = "") -> None:
        super().__init__()
        self.layer_idx, self.kind, self.calls = number, kind, 0
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8) if kind != "buffers" else nn.BatchNorm1d(8)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        calls[self.kind] += 1
        y = nn.functional.dropout(self.norm(self.linear(x)), 0.1, self.training)
        if self.kind == "number" and self.layer_idx % 2:
            y = y.relu()
        if self.kind == "state":
            self.calls += 1
        if self.kind == "in place":
            x += 1
        if scale is not None:
            y = y * scale
        return (x if self.kind == "input" else x + y), y.detach().argmax(1)


class Model(nn.Module):
    """Four blocks between two linear layers."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Block(number, kind) for number in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x, scale = self.first(x), torch.arange(8.0)
        for block in self.blocks:
            x, _ = block(x, scale)
        return self.last(x)


def run_of(model: nn.Module, training: bool = True) -> ModelRun:
    return run_model(model, Setting((TensorSpec((8,), torch.float32),), FULL_PRECISION, 2, training))


def all_of(run: ModelRun) -> tuple[Any, ...]:
    made = {name: size for name, size in run.made.items() if size}
    return (
        run.operations,
        run.kept,
        run.left,
        run.cached,
        run.written,
        run.changed,
        made,
        run.output,
        run.returned,
        run.asking,
        run.reached,
    )


KINDS = ("", "number", "state", "in place", "input", "buffers")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_known_of_a_model_is_as_if_each_block_had_run(kind: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = run_of(Model(kind), training)
    monkeypatch.setattr(setting, "EqualBlocks", lambda model, root: None)
    assert all_of(ours) == all_of(run_of(Model(kind), training))
    assert "blocks.3.linear.weight" in ours.reached or kind == "input"
    assert "blocks.3.unused" not in ours.reached


@pytest.mark.parametrize(("kind", "expected"), [("", 1), ("number", 4), ("in place", 4), ("input", 4)])
def test_a_block_runs_itself_where_it_may_do_otherwise(kind: str, expected: int) -> None:
    model = Model(kind)
    calls.clear()
    run_of(model, training=False)
    assert calls[kind] == expected


def test_blocks_of_other_settings_or_with_hooks_are_no_equals() -> None:
    model = Model()
    model.blocks[1].kind = "other"
    model.blocks[2].linear.register_forward_hook(lambda *_: None)
    calls.clear()
    run_of(model)
    assert sum(calls.values()) == 4


@pytest.mark.parametrize("kind", ["", "number", "state"])
def test_a_model_of_equal_blocks_is_cut_into_layers_that_compute_what_it_does(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Model(kind).eval(), torch.randn(5, 8)
    chain = capture(model, TensorSpec((8,), torch.float32))
    assert len(chain.layers) >= 5
    assert torch.equal(chain(x), model(x))


def test_equal_blocks_may_be_a_teacher_in_inference_mode() -> None:
    class Distils(Model):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                taught = self.first(x)
                for block in self.blocks:
                    taught, _ = block(taught)
            return self.last(x + taught.clone())

    assert len(capture(Distils().eval(), TensorSpec((8,), torch.float32)).layers) >= 1
