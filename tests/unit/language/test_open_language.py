"""Language data by name: parts, tokenizers, and the inputs that a model takes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.language import TEMPLATE, pairs, write_jsonl, write_tokenizer
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.inference.open_parts import OpenPart
from lowmem_pnn.language.language_form import Head, LanguageForm
from lowmem_pnn.language.open_language import _without_hidden, fit_inputs, open_language
from lowmem_pnn.language.prompts import plain_prompts
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.sources.datasets import make_dataset


def opened(folder: Path, **options: Any) -> Dataset:
    form = {"tokenizer": None, "context": 16, "packs": False, "loss_on": "completions", "root": folder / "root", **options}
    return open_language(f"jsonl:{write_jsonl(folder / 'a.jsonl', pairs())}", LanguageForm(**form))


class Named(nn.Module):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None) -> Any:
        return input_ids


class IdsOnly(nn.Module):
    def forward(self, input_ids: Any) -> Any:
        return input_ids


class Any_(nn.Module):
    def forward(self, **inputs: Any) -> Any:
        return inputs


def test_the_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    dataset = opened(tmp_path, tokenizer=str(write_tokenizer(tmp_path / "t")))
    assert (dataset.targets.kind, dataset.num_classes, dataset.sample_shape, dataset.targets.ignored) == (
        "tokens",
        279,
        (16,),
        -100,
    )
    assert dataset.preparation["tokenizer"] == str(tmp_path / "t")
    assert (dataset.name, dataset.dtype, len(dataset.inputs)) == ("a", torch.int64, 2)


@pytest.mark.parametrize(
    ("model", "packs", "names"),
    [
        (Named(), False, ["input_ids", "attention_mask"]),
        (Named(), True, ["input_ids", "position_ids"]),
        (Any_(), True, ["input_ids", "position_ids"]),
        (IdsOnly(), False, ["input_ids"]),
        (nn.Sequential(nn.Embedding(4, 4)), False, None),
    ],
)
def test_a_model_gets_what_it_takes(model: nn.Module, packs: bool, names: list[str] | None, tmp_path: Path) -> None:
    dataset = opened(tmp_path, packs=packs)
    fitted, splits = fit_inputs(model, "m", dataset, {"train": dataset.train})
    x, _ = splits["train"].batch([0])
    if names is None:
        assert (fitted.structure, fitted.inputs, isinstance(x, torch.Tensor)) == (None, (), True)
        return
    assert fitted.structure is not None
    assert list(fitted.structure.unflatten(x)) == names
    assert len(fitted.inputs) == len(names) == len(x)


def test_packing_without_positions_is_refused(tmp_path: Path) -> None:
    dataset = opened(tmp_path, packs=True)
    with pytest.raises(ConfigError) as error:
        fit_inputs(IdsOnly(), "mine.py:build", dataset, {"train": dataset.train})
    assert str(error.value) == (
        "--pack keeps documents in a row apart by position_ids, and model mine.py:build takes none: each would look at those before it; "
        "leave --pack out"
    )


def test_other_data_is_left_alone() -> None:
    dataset = make_dataset((torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)), name="x")
    splits = {"train": dataset.train}
    assert fit_inputs(IdsOnly(), "m", dataset, splits) == (dataset, splits)


def test_parts_of_a_hub_data_set(tmp_path: Path) -> None:
    import datasets

    parts = {"train": {"text": ["abc", "def"]}, "validation": {"text": ["ghi"]}}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name, rows in parts.items()})
    saved.save_to_disk(str(tmp_path / "hub"))
    dataset = open_language(f"hfdata:{tmp_path / 'hub'}", LanguageForm("bytes", 4, False, "completions", tmp_path / "root"))
    assert dataset.val is not None
    assert (len(dataset.train), len(dataset.val), dataset.test) == (2, 1, None)
    (x, _), _ = dataset.val.batch([0])
    assert x.tolist() == [[103, 104, 0, 0]]


def test_the_numbers_of_another_sources_classes_are_turned_into_names(tmp_path: Path) -> None:
    import datasets

    def saved(names: list[str], labels: list[int]) -> str:
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": labels}, features=features)
        rows.save_to_disk(str(tmp_path / "-".join(names)))
        return f"hfdata:{tmp_path / '-'.join(names)}"

    def labels(spec: str, classes: tuple[str, ...] = ()) -> tuple[list[int], tuple[str, ...], int]:
        head = Head("classes", classes=classes)
        dataset = open_language(spec, LanguageForm("bytes", 4, False, "completions", tmp_path / "root", head))
        return dataset.train.batch([0, 1, 2])[1].tolist(), dataset.classes, dataset.num_classes

    spec = saved(["pos", "neg"], [0, 1, 1])
    assert labels(spec) == ([0, 1, 1], ("pos", "neg"), 2)
    assert labels(spec, ("neg", "pos")) == ([1, 0, 0], ("neg", "pos"), 2)
    assert labels(spec, ("a", "neg", "pos")) == ([2, 1, 1], ("a", "neg", "pos"), 3)
    with pytest.raises(DataError, match=r"has the class 'so-so', which the training data has not; there are: neg, pos; give"):
        labels(saved(["pos", "so-so"], [0, 1, 1]), ("neg", "pos"))


def saved(folder: Path, parts: dict[str, dict[str, list[Any]]]) -> str:
    import datasets

    rows = {name: datasets.Dataset.from_dict(columns) for name, columns in parts.items()}
    datasets.DatasetDict(rows).save_to_disk(str(folder / "hub"))
    return f"hfdata:{folder / 'hub'}"


def test_other_data_needs_no_training_part(tmp_path: Path) -> None:
    form = LanguageForm("bytes", 4, False, "completions", tmp_path / "root")
    spec = saved(tmp_path, {"test": {"text": ["abc", "def"]}})
    assert len(open_language(spec, dataclasses.replace(form, is_apart=True)).train) == 2
    with pytest.raises(DataError, match=r"has the parts 'test', and no training part; save one called train"):
        open_language(spec, form)


def test_each_part_has_labels_or_none(tmp_path: Path) -> None:
    spec = saved(tmp_path, {"train": {"text": ["abc", "def"], "label": ["x", "y"]}, "test": {"text": ["ghi"]}})
    head = Head("classes", may_lack_labels=True, classes=("x", "y"))
    dataset = open_language(spec, LanguageForm("bytes", 4, False, "completions", tmp_path / "root", head, is_apart=True))
    parts = {"train": dataset.train, "test": dataset.test}
    assert {name: OpenPart.of_dataset(part, dataset).labelled for name, part in parts.items() if part is not None} == {
        "train": True,
        "test": False,
    }


def test_text_is_whole_where_its_test_part_is_apart(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 40)
    folder = str(write_tokenizer(tmp_path / "t"))
    form = LanguageForm(folder, 8, False, "completions", tmp_path / "root")
    cut = open_language(f"text:{tmp_path / 'a.txt'}", form)
    assert cut.test is not None
    for options in ({"is_apart": True}, {"tests_apart": True}):
        whole = open_language(f"text:{tmp_path / 'a.txt'}", dataclasses.replace(form, **options))
        assert (len(whole.train), whole.test) == (len(cut.train) + len(cut.test), None)
        assert whole.fingerprint != cut.fingerprint


@pytest.mark.parametrize(
    ("head", "trained_by", "message"),
    [
        (Head(), "another", r"^tokenizer .*/t is another one than the run was trained with; put it back$"),
        (
            Head("classes", model="hf:x", vocabulary=278),
            None,
            r"^model hf:x knows 278 tokens, and the tokenizer of the data has 279; give the model's own .*resize_token_embeddings\(279\)$",
        ),
        (
            Head("classes", model="hf:x", looks_for_padding=True),
            None,
            r"^model hf:x finds the end of a text by its pad_token_id, .* has none; give --model-arg pad_token_id=1, the tokenizer's$",
        ),
        (
            Head("sequences", model="hf:x", marks_languages=True),
            None,
            r"^model hf:x marks the language of each text by a token, and no option says which .*; give samples from Python, \(",
        ),
    ],
)
def test_tokenizers_that_do_not_do_are_refused(head: Head, trained_by: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, tokenizer=str(write_tokenizer(tmp_path / "t")), head=head, trained_by=trained_by)


def test_labels_that_are_hidden_are_left_out_and_said(tmp_path: Path) -> None:
    import datasets

    parts = {
        part: datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels, "idx": [0, 1]})
        for part, labels in (("train", [0, 1]), ("test", [-1, -1]))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "hub")
    form = LanguageForm("bytes", 4, False, "completions", tmp_path / "root", Head("classes"))
    dataset = open_language(f"hfdata:{tmp_path / 'hub'}", form)
    assert dataset.test is None
    assert dataset.preprocessing.endswith(", columns not read: idx; the test part is left out: its labels are hidden (-1)")
    asked = dataclasses.replace(form, head=Head("classes", may_lack_labels=True), is_apart=True)
    assert open_language(f"hfdata:{tmp_path / 'hub'}", asked).test is not None
    empty, said = {"test": parts["train"].select([])}, list[str]()
    assert (_without_hidden(empty, form, said), said) == (empty, []), "no label is hidden in it"


def test_of_conversations_it_is_known_that_a_prompt_is_no_turn(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "the cat"}]}])
    form = LanguageForm(str(write_tokenizer(tmp_path / "t", template=TEMPLATE)), 16, False, "completions", tmp_path / "root")
    note = plain_prompts(open_language(f"jsonl:{path}", form).preparation)
    assert note is not None
    assert note.startswith("prompts are given as they are, not as turns: ")
    assert plain_prompts(opened(tmp_path).preparation) is None
