"""Runs with compiled layers: exact training is backprop, stopped and resumed too; local methods; memory; refusals."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers.commands import lowmem_pnn as command
from helpers.compiled import Shared, assert_allocates_what_was_foreseen, compiled, sharing_code, tied_words, two_layers
from helpers.displays import StopsAt
from helpers.plainloops import assert_same_weights, loaded
from helpers.small_networks import Data, images, small_gpt, small_mlp, small_vit, tokens, vectors
from lowmem_pnn.errors import Stopped
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.reporting.result import Result

COMMON: dict[str, Any] = {"epochs": 2, "batch_size": 12, "lr": 0.01, "seed": 3, "val_fraction": 0.1}


@pytest.fixture(scope="module", autouse=True)
def code() -> Iterator[Shared]:
    """What is compiled once serves all runs that compile the same layers for the same numbers of samples: lowering takes half a minute."""
    with sharing_code() as shared:
        yield shared


def fit(build: Callable[[], nn.Module], data: Data, folder: Path, **options: Any) -> Result:
    options = {**COMMON, "method": "exact", "max_gpu_mem": "400MB", "device": "cpu", "compile": True, **options}
    return lowmem_pnn.fit(build, data, workdir=folder, **options)


# What it computes.

KINDS: dict[str, tuple[Callable[[], nn.Module], Data, dict[str, Any]]] = {
    "conv": (two_layers, images(), {"cuts": "1"}),
    "conv in bf16, channels last": (two_layers, images(), {"cuts": "1", "precision": "bf16", "channels_last": True}),
    "tied words, loss in chunks": (tied_words, tokens(), {"cuts": "1,2", "loss_chunk": 20}),
    "tied gpt, loss in chunks": (lambda: small_gpt(tied=True, layers=1), tokens(), {"cuts": "1,3", "loss_chunk": 20}),
}
RESUMED = "tied words, loss in chunks"
LONG = ("bf16", "gpt")
"""Kinds with as many operations again, each lowered anew."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_same_as_backprop(kind: str, tmp_path: Path, code: Shared, all_cases: bool) -> None:
    if any(word in kind for word in LONG) and not all_cases:
        pytest.skip("only with --all: as many operations again, each lowered anew")
    build, data, options = KINDS[kind]
    exact = fit(build, data, tmp_path / "exact", **options)
    whole = {name: value for name, value in options.items() if name != "cuts"}
    backprop = fit(build, data, tmp_path / "backprop", **whole, method="backprop")
    assert len(exact.partitions) == options["cuts"].count(",") + 2
    assert 0 < exact.compiled["functions"] <= 2 * exact.compiled["layers"]
    assert_same_weights(loaded(build, exact.weights_file), loaded(build, backprop.weights_file))
    assert exact.train_loss == backprop.train_loss
    as_it_is = fit(build, data, tmp_path / "plain", **options, compile=False)
    assert as_it_is.compiled == {}
    assert exact.train_loss == pytest.approx(as_it_is.train_loss, rel=0.05 if "precision" in options else 1e-3)
    if kind == RESUMED:
        code.clear()  # as in another process, where all is compiled again
        check_resumed(exact, tmp_path / "run")


def check_resumed(whole: Result, folder: Path) -> None:
    """A run that is stopped and resumed has the weights of the whole one."""
    build, data, options = KINDS[RESUMED]
    with pytest.raises(Stopped):
        fit(build, data, folder, **options, commit_every=0.0, display=StopsAt(4))
    resumed = fit(build, data, folder, **options, commit_every=0.0, resume=True)
    assert resumed.resumed == 1
    assert_same_weights(loaded(build, resumed.weights_file), loaded(build, whole.weights_file))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "pnn", "cuts": "1,2"}, {"method": "pnn", "recovery_epochs": 1, "partitions": 2},
                                     {"method": "neuroflux"}], ids=["pnn", "recovery", "neuroflux"])  # fmt: skip
def test_local_methods_learn_the_same_but_for_last_bits(options: dict[str, Any], tmp_path: Path) -> None:
    # Without BatchNorm: biases before it have gradients of rounding alone, which Adam makes as large as any.
    found = fit(small_mlp, vectors(), tmp_path / "compiled", **options)
    as_it_is = fit(small_mlp, vectors(), tmp_path / "plain", **options, compile=False)
    assert found.train_loss == pytest.approx(as_it_is.train_loss, rel=1e-3)
    weights = loaded(small_mlp, as_it_is.weights_file).state_dict()
    for name, tensor in loaded(small_mlp, found.weights_file).state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-2, atol=1e-3)


# What it takes.


def test_a_run_stays_within_plan_and_budget(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = "--model mlp:64-1024-1024-1024-10 --data digits --method exact --cuts 1,2 --epochs 1 --device cpu"
    outcome = command(f"fit --max-gpu-mem 48MB {options} --compile --workdir {run} --json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["training_state_bytes"] > 0.7 * result["budget_bytes"]
    assert result["compiled"]["layers"] == 4
    assert result["compiled"]["functions"] == 2 * 3
    assert result["peak_bytes"] <= result["budget_bytes"]
    assert result["peak_bytes"] <= result["predicted_peak_bytes"] + result["reserve_bytes"]


# What is refused.


def test_without_a_compiler_nothing_begins(tmp_path: Path) -> None:
    from torch._inductor import config

    # Before anything else is looked at: there is no such data either.
    arguments = "--max-gpu-mem 100MB --model mlp:64-32-10 --data npz:missing.npz --compile"
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        outcomes = [command(f"fit {arguments} --workdir {tmp_path}/run"), command(f"plan {arguments}")]
    for outcome in outcomes:
        assert outcome.code == 3
        assert outcome.fault == (
            "--compile needs a C++ compiler, and 'no-such-compiler' does not run; install g++, name another one in CXX, or leave "
            "--compile out"
        )
    assert not (tmp_path / "run").exists()


def test_one_sample_at_a_time_is_compiled_where_it_is_asked_for(tmp_path: Path) -> None:
    result = fit(lambda: nn.Sequential(nn.Linear(12, 4)), vectors(), tmp_path / "run", micro_batch=1, epochs=1, train_limit=6)
    assert result.compiled["functions"] == 2


@pytest.mark.slow
def test_code_of_transformers_allocates_no_more_than_was_foreseen(all_cases: bool) -> None:
    if not all_cases:
        pytest.skip("only with --all: many operations, each lowered anew")
    assert_allocates_what_was_foreseen(
        compiled(small_gpt(tied=True, layers=1), TensorSpec((8,), torch.int64), trains_only=True)[0]
    )
    assert_allocates_what_was_foreseen(compiled(small_vit(), TensorSpec((3, 8, 8), torch.float32), trains_only=True)[0])
