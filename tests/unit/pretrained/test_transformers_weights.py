"""Weights of transformers' models by the model's names: renamed, merged, of other heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.transformers_folders import BERT, LLAMA, VIT, make_model, write_llama
from lowmem_pnn.pretrained.open_weights import WeightFiles
from lowmem_pnn.pretrained.transformers_weights import TransformersWeights
from lowmem_pnn.zoo.models import find_model

MIXTRAL = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 1}


def opened(folder: Path, task: str = "auto", classes: int | None = None) -> TransformersWeights:
    source = find_model(f"hf:{folder}", {}, classes, task)
    return TransformersWeights(WeightFiles("default", source), source)


@pytest.mark.parametrize(
    ("kind", "auto", "sizes"),
    [
        ("llama", "AutoModelForCausalLM", LLAMA),
        ("vit", "AutoModelForImageClassification", VIT),
        ("mixtral", "AutoModelForCausalLM", MIXTRAL),
        ("bert", "AutoModelForMaskedLM", BERT),
    ],
)
def test_files_that_transformers_wrote_have_the_models_names_and_values(
    kind: str, auto: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(kind, auto, sizes)
    model.save_pretrained(tmp_path)
    weights, expected = opened(tmp_path), model.state_dict()
    layouts = weights.layouts()
    tied = set(model.all_tied_weights_keys)
    assert set(expected) - tied <= set(layouts) <= set(expected)
    with weights.reading(tmp_path) as read:
        for name, (dtype, shape) in layouts.items():
            assert (dtype, shape) == (expected[name].dtype, tuple(expected[name].shape))
            assert torch.equal(read(name), expected[name]), name
            assert torch.equal(read(name, elements=slice(1, 3)), expected[name].flatten()[1:3])


def test_weights_of_another_head_or_of_none_leave_the_new_one_to_the_constructor(tmp_path: Path) -> None:
    import transformers

    make_model("bert", "AutoModelForMaskedLM", BERT).save_pretrained(tmp_path / "masked")
    weights = opened(tmp_path / "masked", "sequence-classification", 3)
    wanted = find_model(f"hf:{tmp_path / 'masked'}", {}, 3, "sequence-classification").build().state_dict()
    missing = set(wanted) - set(weights.layouts())
    assert missing == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert all(map(weights.may_be_new, missing)) and not weights.may_be_new("bert.encoder.layer.0.output.dense.weight")  # noqa: PT018
    bare = transformers.BertModel.from_pretrained(tmp_path / "masked")
    bare.save_pretrained(tmp_path / "bare")
    assert "bert.embeddings.word_embeddings.weight" in opened(tmp_path / "bare", "masked-lm").layouts()


def test_names_of_long_ago_are_todays(tmp_path: Path) -> None:
    model = make_model("bert", "AutoModelForMaskedLM", BERT)
    model.save_pretrained(tmp_path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    save_file({**old, "bert.embeddings.position_ids": torch.arange(32)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert set(opened(tmp_path).layouts()) == {*model.state_dict(), "bert.embeddings.position_ids"}


def test_of_a_language_model_nothing_may_be_missing(tmp_path: Path) -> None:
    weights = opened(write_llama(tmp_path))
    assert not weights.head_may_be_new
    assert not weights.may_be_new("lm_head.weight")
    assert weights.are_there()
    assert weights.where.endswith("model.safetensors)")
