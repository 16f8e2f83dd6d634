"""Models of transformers by name: what is built, what is said, and what is refused."""

import json
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.transformers_folders import BERT, LLAMA, VIT, make_model, write_config, write_llama
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.call_form import CallForm
from lowmem_pnn.sources.image_stats import ImageStats
from lowmem_pnn.zoo.deferred_init import skeleton
from lowmem_pnn.zoo.models import find_model
from lowmem_pnn.zoo.transformers_images import image_stats
from lowmem_pnn.zoo.transformers_models import config_json
from lowmem_pnn.zoo.transformers_modules import give_values

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip
MIXTRAL = {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def test_a_folders_model_has_its_names_and_returns_logits_alone(llama: Path) -> None:
    import transformers

    source = find_model(f"hf:{llama}", {}, 279)
    assert (source.context, source.most_context, source.tokenizer, source.input_form) == (32, 32, str(llama), "any")
    model = source.build().eval()
    expected = transformers.LlamaForCausalLM.from_pretrained(llama).eval()
    assert list(model.state_dict()) == list(expected.state_dict())
    model.load_state_dict(expected.state_dict())
    ids = torch.randint(0, 279, (2, 8))
    assert torch.equal(model(ids), expected(ids).logits)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    apart = expected(ids[:, :3]).logits, expected(ids[:, 3:]).logits
    torch.testing.assert_close(model(ids, positions), torch.cat(apart, 1))
    assert skeleton(source.build).lm_head.weight.device.type == "meta"
    # What lies beside a tokenizer's file belongs to it, as where its folder is named.
    assert source.tokenizer_files(str(llama / "tokenizer.json")) == source.tokenizer_files(None)
    assert "tokenizer_config.json" in source.tokenizer_files(None)
    assert type(source.build()) is type(model)


def test_tokens_go_to_a_causal_model_with_positions_and_without_a_mask(llama: Path) -> None:
    source = find_model(f"hf:{llama}", {}, 279)
    assert [*CallForm.of(dict.fromkeys(("input_ids", "position_ids"), torch.zeros(1)), source.build()).names] == [
        "input_ids",
        "position_ids",
    ]
    assert source.notes[-1] == "it is given no attention_mask: rows are padded at their end, where no token before looks"
    assert source.notes[0].endswith("(causal-lm), attention by sdpa")


@pytest.mark.parametrize(
    ("kind", "architecture", "sizes", "task", "shape"),
    [
        ("bert", "BertForMaskedLM", BERT, "auto", (2, 6, 300)),
        ("bert", "BertForMaskedLM", BERT, "sequence-classification", (2, 3)),
        ("llama", "LlamaForCausalLM", LLAMA, "sequence-classification", (2, 3)),
        ("mixtral", "MixtralForCausalLM", MIXTRAL, "auto", (2, 6, 300)),
        ("bloom", "BloomForCausalLM", {"vocab_size": 300, "hidden_size": 16, "n_layer": 1, "n_head": 2}, "auto", (2, 6, 300)),
    ],
)  # fmt: skip
def test_a_configuration_gives_random_values_for_its_task(
    kind: str, architecture: str, sizes: dict[str, Any], task: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    source = find_model(f"hf:{write_config(tmp_path / 'c.json', kind, architecture, sizes)}", {}, 3, task)
    assert source.default_weights is None and source.tokenizer is None  # noqa: PT018
    assert source.build().eval()(torch.randint(2, 300, (2, 6))).shape == shape
    assert any("experts are computed by batched_mm" in note for note in source.notes) == (kind == "mixtral")


def test_an_image_classifier_has_as_many_classes_as_the_data(tmp_path: Path) -> None:
    file = write_config(tmp_path / "config.json", "vit", "ViTForImageClassification", VIT)
    settings = {"image_mean": [0.5], "image_std": [0.25], "size": {"height": 8, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    source = find_model(f"hf:{file}", {}, 7)
    assert (source.input_form, source.image_stats, source.context) == ("any", ImageStats((0.5,), (0.25,), (8, 8)), None)
    assert source.build()(torch.rand(2, 1, 8, 8)).shape == (2, 7)
    assert find_model(f"hf:{file}", {"num_channels": 3}, 10).input_form == "image3"


@pytest.mark.parametrize(
    ("settings", "stats", "note"),
    [
        ({"do_normalize": False}, ImageStats((0.0,), (1.0,), None), None),
        ({"include_top": True}, None, "by include_top, which is not followed: --normalize auto is that of the training images"),
        ({"rescale_factor": 1 / 127.5}, None, "by rescale_factor, "),
        ({"do_flip_channel_order": True, "image_mean": None}, None, "by do_flip_channel_order, "),
        ({"do_rescale": False}, None, "by do_rescale, "),
        ({"do_rescale": False, "do_normalize": False}, None, "by do_rescale, "),
    ],
)
def test_images_that_are_prepared_in_other_ways(
    settings: dict[str, Any], stats: ImageStats | None, note: str | None, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": [0.25], **settings}))
    found, said = image_stats(tmp_path)
    assert (found, said is None) == (stats, note is None)
    assert note is None or note in str(said)


def test_configurations_say_what_was_trained(tmp_path: Path) -> None:
    file = write_config(tmp_path / "c.json", "vit", "ViTForImageClassification", VIT, problem_type="multi_label_classification")
    source = find_model(f"hf:{file}", {}, 3)
    for targets, problem in (
        ("class", "single_label_classification"),
        ("labels", "multi_label_classification"),
        ("values", "regression"),
    ):
        assert json.loads(config_json(source, (), targets))["problem_type"] == problem
    text = {**LLAMA, "head_dim": 8, "model_type": "gemma3_text"}
    file = write_config(
        tmp_path / "g.json", "gemma3", "Gemma3ForConditionalGeneration", {}, text_config=text, vision_config=VISION
    )
    source = find_model(f"hf:{file}", {}, None, "causal-lm")
    assert source.transformers is not None
    assert not source.transformers.config.text_config.use_cache
    assert '"use_cache": false' not in config_json(source, (), "tokens")


def test_of_a_model_on_the_hub_no_weights_are_fetched_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        fetched.extend(file.name for file in tmp_path.iterdir() if any(fnmatch(file.name, one) for one in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    write_config(tmp_path / "config.json", "llama", "LlamaForCausalLM", LLAMA)
    fetch = find_model("hf:some/name", {}, None).default_weights
    assert fetch is not None
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(ConfigError, match=r"model hf:some/name: the hub has no safetensors of it, only weights of another kind"):
        fetch()
    for name in ("consolidated.safetensors", "model-1.safetensors", "model.safetensors"):
        (tmp_path / name).write_text("")
    fetched.clear()
    assert (fetch(), fetched) == (tmp_path, ["model.safetensors"])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}))
    fetched.clear()
    assert fetch() == tmp_path
    assert sorted(set(fetched)) == ["model-1.safetensors", index.name]


def test_positions_of_roberta_begin_after_that_of_padding(tmp_path: Path) -> None:
    file = write_config(tmp_path / "c.json", "roberta", "RobertaForMaskedLM", BERT)
    assert find_model(f"hf:{file}", {}, None).most_context == 30


def test_values_that_nobody_gives_are_the_constructors(tmp_path: Path) -> None:
    file = write_config(tmp_path / "c.json", "gemma3_text", "Gemma3ForCausalLM", {**LLAMA, "head_dim": 8})
    source = find_model(f"hf:{file}", {}, 300)
    whole = source.build()
    given = {name for name in whole.state_dict() if "layers.1" not in name}
    model = source.build_but(given)
    for name, tensor in model.state_dict().items():
        assert bool(tensor.any()) == (name not in given and bool(whole.state_dict()[name].any())), name
    own = dict(whole.named_buffers())
    assert list(own) == [name for name, _ in model.named_buffers()]
    assert all(torch.equal(buffer, own[name]) for name, buffer in model.named_buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert source.give_values is give_values


@pytest.mark.parametrize(
    ("settings", "arguments", "task", "text"),
    [
        ({"model_type": "llamma"}, {}, "auto", "is of type 'llamma', which transformers has not; did you mean 'llama'"),
        ({}, {}, "auto", "says no model_type; give another$"),
        ({"model_type": "x", "auto_map": {}}, {}, "auto", "runs code of its own .auto_map., which is never trusted; give a model that"),
        ({"model_type": "llama"}, {}, "auto", "names no architecture; give --task causal-lm, masked-lm, .* or image-classification$"),
        ({"model_type": "t5", "architectures": ["T5Model"]}, {}, "auto", "architecture 'T5Model' has another head; give --task"),
        ({"model_type": "llama"}, {}, "image-classification", "no image-classification of type 'llama'; give another --task"),
        ({"model_type": "llama", "quantization_config": {}}, {}, "causal-lm", "has quantized weights"),
        ({"model_type": "llama"}, {"hidden_sise": 3}, "causal-lm", "no argument 'hidden_sise'; did you mean 'hidden_size'"),
        ({"model_type": "llama", "num_attention_heads": "x"}, {}, "causal-lm", "is refused by transformers: "),
        ({"model_type": "llama", "vocab_size": 100}, {}, "causal-lm", "knows 100 tokens, and the tokenizer of the data has 279; give"),
        ({"model_type": "bert"}, {"num_labels": 3}, "sequence-classification", "num_labels=3, but the data set has 279 classes; give"),
    ],
)  # fmt: skip
def test_what_is_no_such_model_is_said_in_a_line(
    settings: dict[str, Any], arguments: dict[str, Any], task: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / "c.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=text) as raised:
        find_model(f"hf:{tmp_path / 'c.json'}", arguments, 279, task)
    assert "\n" not in str(raised.value)


def test_places_that_hold_no_model_are_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "c.json").write_text("[1")
    for spec, text in (
        (f"hf:{tmp_path}", r"no config.json in that folder \(it is an adapter's: give that of its base\)"),
        (f"hf:{tmp_path / 'c.json'}", "is no configuration in JSON"),
        (f"hf:{tmp_path / 'd.json'}", "no config.json in that folder"),
        ("hf:a b", "there is no such folder or file; give hf:DIR, hf:CONFIG.json, or a name on the hub"),
        ("hf:nobody/nothing@main", "the hub's model 'nobody/nothing' cannot be fetched: .*; see to the network and the name"),
    ):
        with pytest.raises(ConfigError, match=text) as raised:
            find_model(spec, {}, None)
        assert "\n" not in str(raised.value)


def test_code_of_a_configuration_is_not_run_where_transformers_has_the_model(tmp_path: Path) -> None:
    options = {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "gradient_checkpointing": True}
    file = write_config(tmp_path / "c.json", "llama", "LlamaForCausalLM", LLAMA, **options)
    notes = find_model(f"hf:{file}", {}, None).notes
    assert sum("(auto_map) is not run" in note or "gradient_checkpointing of its" in note for note in notes) == 2


def test_transformers_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"hf: needs transformers, which is not installed; run: pip install 'lowmem-pnn\[hf\]'"):
        find_model("hf:x.json", {}, None)


def test_the_helpers_models_are_what_the_tests_take_them_for() -> None:
    assert make_model("vit", "AutoModelForImageClassification", VIT).config.num_labels == 10


@pytest.mark.parametrize(
    ("name", "parameters", "most"),
    [
        ("qwen3-0.6b", 596_049_920, 40_960),
        ("llama-3.2-1b", 1_235_814_400, 131_072),
        ("llama-3.1-8b", 8_030_261_248, 131_072),
    ],
)
def test_shapes_of_published_models_are_known_without_their_weights(name: str, parameters: int, most: int) -> None:
    source = find_model(f"hf:{Path(__file__).parents[3] / 'bench' / 'shapes' / name}.json", {}, None)
    assert (source.most_context, source.context, source.default_weights) == (most, 256, None)
    assert sum(one.numel() for one in skeleton(source.build).parameters()) == parameters
