"""Runs whose weights are kept in bfloat16: the same however they are cut and stopped, smaller, and as good as the user's model."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowmem_pnn
from helpers.displays import StopsAt
from helpers.exact_runs import COMMON, fit
from helpers.small_networks import small_gpt, tokens, vectors
from lowmem_pnn.errors import ConfigError, Stopped

KEPT: dict[str, Any] = {**COMMON, "weights_dtype": "bf16", "optimizer": "adamw"}
GPT = functools.partial(small_gpt, tied=True, dropout=0.0)


def wide_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4))


def assert_same(one: str, other: str) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"clip_norm": 0.05, "optimizer_state": "bf16"}])
def test_cuts_change_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(wide_mlp, vectors(), tmp_path / "whole", cuts="1", compare=True, **KEPT, **options)
    cut = fit(wide_mlp, vectors(), tmp_path / "cut", cuts="1,2", **KEPT, **options)
    assert_same(whole.weights_file, cut.weights_file)
    found = load_file(whole.weights_file)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: torch.bfloat16 if name.endswith("weight") else torch.float32 for name in wide_mlp().state_dict()
    }
    assert any("values that learn are kept in bf16" in note for note in whole.notes)
    assert whole.training["weights_dtype"] == "bf16"
    assert whole.compared == "yes"
    if "clip_norm" in options:
        other = fit(wide_mlp, vectors(), tmp_path / "other", method="backprop", **KEPT, **options)
        assert_same(whole.weights_file, other.weights_file)


def test_tied_embeddings_of_a_language_model_are_kept_so_too(tmp_path: Path) -> None:
    whole = fit(GPT, tokens(), tmp_path / "whole", method="backprop", **KEPT)
    cut = fit(GPT, tokens(), tmp_path / "cut", cuts="1,3", **KEPT)
    found, other = load_file(whole.weights_file), load_file(cut.weights_file)
    assert found["head.weight"].dtype == torch.bfloat16
    assert torch.equal(found["head.weight"], found["embedding.tokens.weight"])
    # The two gradients of a tied weight are added up in another order.
    assert all(torch.allclose(found[name].float(), other[name].float(), atol=0.05) for name in found)
    plain = fit(GPT, tokens(), tmp_path / "plain", **{**KEPT, "weights_dtype": "fp32"})
    assert abs(whole.train_loss - plain.train_loss) < 0.1


def test_a_run_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    options = {**KEPT, "cuts": "1,2", "commit_every": 0, "optimizer_state": "bf16"}
    whole = fit(wide_mlp, vectors(), tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        fit(wide_mlp, vectors(), tmp_path / "run", display=StopsAt(9), **options)
    assert_same(fit(wide_mlp, vectors(), tmp_path / "run", resume=True, **options).weights_file, whole.weights_file)


def test_the_state_is_smaller_and_the_models_own_class_reads_it(tmp_path: Path) -> None:
    def state_bytes(**options: Any) -> int:
        report = lowmem_pnn.plan(
            wide_mlp, vectors(), max_gpu_mem="100MB", device="cpu", timing=False, method="exact", optimizer="adamw", **options
        )
        return report.training_state_bytes

    values = 12 * 96 + 96 * 96 + 96 * 4
    assert state_bytes() - state_bytes(weights_dtype="bf16") == 4 * values  # of weights and gradients
    result = fit(wide_mlp, vectors(), tmp_path / "run", test=vectors(), **KEPT)
    inputs = vectors()[0][:5]
    plain = lowmem_pnn.load_weights(wide_mlp(), result.weights_file)
    assert torch.equal(plain(inputs), lowmem_pnn.load(result)(inputs))
    assert lowmem_pnn.evaluate(result, vectors())["test_loss"] == result.test_loss
    merged = load_file(lowmem_pnn.export(result, merge=True)["file"])
    assert all(torch.equal(merged[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, r"--weights-dtype has no effect here: it needs --optimizer adam or adamw"),
        (
            {"freeze": "*weight"},
            r"--weights-dtype bf16 has no effect here: the model has no float32 weights of linear layers or embeddings",
        ),
    ],
)
def test_where_nothing_can_be_kept_so_it_is_said(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(wide_mlp, vectors(), tmp_path / "run", **{**KEPT, **options})
