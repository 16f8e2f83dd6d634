"""Options of contenders: each method gets what it reads, and what none of them reads is refused."""

from typing import Any

import pytest

from lowmem_pnn.config.fit_config import FitConfig, MethodName
from lowmem_pnn.contenders.contender_options import contender_configs, refuse_left_out
from lowmem_pnn.errors import ConfigError


def configs(methods: list[MethodName], **given: Any) -> dict[MethodName, Any]:
    return contender_configs(methods, 10**9, {"model": "mlp:64-32-10", "data": "digits", **given})


def test_each_method_gets_what_it_reads() -> None:
    found = configs(["pnn", "neuroflux", "exact", "backprop"], kappa="3", heads="linear", recompute="never", cuts="1")
    assert found["pnn"].kappa == (3.0,)
    assert found["neuroflux"].heads == "linear"
    assert found["exact"].recompute == "never"
    assert [config.cuts for config in found.values()] == [("1",), ("1",), ("1",), None]
    for config in found.values():
        assert isinstance(config, FitConfig)
        assert (config.epochs, config.val_fraction, config.max_gpu_mem) == ((1,), 0, 10**9)
    found = configs(["neuroflux", "exact"], visits="interleaved", macro_batches=8)
    assert found["exact"] == configs(["exact"])["exact"], "what is read only with what was left out goes too"


@pytest.mark.parametrize(
    ("methods", "given", "text"),
    [
        (["exact", "backprop"], {"kappa": 3}, "--kappa has no effect here: it needs --methods pnn"),
        (["pnn", "exact"], {"momentum": 0.5}, "--momentum has no effect here: it needs --optimizer sgd"),
        (["pnn"], {"cuts": "1", "partitions": 2}, "--cuts and --partitions exclude each other; give one"),
        (["pnn"], {"lr": "fast"}, "--lr 'fast': must be a valid number, unable to parse string as a number"),
    ],
)
def test_what_none_of_them_reads_is_refused(methods: list[MethodName], given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        configs(methods, **given)
    assert str(error.value) == text


def test_what_one_of_them_cannot_do_is_said_of_that_one() -> None:
    found = configs(["pnn", "exact"], shuffle="yes,no")
    assert isinstance(found["pnn"], FitConfig)
    assert "--method exact trains all partitions together; give one value" in str(found["exact"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["lr", "epochs"], "--epochs has no effect here: bench has every contender take --steps training steps"),
        (["val_fraction", "commit_every"], "--val-fraction and --commit-every have no effect here: .*; leave them out"),
        (["meta_epochs", "recovery_epochs", "recover"], "--meta-epochs and --recovery-epochs and --recover have no effect here"),
        (["sample", "sample_tokens"], "--sample and --sample-tokens have no effect here"),
        (["logger"], "--logger has no effect here: .* keeps none of the runs; leave it out"),
        (["method"], "--method is for one run, and bench measures several; give --methods"),
        (["max_gpu_mem"], "--max-gpu-mem is for one run, and bench measures several; give --budgets"),
    ],
)
def test_what_a_few_steps_have_no_use_for_is_refused(given: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{text}"):
        refuse_left_out(given)
    refuse_left_out(["lr", "model"])
