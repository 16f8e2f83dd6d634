"""Models that keep keys and values: the scores of a whole forward, token by token, and the bytes that are foreseen for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.small_networks import small_gpt
from helpers.transformers_folders import BART, LLAMA, T5, make_model
from lowmem_pnn.evaluation.cached_model import cached_model, foreseen_bytes
from lowmem_pnn.model.precision import Precision
from lowmem_pnn.zoo.gpt_model import Attention, GptShape
from lowmem_pnn.zoo.transformers_modules import returning_logits

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 300}
QWEN3 = {**LLAMA, "head_dim": 8, "tie_word_embeddings": True}
CAUSAL, SEQUENCES = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
IDS = torch.tensor([[3, 8, 1, 12, 7, 5]])
FP32 = Precision()


@pytest.mark.parametrize(
    ("kind", "auto", "sizes", "logits_alone"),
    [
        ("gpt", "", {}, False),
        ("llama", CAUSAL, LLAMA, True),
        ("gpt2", CAUSAL, GPT2, False),
        ("qwen3", CAUSAL, QWEN3, True),
        ("t5", SEQUENCES, T5, True),
        ("bart", SEQUENCES, BART, False),
    ],
)
def test_scores_by_what_is_kept_are_those_of_a_whole_forward(
    kind: str, auto: str, sizes: dict[str, Any], logits_alone: bool
) -> None:
    model = (small_gpt(tied=True) if kind == "gpt" else make_model(kind, auto, sizes)).eval()
    source = torch.tensor([[4, 9, 2, 11]]) if auto == SEQUENCES else None
    with torch.no_grad():
        if source is not None:
            expected = model(input_ids=source, decoder_input_ids=IDS, use_cache=False).logits[0]
        else:
            expected = model(IDS) if kind == "gpt" else model(input_ids=IDS, use_cache=False).logits
            expected = expected.view(IDS.shape[1], -1)
    if logits_alone:
        model.__class__ = returning_logits(type(model), "seq2seq" if source is not None else "causal-lm")
    cached = cached_model(model, reads_source=source is not None)
    assert cached is not None
    with torch.no_grad():
        # Begun twice: nothing stays of the text before.
        cached.begin(IDS[:, :3], source)
        found = [cached.begin(IDS[:, :2], source), *(cached.go_on(IDS[:, place : place + 1]) for place in range(2, 6))]
    torch.testing.assert_close(torch.stack(found), expected[1:], rtol=0, atol=1e-5)


def test_bytes_are_foreseen_for_the_length_of_the_text() -> None:
    model = make_model("llama", CAUSAL, {**LLAMA, "max_position_embeddings": 4096})
    short, long = (foreseen_bytes(model, FP32, length, None) for length in (64, 1064))
    assert short is not None
    assert long is not None
    # Two layers keep keys and values of a head of 8 numbers; a forward over all takes more.
    assert long - short >= 1000 * 2 * 2 * 8 * 4
    assert foreseen_bytes(make_model("t5", SEQUENCES, T5), FP32, 8, 16) is not None


class NoCacheOfItsOwn(nn.Module):
    """Takes what models with a cache take, and keeps nothing."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False, return_dict: bool = False) -> Any:
        return input_ids


class FailingCache(NoCacheOfItsOwn):
    """Fails in its own cache."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False, return_dict: bool = False) -> Any:
        assert not use_cache


class OutOfMemory(NoCacheOfItsOwn):
    """Needs more memory than there is."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False, return_dict: bool = False) -> Any:
        raise MemoryError


class OtherAttention(Attention):
    """A forward of its own."""


def replace_attention(model: Any, attention: nn.Module) -> None:
    model.blocks[0][0] = attention


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, outputs: outputs * 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: replace_attention(model, nn.Identity()),
        lambda model: replace_attention(model, OtherAttention(GptShape(width=16, heads=2))),
        lambda model: model.blocks[1].append(nn.Identity()),
        lambda model: setattr(model.embedding, "forward", model.embedding.forward),
        lambda model: hook(model),
        lambda model: hook(model.blocks[0]),
        lambda model: hook(model.blocks[0][0]),
        lambda model: model.embedding.register_forward_pre_hook(lambda module, inputs: None),
    ],
)
def test_a_gpt_that_was_changed_keeps_nothing(change: Callable[[Any], None]) -> None:
    model = small_gpt(tied=True)
    assert cached_model(model, reads_source=False) is not None
    change(model)
    assert cached_model(model, reads_source=False) is None


def test_hooks_of_a_model_whose_class_is_passed_by_are_not() -> None:
    model = make_model("gpt2", CAUSAL, GPT2)
    model.__class__ = returning_logits(type(model), "causal-lm")
    assert cached_model(model, reads_source=False) is not None
    hook(model)
    assert cached_model(model, reads_source=False) is None


def test_models_that_keep_nothing_are_known() -> None:
    assert cached_model(nn.Linear(2, 2), reads_source=False) is None
    assert cached_model(small_gpt(tied=True), reads_source=True) is None
    assert foreseen_bytes(NoCacheOfItsOwn(), FP32, 8, None) is None
    assert foreseen_bytes(FailingCache(), FP32, 8, None) is None
    with pytest.raises(MemoryError):
        foreseen_bytes(OutOfMemory(), FP32, 8, None)
