"""Freezing by patterns: which parameters it takes, which BatchNorms stay in eval mode, and what is refused."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.pretrained.freezing import with_frozen


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.classifier = nn.Linear(4, 2)
        self.again = nn.Linear(4, 2)
        self.again.weight = self.classifier.weight


def config(**options: Any) -> FitConfig:
    return configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}


def in_eval(model: nn.Module) -> set[str]:
    model.train()
    return {name for name, module in model.named_modules() if not module.training}


EVERYTHING = {name for name, _ in Net().named_parameters(remove_duplicate=False)}
CLASSIFIER = {"classifier.weight", "classifier.bias", "again.weight", "again.bias"}


@pytest.mark.parametrize(
    ("options", "learns", "norms"),
    [
        ({}, EVERYTHING, set()),
        ({"freeze": "features.*"}, CLASSIFIER, {"features.1", "features.4"}),
        ({"freeze": "features.0.*, features.1.weight"}, EVERYTHING - {"features.0.weight", "features.0.bias", "features.1.weight"}, set()),
        ({"freeze": ("features.1.*",)}, EVERYTHING - {"features.1.weight", "features.1.bias"}, {"features.1"}),
        ({"train_only": "classifier.bias"}, {"classifier.bias"}, {"features.1", "features.4"}),
        ({"train_only": "*.bias"}, {name for name in EVERYTHING if name.endswith("bias")}, set()),
        # Tied names: any of them.
        ({"train_only": "again.weight"}, {"classifier.weight", "again.weight"}, {"features.1", "features.4"}),
        ({"freeze": "again.weight"}, EVERYTHING - {"classifier.weight", "again.weight"}, set()),
        (
            {"freeze_norm": True},
            EVERYTHING - {f"features.{number}.{name}" for number in (1, 4) for name in ("weight", "bias")},
            {"features.1", "features.4"},
        ),
        ({"freeze_norm": True, "train_only": "features.1.*,classifier.*"}, CLASSIFIER - {"again.bias"}, {"features.1", "features.4"}),
    ],
)  # fmt: skip
def test_patterns_freeze_parameters_and_norms(options: dict[str, Any], learns: set[str], norms: set[str]) -> None:
    model = Net()
    found = with_frozen(model, config(**options))
    assert learning(found) == learns
    assert in_eval(found) == norms
    # The user's own stays as it was, over the same memory.
    assert learning(model) == EVERYTHING
    assert in_eval(model) == set()
    for (name, one), (_, other) in zip(found.named_parameters(), model.named_parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr(), name


def test_what_the_models_code_froze_stays_frozen_in_the_mode_that_it_has() -> None:
    model = Net()
    model.features.requires_grad_(False)
    found = with_frozen(model, config(freeze="classifier.weight"))
    assert learning(found) == {"classifier.bias", "again.bias"}
    assert in_eval(found) == set()


def test_norms_in_eval_mode_are_of_one_class_and_can_be_copied() -> None:
    found = with_frozen(Net(), config(freeze_norm=True))
    first, second = found.features[1], found.features[4]
    assert type(first) is type(second)
    assert isinstance(first, nn.BatchNorm2d)
    assert (type(first).__name__, type(first).__module__) == ("BatchNorm2d", "torch.nn.modules.batchnorm")
    assert not copy.deepcopy(first).train().training
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(first.train()(x), nn.BatchNorm2d(4).eval()(x))
    assert pickle.loads(pickle.dumps(nn.BatchNorm2d(4))).training


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"freeze": "feature.*"}, "--freeze 'feature.*' matches no parameter of the model; did you mean 'features.*'?"),
        ({"freeze": "features.*,classifier"}, "--freeze 'classifier' matches no parameter of the model; did you mean 'classifier.*'?"),
        ({"train_only": "classifer.wieght"}, "--train-only 'classifer.wieght' matches no parameter of the model; did you mean 'classifier."),
        ({"train_only": "zzz"}, "matches no parameter of the model; there are: features.0.weight, features.0.bias, features.1.weight, ..."),
        ({"freeze": "*"}, "--freeze * leaves no parameter that learns; freeze less"),
        ({"freeze_norm": True, "train_only": "features.1.*"}, "--train-only features.1.* --freeze-norm leaves no parameter that learns;"),
    ],
)  # fmt: skip
def test_what_freezes_nothing_or_all_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        with_frozen(Net(), config(**options))
    assert text in str(raised.value)


def test_freeze_norm_needs_norms() -> None:
    with pytest.raises(ConfigError, match=r"^--freeze-norm has no effect here: the model has no BatchNorms; leave it out$"):
        with_frozen(nn.Linear(2, 2), config(freeze_norm=True))


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="--freeze and --train-only exclude each other; give one"):
        config(freeze="a.*", train_only="b.*")
    for bad in ("", "a,,b"):
        with pytest.raises(ConfigError, match=r"^--freeze '.*': there is nothing between two commas, or nothing at all"):
            config(freeze=bad)


def test_what_is_to_learn_and_was_frozen_by_the_models_code_is_refused() -> None:
    model = Net()
    model.features.requires_grad_(False)
    with pytest.raises(
        ConfigError,
        match=r"^--train-only 'features.\*' matches only .* that the model's code froze, such as 'features.0.weight'; ",
    ):
        with_frozen(model, config(train_only="features.*,classifier.*"))
    assert learning(with_frozen(model, config(train_only="*.bias"))) == {"classifier.bias", "again.bias"}
