"""Data that a trained model is shown: with the class numbers of its run, or refused."""

import dataclasses
from typing import Any

import pytest
import torch

from helpers.datasets import everything
from lowmem_pnn.errors import DataError
from lowmem_pnn.inference.open_parts import OpenPart, SamplesToPredict
from lowmem_pnn.sources.datasets import make_dataset
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.subsets import RenumberedSplit
from lowmem_pnn.workload.data_form import DataForm

X, Y = torch.rand(6, 4), torch.arange(6) % 3
FORM = dataclasses.replace(DataForm.of(make_dataset((X, Y), name="x")), classes=("ant", "bee", "cat"))


def shown(x: Any, y: Any, classes: tuple[str, ...] = (), form: DataForm = FORM, labelled: bool = True) -> SamplesToPredict:
    split = from_torch((x, y), where="other")
    split.classes = classes
    return SamplesToPredict([OpenPart.of_split(split, labelled)], form, None, "data other", None)


def test_classes_are_those_of_the_run_by_their_names() -> None:
    assert everything(shown(X, Y, ("cat", "ant", "bee")))[1].tolist() == [2, 0, 1, 2, 0, 1]
    assert everything(shown(X, Y % 2, ("cat", "ant")))[1].tolist() == [2, 0, 2, 2, 0, 2]
    assert everything(shown(X, Y))[1].tolist() == Y.tolist()
    left_out = torch.tensor([-100, 0, 1, 2, 0, 1])
    assert everything(shown(X, left_out, ("cat", "ant", "bee")))[1].tolist() == [-100, 2, 0, 1, 2, 0]
    with pytest.raises(
        DataError, match=r"^data other has the class 'bat', which the training data has not; did you mean 'cat' or 'ant'\?;"
    ):
        shown(X, Y, ("bat", "ant", "bee"))


def test_a_label_beyond_the_runs_classes_is_refused_before_it_is_scored() -> None:
    message = r"^data other has classes up to number 3, and the training data up to 2; number the classes alike"
    with pytest.raises(DataError, match=message):
        shown(X, Y + 1)
    form = DataForm.of(make_dataset(({"a": X, "b": X}, Y), name="x"))
    with pytest.raises(DataError, match=message):
        shown({"a": X, "b": X}, Y + 1, form=form)
    assert len(shown(X, Y + 1, labelled=False)) == 6
    images, masks = torch.zeros(6, 3, 4, 4), torch.arange(6).reshape(6, 1, 1).expand(6, 4, 4) % 3
    with pytest.raises(DataError, match=message):
        shown(images, masks + 1, form=DataForm.of(make_dataset((images, masks), name="x")))


def test_a_length_that_samples_are_to_be_padded_to_is_named() -> None:
    ids = torch.arange(12).reshape(3, 4)
    form = DataForm.of(make_dataset(({"ids": ids, "mask": ids}, Y[:3]), name="x"))
    message = r"have collate_fn, or the tokenizer, bring them to 4 \(padding='max_length', max_length=4, truncation=True\), or give them to"
    with pytest.raises(DataError, match=message):
        shown({"ids": ids[:, :3], "mask": ids[:, :3]}, Y[:3], form=form)
    for other in (ids[:, :3].float(), ids[..., None]):
        with pytest.raises(DataError, match=r"; give data of one form$"):
            shown({"ids": other, "mask": ids}, Y[:3], form=form)
    with pytest.raises(DataError, match=r"; give data of one form$"):  # features, and no sequence
        shown(X[:, :3], Y)


def test_tokens_that_the_training_data_did_not_show_are_counted() -> None:
    ids = torch.arange(12).reshape(3, 4)
    form = DataForm.of(make_dataset((ids, ids + 1), name="x"))
    samples = shown(ids + 5, ids + 6, form=form)
    assert (form.targets.num_classes, samples.num_classes) == (13, 18)


def test_samples_keep_their_places_where_broken_ones_are_left_out() -> None:
    parts = []
    for number in (1, 4):
        x = X.clone()
        x[number] = torch.nan
        parts.append(OpenPart.of_split(from_torch((x, Y), where="other", skip_broken=True), True))
    parts[0] = dataclasses.replace(parts[0], split=RenumberedSplit(parts[0].split, torch.arange(3)))
    samples = SamplesToPredict(parts, FORM, None, "data other", None)
    assert samples.places.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert list(samples.skipped) == ["sample 1 of other", "sample 4 of other"]
    assert shown(X, Y).places.tolist() == list(range(6))
