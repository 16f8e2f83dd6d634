"""Options of adapters: their values and defaults, and what is refused, in one line each."""

from typing import Any

import pytest

from lowmem_pnn.config.adapter_options import LoraOptions
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError


def config(**options: Any) -> FitConfig:
    return configure(**{"max_gpu_mem": "1GB", "model": "mlp:64-32-10", "data": "digits", **options})


def test_defaults_are_pefts_and_those_of_fine_tuning() -> None:
    found = config(lora="r=16,targets=q_proj + v_proj")
    assert str(found.lora) == "r=16,alpha=8,targets=q_proj+v_proj"
    assert (found.method, found.epochs, found.lr, found.frozen_form) == ("exact", (3,), (2e-4,), "fp32")
    assert config(lora="r=8", precision="bf16").frozen_form == "bf16"
    assert config(lora="r=8", precision="bf16", frozen_dtype="fp32").frozen_form == "fp32"
    assert config(lora="r=8", lr=1, method="backprop").lr == (1.0,)
    for targets in ({"q_proj", "a", "v_proj"}, frozenset({"v_proj", "q_proj", "a"}), ["a", "q_proj", "v_proj"]):
        assert str(config(lora={"targets": targets}).lora) == "r=8,alpha=8,targets=a+q_proj+v_proj"
    assert config(lora={"targets": None}).lora == config(lora={}).lora
    assert config(lora={"r": 2, "targets": ["a", "b"], "dropout": 0.5}).lora == config(lora="r=2,targets=a+b,dropout=0.5").lora
    assert FitConfig.from_json(found.to_json()) == found
    assert config().frozen_form == "fp32"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r=0", "r is 0, and the rank is a whole number from 1; give, for example, r=8"),
        ("r=1.5", "r is 1.5, and the rank is a whole number from 1; give, for example, r=8"),
        ("rank=3", "there is no 'rank'; give one of r, alpha, targets, dropout"),
        ("target=q", "there is no 'target'; give targets"),
        ("r", "'r' is not KEY=VALUE; write r=16,alpha=32,targets=q_proj+v_proj,dropout=0.05"),
        ("r=1,r=2", "r is there twice; give it once"),
        ("targets=a++b", "targets has a name that is empty; write names with + between them: targets=q_proj+v_proj"),
        ("targets=all-linear+q", "targets=all-linear stands for all linear layers; leave the other names out"),
        ("alpha=x", "alpha is 'x', which is no number; give, for example, r=16,alpha=32,dropout=0.05"),
        ("alpha=0", "alpha is 0, and must be above 0; give, for example, alpha=16"),
        ("dropout=1", "dropout is 1, and must be at least 0 and below 1; give, for example, dropout=0.05"),
    ],
)
def test_what_is_no_adapter_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(lora=text)
    assert str(caught.value) == f"--lora {text!r}: {message}"


def test_options_of_adapters_that_are_given_ready_are_looked_at_too() -> None:
    assert config(lora=LoraOptions(r=2, targets=("a",))).lora == config(lora="r=2,targets=a").lora
    with pytest.raises(ConfigError, match="dropout is 2, and must be at least 0 and below 1"):
        config(lora=LoraOptions(dropout=2.0))
    with pytest.raises(ConfigError, match="targets is 3; write names with"):
        config(lora={"targets": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": "fc"}, "--modules-to-save has no effect here: it needs --lora"),
        ({"frozen_dtype": "nf4"}, "--frozen-dtype has no effect here: it needs --lora, --freeze or --train-only"),
        ({"frozen_dtype": "nf5", "lora": "r=8"}, "--frozen-dtype 'nf5' is none of fp32, bf16, int8, nf4; did you mean 'nf4'?"),
        (
            {"lora": "r=8", "freeze": "0.*"},
            "--lora freezes all but the adapters, and --freeze would freeze otherwise; leave it out, and name modules that are to learn whole "
            "in --modules-to-save",
        ),
        (
            {"freeze": "0.*", "unfreeze_at": 1, "method": "exact", "frozen_dtype": "int8"},
            "--unfreeze-at: what is kept in int8 never learns (--frozen-dtype); leave one of the two out",
        ),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert str(caught.value) == message
