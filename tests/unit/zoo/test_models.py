"""Models by name: what is built, what is refused, and what the refusal says."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.zoo.models import find_model


def write(folder: Path, text: str, name: str = "net.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_mlp_is_linear_and_relu_but_the_last() -> None:
    source = find_model("mlp:784-80-60-47", {}, 47)
    model = source.build()
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(weight.shape) for weight in model.parameters()] == [(80, 784), (80,), (60, 80), (60,), (47, 60), (47,)]
    assert (source.name, source.spec, source.input_form) == ("mlp-784-80-60-47", "mlp:784-80-60-47", "flat")


def test_build_draws_from_the_global_generator() -> None:
    source = find_model("mlp:8-4", {}, None)
    torch.manual_seed(1)
    first, second = source.build()[0].weight, source.build()[0].weight
    torch.manual_seed(1)
    assert torch.equal(first, source.build()[0].weight)
    assert not torch.equal(first, second)


def test_a_long_name_stays_short() -> None:
    name = find_model("mlp:" + "-".join(["64"] * 100), {}, None).name
    assert len(name) <= 60
    assert name.endswith("64")


@pytest.mark.parametrize("spec", ["mlp:", "mlp:8", "mlp:8-", "mlp:8-0-2", "mlp:8-x-2", "mlp:-8-2", "mlp:8.5-2", "mlp:８-2"])
def test_bad_widths_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="is not an mlp; write two or more positive widths, input first and classes last"):
        find_model(spec, {}, None)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {}),
        ("googlenet", {}),
        ("inception_v3", {}),
        ("vit_b_32", {"image_size": 64}),
        ("efficientnet_b0", {"dropout": 0.1}),
    ],
)
def test_torchvision_models_are_built_for_the_classes(name: str, arguments: dict[str, Any]) -> None:
    source = find_model(name, arguments, 7)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = source.build().eval()
        size = arguments.get("image_size", 96)
        assert model(torch.empty(2, 3, size, size)).shape == (2, 7)
    assert (source.name, source.input_form) == (name, "image3")


def test_torchvision_values_are_the_constructors_own() -> None:
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(3)
    expected = mobilenet_v3_small(num_classes=5).state_dict()
    torch.manual_seed(3)
    found = find_model("mobilenet_v3_small", {}, 5).build().state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_finding_a_model_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    find_model("resnet18", {"num_classes": 12}, 10)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_argument_goes_before_the_number_of_classes() -> None:
    with torch.device("meta"):
        assert find_model("resnet18", {"num_classes": 12, "weights": None}, 10).build().fc.out_features == 12
        assert find_model("resnet18", {}, None).build().fc.out_features == 1000


@pytest.mark.parametrize(
    ("spec", "arguments", "num_classes", "text"),
    [
        ("mlp:8-4", {}, 10, r"model 'mlp:8-4' ends in 4 outputs, but the data set has 10 classes; write mlp:8-10"),
        ("mlp:8-4", {"bias": False}, 4, r"model 'mlp:8-4' takes no arguments, but 'bias' was given"),
        ("ResNet-18", {}, 10, r"there is no model 'ResNet-18'; did you mean 'resnet18'.*; a model is mlp:WIDTH-WIDTH-..., gpt:layers="),
        ("Qwen/Qwen3-0.6B", {}, 10, r"there is no model 'Qwen/Qwen3-0.6B'; write hf:Qwen/Qwen3-0.6B for the model of that name on the hub"),
        ("net.py", {}, 10, r"model 'net.py' names a file but no function in it; write net.py:FACTORY"),
        ("resnet18", {"num_clases": 3}, 10, r"no argument 'num_clases'; did you mean 'num_classes'.*; it accepts: .*norm_layer"),
        ("convnext_tiny", {"xyz": 3}, 10, r"model 'convnext_tiny' has no argument 'xyz'; it accepts: .*layer_scale"),
        ("resnet18", {"weights": "DEFAULT"}, 10, r"weights='DEFAULT' is not supported, .* the model; give --weights default, or --weights F"),
        ("resnet18", {"num_classes": 3}, 10, r"num_classes=3, but the data set has 10 classes; give num_classes=10"),
        ("resnet18", {"num_classes": -3}, None, r"'resnet18' cannot be built with num_classes=-3: RuntimeError: .*negative"),
        ("resnet18", {"num_classes": "x"}, None, r"model 'resnet18' cannot be built with num_classes='x': TypeError: "),
        ("resnext50_32x4d", {"groups": 3}, 10, r"cannot be built with groups=3: ValueError: .*32"),
        ("densenet121", {"growth_rate": 8}, 10, r"model 'densenet121' sets 'growth_rate' itself; leave that argument out"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_said(spec: str, arguments: dict[str, Any], num_classes: int | None, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as raised:
        find_model(spec, arguments, num_classes)
    assert "\n" not in str(raised.value)


def test_a_folder_of_transformers_is_named_with_its_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for spec, what in ((tmp_path, "a folder with config.json"), (tmp_path / "config.json", "a file")):
        with pytest.raises(ConfigError, match=f"model .* is {what}; write hf:{spec} for a model of transformers"):
            find_model(str(spec), {}, 10)
    with pytest.raises(ConfigError, match=r"is a folder without config.json, which hf: takes; a model is"):
        find_model(str(tmp_path.parent), {}, 10)


def test_every_accepted_torchvision_default_can_be_named() -> None:
    with torch.device("meta"):
        assert find_model("resnet18", {"zero_init_residual": True}, 10).build().fc.out_features == 10


# Factories.


def test_a_factory_in_a_file_gets_its_arguments(tmp_path: Path) -> None:
    spec = write(tmp_path, "from torch import nn\ndef make(width, depth=1):\n    return nn.Linear(width, depth)\n") + ":make"
    source = find_model(spec, {"width": 3, "depth": 2}, 2)
    assert (source.name, source.input_form) == ("net-make", "any")
    assert source.build().weight.shape == (2, 3)


def test_a_factory_in_a_module() -> None:
    source = find_model("torch.nn:Linear", {"in_features": 3, "out_features": 2}, 2)
    assert source.name == "torch.nn-Linear"
    assert source.build().weight.shape == (2, 3)


def test_a_module_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "from torch import nn\ndef make():\n    return nn.Identity()\n", "lowmem_pnn_test_local.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "lowmem_pnn_test_local", raising=False)
    source = find_model("lowmem_pnn_test_local:make", {}, None)
    assert isinstance(source.build(), nn.Identity)
    assert source.context is None


def test_a_file_imports_its_neighbours_and_leaves_the_path(tmp_path: Path) -> None:
    write(tmp_path, "width = 5\n", "lowmem_pnn_test_early.py")
    write(tmp_path, "width = 6\n", "lowmem_pnn_test_late.py")
    text = """
from dataclasses import dataclass
from torch import nn
from lowmem_pnn_test_early import width
@dataclass
class Settings:
    width: int = width
def make():
    import lowmem_pnn_test_late as late
    return nn.Linear(Settings().width, late.width)
"""
    before, modules = list(sys.path), set(sys.modules)
    source = find_model(write(tmp_path, text) + ":make", {}, None)
    assert sys.path == before
    assert source.build().weight.shape == (6, 5)
    assert sys.path == before
    new = {name for name in set(sys.modules) - modules if not name.startswith("lowmem_pnn_test_")}
    assert "net" not in new
    assert len([name for name in new if name.startswith("_lowmem_pnn_file_")]) == 1


BODY = "from torch import nn\ndef make(num_classes, *, width=3):\n    return nn.Linear(width, num_classes)\nvalue = 3\n"


@pytest.mark.parametrize(
    ("text", "name", "arguments", "message"),
    [
        (BODY, "mak", {}, r"defines no 'mak'; did you mean 'make'\?"),
        (BODY, "value", {}, r"value has type int, it is not a function"),
        (BODY, "1x", {}, r"names no factory; write package.module:factory or path/to/file.py:factory"),
        (BODY, "make", {"num_classes": 1, "widht": 3}, r"'widht'; did you mean 'width'\?; it accepts: num_classes, width"),
        (BODY, "make", {"num_classes": 9}, r"num_classes=9, but the data set has 10 classes"),
        ("def make():\n    pass\n", "make", {"a": 1}, r"has no argument 'a'; it takes none"),
        ("def make(a, /):\n    pass\n", "make", {"a": 1}, r"takes 'a' by position only"),
        ("def make(:\n", "make", {}, r"importing .*net.py failed with SyntaxError"),
        ("import no_such_package_at_all\n", "make", {}, r"ModuleNotFoundError: No module named 'no_such_package_at_all'"),
        ("raise RuntimeError('two\\nlines')\n", "make", {}, r"failed with RuntimeError: two; see that `python` imports it"),
    ],
)  # fmt: skip
def test_a_factory_that_cannot_be_used_is_said(
    text: str, name: str, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    before = list(sys.path)
    with pytest.raises(ConfigError, match=message) as raised:
        find_model(f"{write(tmp_path, text)}:{name}", arguments, 10)
    assert "\n" not in str(raised.value)
    assert sys.path == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", r"make\(\) returned a value of type int; it must return a torch.nn.Module"),
        ("raise ValueError('depth 3 is odd')", r"cannot be built with a=1: ValueError: depth 3 is odd; change the arguments"),
    ],
)
def test_a_factory_that_fails_is_said_when_built(body: str, message: str, tmp_path: Path) -> None:
    source = find_model(write(tmp_path, f"def make(a):\n    {body}\n") + ":make", {"a": 1}, None)
    with pytest.raises(ConfigError, match=message):
        source.build()


def test_a_missing_file_and_module_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"there is no file {tmp_path}/none.py; give the path"):
        find_model(f"{tmp_path}/none.py:make", {}, None)
    with pytest.raises(ConfigError, match=r"importing no.such.module failed with ModuleNotFoundError"):
        find_model("no.such.module:make", {}, None)


# Arguments.


def test_a_factory_that_asks_for_the_number_of_classes_gets_it(tmp_path: Path) -> None:
    (tmp_path / "needs_classes.py").write_text(
        "from torch import nn\n\nclass Net(nn.Linear):\n    def __init__(self, num_classes):\n        super().__init__(4, num_classes)\n\n"
        "def other(num_classes=3):\n    return nn.Linear(4, num_classes)\n"
    )
    spec = f"{tmp_path}/needs_classes.py"
    assert find_model(f"{spec}:Net", {}, 7).build().out_features == 7
    assert find_model(f"{spec}:other", {}, 7).build().out_features == 3, "what has a default keeps it"
    with pytest.raises(ConfigError, match="num_classes"):
        find_model(f"{spec}:Net", {}, None).build()
