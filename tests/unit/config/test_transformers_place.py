"""Places of transformers' models, and the defaults that follow from them."""

import json
from pathlib import Path

import pytest

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.transformers_place import has_weights, is_about_text, place_of, read_settings
from lowmem_pnn.errors import ConfigError


def folder(path: Path, *, weights: bool) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    if weights:
        (path / "model-00001-of-00002.safetensors").write_bytes(b"")
    return path


def test_weights_come_with_folders_that_have_them_and_with_names_of_the_hub(tmp_path: Path) -> None:
    with_weights, without = folder(tmp_path / "a", weights=True), folder(tmp_path / "b", weights=False)
    assert [has_weights(f"hf:{place}") for place in (with_weights, without, with_weights / "config.json")] == [True, False, False]
    assert has_weights("hf:someone/model")
    assert not has_weights("timm:resnet18")
    assert place_of("hf:someone/model") is None
    assert place_of("hf:gone/config.json") == Path("gone/config.json")
    assert is_about_text(f"hf:{with_weights}")
    assert not is_about_text("hf:someone/model")
    assert read_settings(tmp_path) is None


def test_a_folder_with_weights_is_fine_tuned_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with_weights = folder(tmp_path / "a", weights=True)
    config = configure(max_gpu_mem="1GB", model="hf:a", data="jsonl:x.jsonl")
    assert (config.model, config.weights, config.method, config.epochs) == (f"hf:{with_weights}", "default", "exact", (3,))
    assert (config.lr, config.lr_schedule, config.weight_decay, config.clip_norm) == ((2e-5,), "linear", 0.0, 1.0)
    assert configure(max_gpu_mem="1GB", model="hf:a", data="jsonl:x.jsonl", lora="r=4").lr == (2e-4,)
    assert configure(max_gpu_mem="1GB", model="hf:a", data="jsonl:x.jsonl", lr=0.5).lr == (0.5,)
    random = configure(max_gpu_mem="1GB", model="hf:a", data="jsonl:x.jsonl", weights="none")
    assert (random.weights, random.method, random.epochs, random.lr) == ("none", "exact", (10,), (1e-3,))
    assert configure(max_gpu_mem="1GB", model="hf:a/config.json", data="jsonl:x.jsonl").weights is None


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "tf_model.h5", "consolidated.00.pth", "model.gguf"])
def test_weights_that_are_not_read_are_not_left_out_unsaid(name: str, tmp_path: Path) -> None:
    place = folder(tmp_path / "a", weights=False)
    (place / "training_args.bin").write_bytes(b"")
    given = {"max_gpu_mem": "1GB", "model": f"hf:{place}", "data": "jsonl:x.jsonl"}
    assert configure(**given).weights is None
    (place / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"none are read \({name}\); give a folder with model.safetensors, or --weights none"):
        configure(**given)
    assert configure(**given, weights="none").weights == "none"


def test_a_head_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="--task causal-lm is the head of an hf: model, and --model is mlp:4-2; leave it out"):
        configure(max_gpu_mem="1GB", model="mlp:4-2", data="digits", task="causal-lm")


def test_what_a_name_on_the_hub_is_about_has_to_be_told_where_defaults_depend_on_it() -> None:
    hub = {"max_gpu_mem": "1GB", "model": "hf:someone/model", "data": "hfdata:someone/texts"}
    with pytest.raises(
        ConfigError, match=r"^--model hf:someone/model: whether it is one of text is not known .*; give --task, such as"
    ):
        configure(**hub)
    for told in ({"task": "causal-lm"}, {"tokenizer": "bytes"}, {"data": "jsonl:x.jsonl"}):
        config = configure(**{**hub, **told})
        assert (config.lr, config.lr_schedule, config.clip_norm) == ((2e-5,), "linear", 1.0)
    for told in ({"task": "image-classification"}, {"data": "imagefolder:photos"}, {"data": "cifar10"}):
        config = configure(**{**hub, **told})
        assert (config.lr, config.lr_schedule, config.clip_norm) == ((1e-3,), "constant", None)
    # Nothing depends on it.
    assert configure(**hub, weights="none").lr == (1e-3,)
    assert configure(**hub, lr=0.1, lr_schedule="linear", weight_decay=0, clip_norm=0).lr == (0.1,)
