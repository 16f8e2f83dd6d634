"""Models of timm, and what torchvision and timm say of their own weights: without a network."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.sources.image_stats import ImageStats
from lowmem_pnn.zoo.library_models import (
    import_timm,
    timm_weights,
    torchvision_files,
    torchvision_image_stats,
    torchvision_weights,
)
from lowmem_pnn.zoo.models import find_model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_timm_models_are_built_as_by_timm_for_the_classes() -> None:
    timm = import_timm()
    source = find_model("timm:mobilenetv3_small_050", {"drop_rate": 0.1}, 7)
    torch.manual_seed(3)
    expected = timm.create_model("mobilenetv3_small_050", num_classes=7, drop_rate=0.1)
    torch.manual_seed(3)
    built = source.build()
    assert built.drop_rate == 0.1
    expected, found = expected.state_dict(), built.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (source.name, source.spec, source.input_form) == ("timm-mobilenetv3_small_050", "timm:mobilenetv3_small_050", "image3")


def test_images_of_another_depth_are_taken_as_they_are() -> None:
    source = find_model("timm:mobilenetv3_small_050", {"in_chans": 1}, 7)
    assert source.input_form == "any"
    with torch.device("meta"):
        assert source.build().eval()(torch.empty(2, 1, 32, 32)).shape == (2, 7)


def test_statistics_are_those_of_the_librarys_weights() -> None:
    assert torchvision_image_stats("mobilenet_v2") == ImageStats(*IMAGENET, (224, 224))
    assert find_model("mobilenet_v2", {}, 10).image_stats == ImageStats(*IMAGENET, (224, 224))
    assert find_model("timm:resnet18", {}, 10).image_stats == ImageStats(*IMAGENET, (224, 224))
    assert find_model("timm:vit_tiny_patch16_224.augreg_in21k", {}, 10).image_stats == ImageStats(
        (0.5,) * 3, (0.5,) * 3, (224, 224)
    )
    assert find_model("mnasnet0_5", {}, 10).image_stats == ImageStats(*IMAGENET, (224, 224))
    assert find_model("mlp:64-10", {}, 10).image_stats is None


def test_every_torchvision_classifier_says_what_images_its_weights_take() -> None:
    from torchvision import models

    for name in models.list_models(module=models):
        stats = torchvision_image_stats(name)
        assert (stats is None) == (len(models.get_model_weights(name)) == 0), name


@pytest.mark.parametrize(
    ("spec", "arguments", "text"),
    [
        ("timm:resnet-18", {}, "timm has no model 'resnet-18'; did you mean 'resnet18' or "),
        ("timm:", {}, "timm has no model ''; write timm:resnet18$"),
        ("timm:xyzzy0", {}, "timm has no model 'xyzzy0'$"),
        ("timm:resnet18.a1_in2k", {}, "timm has no weights 'a1_in2k' of 'resnet18'; did you mean .*'a1_in1k'"),
        ("timm:resnet18", {"pretrained": True}, "pretrained=True is not supported, .*; give --weights default, or --weights FILE$"),
        ("timm:resnet18", {"checkpoint_path": "x.pth"}, "checkpoint_path='x.pth' is not supported"),
        ("timm:resnet18", {"foo": 1}, "model 'timm:resnet18' cannot be built with foo=1: TypeError: .*unexpected keyword argument 'foo'"),
        ("timm:resnet18", {"num_classes": 3}, "num_classes=3, but the data set has 10 classes; give num_classes=10"),
    ],
)  # fmt: skip
def test_what_timm_does_not_have_is_said(spec: str, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as raised:
        find_model(spec, arguments, 10)
    assert "\n" not in str(raised.value)


def test_timm_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"timm is not installed; run: pip install 'lowmem-pnn\[timm\]'"):
        find_model("timm:resnet18", {}, 10)


@pytest.mark.parametrize("spec", ["googlenet", "inception_v3"])
def test_inputs_are_brought_into_the_form_of_torchvisions_own_weights(spec: str) -> None:
    (file,) = torchvision_files(spec)
    cases: list[tuple[str | None, dict[str, Any], bool, str]] = [
        (None, {}, False, ""),
        ("default", {}, True, "transform_input=True, as torchvision has it with its own weights"),
        (f"photos/{file}", {}, True, "transform_input=True"),
        ("runs/a/model.safetensors", {}, False, "give --model-arg transform_input=true for weights that were trained with it"),
        ("runs/a/model.safetensors", {"transform_input": True}, True, ""),
        ("default", {"transform_input": False}, False, ""),
    ]
    for weights, arguments, expected, note in cases:
        source = find_model(spec, arguments, 10, weights=weights)
        with torch.device("meta"):
            assert source.build().transform_input == expected
        assert len(source.notes) == bool(note)
        assert note in "".join(source.notes)


# Weights of the libraries, by their clients.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def test_torchvisions_weights_are_downloaded_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(url: str, path: str, hash_prefix: str | None, progress: bool) -> None:
        asked.append((url, hash_prefix))
        torch.save(nn.Linear(2, 2).state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    first, second = torchvision_weights("mobilenet_v2"), torchvision_weights("mobilenet_v2")
    assert first == second == hub / "mobilenet_v2-7ebf99e0.pth"
    assert asked == [("https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth", "7ebf99e0")]


def test_weights_that_cannot_be_fetched_are_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host\nat all")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ConfigError) as raised:
        torchvision_weights("mobilenet_v2")
    assert str(raised.value) == (
        "the weights of mobilenet_v2 cannot be fetched from https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth: OSError: no "
        "route to host; see to the network, or give --weights FILE"
    )


class _NotThere(Exception): ...


class _NotKnown(_NotThere): ...


def test_timms_weights_come_through_the_hubs_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        if file == "model.safetensors":
            raise _NotThere
        return str(tmp_path / file)

    client = types.ModuleType("huggingface_hub")
    client.hf_hub_download = download  # type: ignore[attr-defined]
    errors = types.SimpleNamespace(EntryNotFoundError=_NotThere, LocalEntryNotFoundError=_NotKnown)
    import_timm()
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    assert timm_weights("mobilenetv3_small_050") == tmp_path / "pytorch_model.bin"
    where = "timm/mobilenetv3_small_050.lamb_in1k"
    assert asked == [(where, "model.safetensors", None), (where, "pytorch_model.bin", None)]

    def offline(repository: str, file: str, revision: str | None) -> str:
        raise _NotKnown("cannot find the file in the cache")

    client.hf_hub_download = offline  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=f"weights of timm:mobilenetv3_small_050 cannot be fetched from {where}: _NotKnown: cannot"
    ):
        timm_weights("mobilenetv3_small_050")
