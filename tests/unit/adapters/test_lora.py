"""Adapters: which modules get one, what they begin with and compute, held against peft, and what is refused."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lowmem_pnn.adapters.lora import target_names
from lowmem_pnn.adapters.prepared_model import frozen_head_notes, output_layer_notes, prepared
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.config.adapter_options import LoraOptions
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import TensorSpec


def config(**options: Any) -> Any:
    return configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, bos_token_id=1, eos_token_id=2))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    )


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.query_proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        return self.head(self.query_proj(self.attention(x, x, x)[0]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("build", "targets"), [(llama, ["q_proj", "v_proj"]), (llama, "all-linear"), (gpt2, "all-linear")])
def test_adapters_are_the_same_as_pefts(build: Any, targets: Any, dropout: float) -> None:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 16, "lora_dropout": dropout, "task_type": "CAUSAL_LM"}
    torch.manual_seed(3)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(target_modules=targets, **settings))
    torch.manual_seed(3)
    ours = prepared(build(), config(lora={"r": 4, "alpha": 16, "targets": targets, "dropout": dropout}))

    def bare(name: str) -> str:
        return name.removeprefix("base_model.model.").replace(".default.weight", "").replace(".base_layer", "")

    expected, found = {bare(name): one for name, one in theirs.named_parameters()}, dict(ours.named_parameters())
    assert expected.keys() == found.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == expected[name].requires_grad == ("lora" in name), name
    ids, losses = torch.arange(20).view(2, 10), []
    for model in (theirs, ours):
        model.train()
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2, fused=True)
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert losses[:2] == losses[2:]
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name


def test_all_linear_leaves_out_the_outputs_and_what_is_read_without_being_run() -> None:
    assert target_names(Attending(), LoraOptions()) == ["query_proj"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": "targets=query_prj"}, "--lora targets 'query_prj' matches no module of the model; did you mean 'query_proj'?"),
        ({"lora": "targets=xyz"}, "--lora targets 'xyz' matches no module of the model; there are: query_proj, head"),
        (
            {"lora": "targets=words"},
            "--lora targets 'words' is module 'words', of type Embedding, and adapters are for linear layers; there are: query_proj, head",
        ),
        (
            {"lora": "targets=out_proj"},
            "--lora targets 'out_proj' is module 'attention.out_proj', whose weight its nn.MultiheadAttention reads without running it; "
            "leave it out",
        ),
        (
            {"lora": "r=2", "modules_to_save": "heads"},
            "--modules-to-save 'heads' matches no module of the model; did you mean 'head'?",
        ),
    ],
)
def test_what_cannot_have_an_adapter_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(Attending(), config(**options))
    assert str(caught.value) == message


def test_a_tied_weight_has_no_adapter_and_does_not_learn_in_one_place_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    with pytest.raises(
        ConfigError, match=r"^--lora targets '0' is module '0', whose weight is one tensor with '1.weight', which an"
    ):
        prepared(model, config(lora="targets=0"))
    with pytest.raises(
        ConfigError, match=r"^--modules-to-save: '1.weight' is one tensor with '0.weight', which is frozen; leave"
    ):
        prepared(model, config(lora="targets=2", modules_to_save="1"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda module: prune.random_unstructured(module, "weight", 0.5),
    ],
)
def test_a_weight_that_is_made_of_others_has_no_adapter(change: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    change(model[0])
    for options in ({"lora": "r=2"}, {"lora": "targets=1"}, {"lora": "targets=1", "frozen_dtype": "bf16"}):
        ours = prepared(model, config(**options))
        learning = [name for name, one in ours.named_parameters() if one.requires_grad]
        assert learning == ["1.lora_A", "1.lora_B"]
    with pytest.raises(
        ConfigError,
        match=r"^--lora targets '0' is module '0', whose weight is made of others \(by a parametrization, .*\); leave it out$",
    ):
        prepared(model, config(lora="targets=0"))


def test_the_users_model_stays_as_it_is() -> None:
    model = Attending()
    before = {name: (id(one), one.requires_grad) for name, one in model.named_parameters()}
    ours = prepared(model, config(lora="r=2", frozen_dtype="nf4", modules_to_save="words"))
    assert {name: (id(one), one.requires_grad) for name, one in model.named_parameters()} == before
    assert type(model.query_proj) is nn.Linear
    kept = {name: (str(one.dtype)[6:], one.requires_grad) for name, one in ours.named_parameters()}
    assert kept["words.weight"] == ("float32", True)
    assert kept["query_proj.weight"] == ("uint8", False)
    assert kept["query_proj.weight_scale"] == ("float32", False)
    assert kept["attention.out_proj.weight"] == ("float32", False)
    assert kept["head.weight"] == ("bfloat16", False)
    assert kept["query_proj.lora_B"] == ("float32", True)


def test_what_learns_whole_learns_though_the_models_code_froze_it() -> None:
    model = Attending().requires_grad_(False)
    ours = prepared(model, config(lora="r=2", modules_to_save="head"))
    assert not any(one.requires_grad for one in model.parameters())
    learns = {name for name, one in ours.named_parameters() if one.requires_grad}
    assert learns == {"head.weight", "head.bias", "query_proj.lora_A", "query_proj.lora_B"}
    assert ours.head.weight.data_ptr() == model.head.weight.data_ptr()


def test_transformer_layers_of_pytorch_run_their_adapters_in_eval_mode_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    ours = prepared(nn.Sequential(layer, nn.Linear(8, 2)), config(lora="targets=linear1")).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before = ours(x)
        ours[0].linear1.lora_B.normal_()
        assert not torch.equal(ours(x), before)


@pytest.mark.parametrize(
    ("task", "learning", "heads"),
    [
        ("sequence-classification", (), "pre_classifier, classifier"),
        ("sequence-classification", ("classifier.weight",), "pre_classifier"),
        ("sequence-classification", ("classifier.weight", "pre_classifier.weight"), None),
        ("causal-lm", (), None),
        (None, (), None),
    ],
)
def test_a_head_in_which_nothing_learns_is_said(task: str | None, learning: tuple[str, ...], heads: str | None) -> None:
    names = ("bert.query.lora_A", "pre_classifier.weight", "classifier.weight")
    parameters = {name: nn.Parameter(torch.zeros(1), name in (names[0], *learning)) for name in names}
    chain: Any = SimpleNamespace(layers=[SimpleNamespace(parameters=lambda: parameters)], persistent=dict.fromkeys(names))
    notes = frozen_head_notes(chain, task)
    assert bool(notes) == (heads is not None)
    assert all(f"head for classes ({heads}) has no adapter" in note and "--modules-to-save" in note for note in notes)


@pytest.mark.parametrize("head_first", [True, False])
def test_another_layer_than_that_of_the_outputs_is_said_to_be_left_out(head_first: bool) -> None:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("head", "body") if head_first else ("body", "head"):
                self.add_module(name, nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.body(x)).flatten(1)
            return out

    chain = capture(prepared(Ordered(), config(lora="r=2")), TensorSpec((4,), torch.float32))
    notes = output_layer_notes(chain, LoraOptions(r=2))
    assert [note.partition(":")[0] for note in notes] == ["'head', which makes the outputs, has an adapter"] * head_first
