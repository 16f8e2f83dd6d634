"""The gpt model: what its name says, that it is the standard decoder, and how it is cut into layers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.zoo.deferred_init import file_backed, skeleton
from lowmem_pnn.zoo.gpt_model import GptShape, parse_gpt
from lowmem_pnn.zoo.models import find_model

TINY = "gpt:layers=2,width=32,heads=4,context=16"


def make(spec: str = TINY, vocabulary: int = 50, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return find_model(spec, {}, vocabulary).build()


def ids(batch: int, length: int = 16, vocabulary: int = 50) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch))


def cut(model: nn.Module) -> Chain:
    return capture(model, TensorSpec((16,), torch.int64))


# Its name.


def test_all_is_in_the_name() -> None:
    assert parse_gpt("gpt") == parse_gpt("gpt:") == GptShape(layers=12, width=768, heads=12, context=256, dropout=0.0, tied=True)
    given = parse_gpt("gpt:dropout=0.25, tied=False, layers=3,width=48,heads=6,context=1024")
    assert given == GptShape(layers=3, width=48, heads=6, context=1024, dropout=0.25, tied=False)


def test_a_source_says_how_it_takes_text() -> None:
    source = find_model(TINY, {}, 50)
    assert (source.name, source.spec, source.input_form, source.context) == ("gpt-2x32", TINY, "any", 16)
    assert find_model("mlp:8-4", {}, 4).context is None
    with torch.device("meta"):
        sizes = [tuple(find_model("gpt", {}, number).build().head.weight.shape) for number in (None, 60)]
    assert sizes == [(256, 768), (60, 768)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "gpt:layer=2",
            r"model 'gpt:layer=2' has no argument 'layer'; did you mean 'layers'\?; it accepts: layers, width, heads, ",
        ),
        ("gpt:vocab=9", r"has no argument 'vocab'"),
        ("gpt:layers=2,layers=3", r"layers is given twice; give it once"),
        ("gpt:12", r"'12' is not NAME=VALUE; write, for example, gpt:layers=12,width=768,heads=12,context=256"),
        ("gpt:layers=2,", r"'' is not NAME=VALUE"),
        ("gpt:layers=0", r"layers=0 is no positive whole number; write, for example, gpt:layers=12"),
        ("gpt:width=-64", r"width=-64 is no positive whole number"),
        ("gpt:context=1.5", r"context=1.5 is no positive whole number"),
        ("gpt:heads=", r"heads= is no positive whole number"),
        ("gpt:width=100,heads=12", r"a width of 100 is no multiple of 12 heads; give, for example, width=96"),
        ("gpt:width=2,heads=12", r"no multiple of 12 heads; give, for example, width=12"),
        ("gpt:width=9999999999,heads=1", r"needs more values than a tensor can hold"),
        ("gpt:dropout=1", r"dropout=1 is not in 0 <= dropout < 1; give, for example, dropout=0.1"),
        ("gpt:dropout=-0.1", r"dropout=-0.1 is not in"),
        ("gpt:dropout=nan", r"dropout=nan is not in"),
        ("gpt:tied=yes", r"tied=yes is neither true nor false"),
    ],
)
def test_a_name_that_says_no_model_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        find_model(spec, {}, 50)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("spec", "better"), [("gpt", "gpt:width=64"), ("gpt:layers=2", "gpt:layers=2,width=64")])
def test_model_arguments_belong_into_the_name(spec: str, better: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"takes no --model-arg, but 'width' was given; all of a gpt is in its name: {better}$"
    ):
        find_model(spec, {"width": 64}, 50)


# The model.


def test_it_is_the_standard_decoder() -> None:
    """Held against `nn.TransformerEncoderLayer`, pre-norm, with the same weights."""
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # biases and norms too
    x = ids(3)
    stream = model.embedding.tokens.weight[x] + model.embedding.positions
    mask = nn.Transformer.generate_square_subsequent_mask(16)
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0, activation="gelu", batch_first=True, norm_first=True)
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": attention.qkv.weight, "self_attn.in_proj_bias": attention.qkv.bias,
                "self_attn.out_proj.weight": attention.projection.weight, "self_attn.out_proj.bias": attention.projection.bias,
                "linear1.weight": mlp.up.weight, "linear1.bias": mlp.up.bias,
                "linear2.weight": mlp.down.weight, "linear2.bias": mlp.down.bias,
                "norm1.weight": attention.norm.weight, "norm1.bias": attention.norm.bias,
                "norm2.weight": mlp.norm.weight, "norm2.bias": mlp.norm.bias,
            }
        )  # fmt: skip
        stream = layer(stream, src_mask=mask, is_causal=True)
    expected = nn.functional.layer_norm(stream, (32,), model.norm.weight, model.norm.bias) @ model.embedding.tokens.weight.T
    assert model(x).shape == (3, 16, 50)
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)


def test_no_place_sees_what_comes_after_it() -> None:
    model, x = make(), ids(2)
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert bool((before[:, 9:] != after[:, 9:]).any(-1).all())


def test_shorter_samples_are_taken_and_longer_ones_refused() -> None:
    model, x = make(), ids(2)
    assert torch.allclose(model(x[:, :5]), model(x)[:, :5], atol=1e-5)
    with pytest.raises(ValueError, match=r"samples have 17 tokens, the model's context is 16; give context=17"):
        model(ids(1, 17))


def test_initial_values_are_those_of_gpt2() -> None:
    model = make("gpt:layers=8,width=64,heads=4,context=128,tied=false", 256)
    for name, parameter in model.state_dict().items():
        if "norm" in name:
            assert bool((parameter == (1.0 if name.endswith("weight") else 0.0)).all()), name
        elif name.endswith("bias"):
            assert bool((parameter == 0).all()), name
        else:
            expected = 0.02 / 4 if name.endswith(("projection.weight", "down.weight")) else 0.02
            assert float(parameter.std()) == pytest.approx(expected, rel=0.06), name
            assert abs(float(parameter.mean())) < 5 * expected / math.sqrt(parameter.numel()), name
    # So that at first all tokens are about as likely.
    scores = model(ids(2, 128, 256)).detach()
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), ids(5, 128, 256)[:2].flatten())
    assert float(loss) == pytest.approx(math.log(256), rel=0.05)


def test_head_and_embedding_are_one_tensor_if_tied() -> None:
    tied, untied = make(), make(TINY + ",tied=false")
    assert tied.head.weight is tied.embedding.tokens.weight
    assert "head.weight" in tied.state_dict()
    assert not torch.equal(untied.head.weight, untied.embedding.tokens.weight)
    assert sum(map(torch.numel, untied.parameters())) - sum(map(torch.numel, tied.parameters())) == 50 * 32


def test_dropout_is_for_training_only() -> None:
    model, x = make(TINY + ",dropout=0.2"), ids(2)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    assert torch.equal(model(x), make()(x))


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = make("gpt:layers=1,width=16,heads=2,context=16", 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # What comes next follows from the two tokens before it, not from one.
    text = torch.tensor([0, 1, 0, 2, 3, 2, 4, 3, 0] * 40)
    for _ in range(120):
        starts = torch.randint(len(text) - 17, (16,))
        x, y = (torch.stack([text[start + shift : start + shift + 16] for start in starts]) for shift in (0, 1))
        # The first tokens of a window have nothing before them.
        loss = nn.functional.cross_entropy(model(x)[:, 2:].flatten(0, 1), y[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


# Its layers.


@pytest.mark.parametrize("on_meta", [False, True])
def test_it_is_cut_before_every_attention_and_mlp_with_one_tensor_across(on_meta: bool) -> None:
    source = find_model(TINY, {}, 50)
    chain = cut(skeleton(source.build) if on_meta else source.build())
    names = ["embedding", "blocks.0.attention", "blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp", "head"]
    assert [layer.name for layer in chain.layers] == names
    stream = (TensorSpec((16, 32), torch.float32),)
    assert chain.boundaries == (
        (TensorSpec((16,), torch.int64),), *[stream] * 5, (TensorSpec((16, 50), torch.float32),),
    )  # fmt: skip
    assert set(chain.layers[0].parameters()) == {"embedding.tokens.weight", "embedding.positions"}
    assert {"norm.weight", "norm.bias"} < set(chain.layers[4].parameters())
    assert chain.ties == (("embedding.tokens.weight", "head.weight"),)
    assert chain.tied_ranges == ((0, 5),)
    assert (chain.unused, chain.layer_index("blocks.1")) == ((), 3)


def test_the_last_layer_is_the_head_alone() -> None:
    model = make()
    chain = cut(model)
    last = chain.layers[-1]
    assert list(last.parameters()) == ["head.weight"]
    rows = torch.randn(7, 3, 32)
    assert torch.equal(last(rows)[0], nn.functional.linear(rows, model.head.weight))


def test_untied_layers_share_nothing() -> None:
    chain = cut(make(TINY + ",tied=false"))
    assert (chain.ties, chain.tied_ranges) == ((), ())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", [TINY, TINY + ",dropout=0.1", TINY + ",tied=false"])
def test_the_chain_is_same_as_the_model(spec: str, training: bool) -> None:
    model = make(spec)
    chain = cut(model).train(training)
    model.train(training)
    for batch, length in ((1, 16), (2, 16), (7, 16), (3, 5), (2, 1)):
        x, gradients = ids(batch, length), []
        outputs = []
        for forward in (model, chain):
            model.zero_grad()
            torch.manual_seed(1)
            outputs.append(forward(x))
            outputs[-1].square().mean().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert torch.equal(*outputs)
        assert all(map(torch.equal, *gradients))


def test_it_is_built_in_files_with_the_same_values(tmp_path: Path) -> None:
    expected = make().state_dict()
    with file_backed(tmp_path, at_least=1):
        found = make()
    assert found.head.weight is found.embedding.tokens.weight
    assert list(found.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
