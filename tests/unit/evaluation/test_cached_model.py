"""Models that keep keys and values: the scores of a whole forward, token by token, and the bytes that are foreseen for it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.small_networks import small_gpt
from helpers.transformers_folders import BART, LLAMA, T5, make_model
from lowmem_pnn.evaluation.cached_model import cached_model, foreseen_bytes
from lowmem_pnn.model.precision import Precision
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

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        return input_ids


def test_models_that_keep_nothing_are_known() -> None:
    assert cached_model(nn.Linear(2, 2), reads_source=False) is None
    assert cached_model(small_gpt(tied=True), reads_source=True) is None
    assert foreseen_bytes(NoCacheOfItsOwn(), FP32, 8, None) is None
