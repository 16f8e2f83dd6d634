"""Labels of tokens from Python: as the own loss of a model of transformers has them, as they are, or refused as a copy of the inputs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.datasets import everything
from helpers.transformers_folders import BART, BERT, LLAMA, make_model, write_config
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.language.next_tokens import MovedLabels, fit_labels, moves_labels
from lowmem_pnn.language.open_language import fit_inputs
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.workload.data_notes import data_notes
from lowmem_pnn.workload.inputs import python_inputs

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 300, (20, 9), generator=GENERATOR)
MASK = (torch.arange(9) < 9 - torch.arange(20)[:, None] % 3).long()
# As Trainer takes them: of the same place, prompts and padding left out.
LABELS = torch.where((torch.arange(9) >= 3) & (MASK == 1), IDS, -100)
AHEAD = torch.cat([LABELS[:, 1:], torch.full((20, 1), -100)], 1)
GPT2 = {
    "vocab_size": 300,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 16,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def fitted(model: Any, data: Any, val: Any = None) -> tuple[Dataset, dict[Any, Any]]:
    """Data as a model gets it, from the options to where the model is cut."""
    name = model if isinstance(model, str) else "python:net"
    config = configure(max_gpu_mem="100MB", model=name, data="python:rows", device="cpu", method="exact", val_fraction=0)
    source, dataset, splits, _ = python_inputs(model, data, val, val)(config)
    with torch.device("meta"):
        built = source.build()
    return fit_labels(built, name, *fit_inputs(built, name, dataset, splits))


def rows(labels: Tensor, masks: bool = True) -> list[dict[str, Tensor]]:
    named = {"input_ids": IDS, **({"attention_mask": MASK} if masks else {}), "labels": labels}
    return [{name: values[number] for name, values in named.items()} for number in range(len(IDS))]


def test_labels_of_the_same_place_are_moved_as_the_models_own_loss_moves_them() -> None:
    model = make_model("gpt2", "AutoModelForCausalLM", GPT2).eval()
    dataset, splits = fitted(lambda: model, rows(LABELS), val=rows(LABELS))
    assert dataset.preprocessing.endswith(", labels moved by one token, as the model's own loss moves them")
    note, *_ = data_notes(SimpleNamespace(splits=splits, dataset=dataset))  # type: ignore[arg-type]
    assert note.startswith("labels are moved by one token, as the model's own loss moves them")
    for split in splits.values():
        (ids, mask), labels = everything(split)
        own = model(input_ids=ids, attention_mask=mask, labels=everything(split.base)[1])
        assert torch.equal(nn.functional.cross_entropy(own.logits.flatten(0, 1), labels.flatten()), own.loss)
        assert torch.equal(split.labels(torch.arange(2).numpy()), labels[:2])


def test_a_model_by_name_has_them_moved_too_and_gets_no_mask(tmp_path: Path) -> None:
    file = write_config(tmp_path / "llama.json", "llama", "LlamaForCausalLM", LLAMA, num_hidden_layers=1)
    for data in (rows(LABELS, masks=False), rows(LABELS), (IDS, LABELS)):
        x, labels = everything(fitted(f"hf:{file}", data)[1]["train"])
        assert torch.equal(labels.sort(0).values, AHEAD.sort(0).values)
        assert torch.equal((x[0] if isinstance(x, tuple) else x).sort(0).values, IDS.sort(0).values)
    left = [{**row, "attention_mask": row["attention_mask"].flip(0)} for row in rows(LABELS)]
    with pytest.raises(
        DataError, match=r"^the attention_mask of sample \d+ hides tokens before others, and the model is given none; pad"
    ):
        fitted(f"hf:{file}", left)


def test_labels_that_are_moved_already_stay() -> None:
    dataset, splits = fitted(lambda: make_model("gpt2", "AutoModelForCausalLM", GPT2), rows(AHEAD), val=rows(LABELS))
    assert [isinstance(splits[name], MovedLabels) for name in ("train", "val", "test")] == [False, True, True]
    words = ", labels of the validation and test part moved by one token, as the model's own loss moves them"
    assert dataset.preprocessing.endswith(words)


def embeddings() -> nn.Module:
    return nn.Sequential(nn.Embedding(300, 4), nn.Linear(4, 300))


def test_labels_that_any_other_model_would_copy_are_refused() -> None:
    for data in ((IDS, IDS), (IDS, LABELS)):
        with pytest.raises(ConfigError) as caught:
            fitted(embeddings, data)
        assert str(caught.value) == (
            "data python-rows: the label of each token is the token itself, which model python:net sees, and would learn to copy; move "
            "labels by one (that of a token is the next token, of the last one -100), or mask in the inputs what is to be found"
        )
    for labels in (AHEAD, torch.ones_like(IDS), torch.where(IDS > 250, IDS - 1, IDS)):
        _, kept = everything(fitted(embeddings, (IDS, labels))[1]["train"])
        assert torch.equal(kept.sort(0).values, labels.sort(0).values)


@pytest.mark.parametrize(
    ("kind", "auto", "sizes", "moves"),
    [
        ("gpt2", "AutoModelForCausalLM", GPT2, True),
        ("llama", "AutoModelForCausalLM", LLAMA, True),
        ("bert", "AutoModelForCausalLM", {**BERT, "is_decoder": True}, True),
        ("bert", "AutoModelForMaskedLM", BERT, False),
        ("bert", "AutoModelForTokenClassification", BERT, False),
        ("bart", "AutoModelForCausalLM", {**BART, "is_decoder": True, "is_encoder_decoder": False}, False),
        ("bart", "AutoModelForSeq2SeqLM", BART, False),
    ],
)
def test_which_models_move_labels_their_code_tells(kind: str, auto: str, sizes: dict[str, Any], moves: bool) -> None:
    model = make_model(kind, auto, sizes).eval()
    assert moves_labels(model) == moves
    if "Seq2Seq" not in auto:
        ids = torch.arange(3, 9).reshape(1, 6) % 7
        labels = ids % 2 if "Token" in auto else ids
        output = model(input_ids=ids, labels=labels)
        found = nn.functional.cross_entropy(
            output.logits[0, :-1] if moves else output.logits[0], labels[0, 1:] if moves else labels[0]
        )
        torch.testing.assert_close(found, output.loss)
