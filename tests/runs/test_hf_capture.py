"""Models of transformers are cut at their blocks, as they are: no option, no wrapper but for the output."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.exact_runs import COMMON, fit
from helpers.plainloops import assert_same_weights, loaded, train_by_exact
from helpers.small_networks import tokens
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.model.chain import TensorSpec

BLOCKS, WIDTH, VOCABULARY, LENGTH = 2, 16, 13, 5
COMMON_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED: dict[str, Any] = {**COMMON_SIZES, "num_key_value_heads": 2}


class Scores(nn.Module):
    """The scores of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, kept: Tensor | None = None) -> Tensor:
        scores: Tensor = self.model(input_ids=ids, attention_mask=kept).logits
        return scores


def make(family: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    makers: dict[str, Callable[[], nn.Module]] = {
        "GPT-2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_positions=16)
        ),
        "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
        "Gemma 3": lambda: transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(**GROUPED, head_dim=4, sliding_window=3, sliding_window_pattern=2)
        ),
        "Mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, num_local_experts=2)),
        "Llama for classes": lambda: transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**GROUPED, num_labels=3)
        ),
        "DistilBERT": lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(
                vocab_size=VOCABULARY, dim=WIDTH, n_layers=BLOCKS, n_heads=4, hidden_dim=24, max_position_embeddings=16
            )
        ),
    }
    return Scores(makers[family]())


def ids_of(batch: int) -> Tensor:
    return torch.arange(batch * LENGTH).reshape(batch, LENGTH) * 7 % (VOCABULARY - 3) + 3


def kept_of(batch: int) -> Tensor:
    """Right padding, of another length for each sample."""
    return (torch.arange(LENGTH) < LENGTH - torch.arange(batch)[:, None] % 3).long()


def assert_same_outputs_and_gradients(model: nn.Module, *inputs: Tensor) -> None:
    chain = capture(model, tuple(TensorSpec(tuple(one.shape[1:]), one.dtype) for one in inputs))
    blocks = {layer.name for layer in chain.layers if layer.name.rpartition(".")[2] in map(str, range(BLOCKS))}
    assert len(blocks) == BLOCKS, [layer.name for layer in chain.layers]
    assert not any(layer.whole for layer in chain.layers)
    # Hidden states cross, and the mask; not a mask for each pair of tokens, nor a table of angles.
    assert all(len(specs) <= len(inputs) and all(len(spec.shape) <= 2 for spec in specs) for specs in chain.boundaries)
    for training in (True, False):
        model.train(training)
        chain.train(training)
        found = []
        for run in (model, chain):
            torch.manual_seed(1)
            output = run(*inputs)
            output.square().mean().backward()
            found.append((output, {name: parameter.grad for name, parameter in model.named_parameters()}))
            model.zero_grad()
        assert torch.equal(found[0][0], found[1][0])
        for name, gradient in found[0][1].items():
            other = found[1][1][name]
            assert gradient is other is None or torch.equal(gradient, other), name


@pytest.mark.parametrize("family", ["GPT-2", "Llama", "Gemma 3", "Mixtral", "DistilBERT"])
def test_models_of_transformers_are_cut_at_their_blocks(family: str) -> None:
    assert_same_outputs_and_gradients(make(family), ids_of(3))


@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_padding_masks_cross_as_they_are_given(family: str) -> None:
    assert_same_outputs_and_gradients(make(family), ids_of(4), kept_of(4))


def test_a_decoder_in_partitions_is_same_as_plain_torch(tmp_path: Path) -> None:
    # Each partition holds the frequencies of the rotary table.
    data = tokens(12, 6)
    options = {**COMMON, "partitions": 3, "epochs": 1}
    build = functools.partial(make, "Llama")
    expected = train_by_exact(build, data, **options)
    result = fit(build, data, tmp_path / "run", **options)
    assert len(result.partitions) == 3
    assert_same_weights(expected.model, loaded(build, result.weights_file))


def test_partitions_that_learn_by_themselves_hold_the_same_table(tmp_path: Path) -> None:
    data = (ids_of(12), torch.arange(12) % 3)
    build = functools.partial(make, "Llama for classes")
    result = fit(build, data, tmp_path / "run", method="pnn", partitions=2, **{**COMMON, "epochs": 1})
    assert len(result.partitions) == 2
    loaded(build, result.weights_file)
