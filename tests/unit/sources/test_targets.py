"""Targets: what they are is found from their shapes and values, and they are kept in one form."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.datasets import make_dataset
from lowmem_pnn.sources.map_split import from_arrays, from_torch
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.sources.targets import TargetOptions, Targets, find_targets
from lowmem_pnn.tasks.classification import Classification

IMAGE = (3, 4, 5)


def find(
    values: Any, task: Any = "auto", shape: tuple[int, ...] = (6,), *, tokens: bool = False, ignored: int | None = None
) -> Targets:
    return find_targets(values, "mine", TargetOptions(task, ignored), shape, tokens=tokens)


@pytest.mark.parametrize(("values", "shape", "expected"), [
    ([2, 0, 1], (6,), Targets("class", 3, ignored=-100)),
    ([2.0, 0.0], (6,), Targets("class", 3, ignored=-100)),
    (np.array([[2], [0]]), (6,), Targets("class", 3, ignored=-100)),
    ([2, -100], (6,), Targets("class", 3, ignored=-100)),
    ([True, False], (6,), Targets("class", 2, ignored=-100)),
    ([2.5, 0.0], (6,), Targets("values", 1, (), torch.float32)),
    ([-2.0, 0.0], (6,), Targets("values", 1, (), torch.float32)),
    (torch.tensor([[1.5, 2], [3, 4]]), (6,), Targets("values", 2, (2,), torch.float32)),
    ([[1, 1, 0], [0, 0, 1]], (6,), Targets("labels", 3, (3,), torch.float32)),
    (torch.tensor([[True, True], [False, False]]), (6,), Targets("labels", 2, (2,), torch.float32)),
    (torch.zeros(2, 4, 5, dtype=torch.uint8), IMAGE, Targets("mask", 1, (4, 5), torch.uint8, 255)),
    (torch.full((2, 1, 4, 5), 300), IMAGE, Targets("mask", 301, (4, 5), torch.int64, 255)),
    (torch.full((2, 4, 5), 255, dtype=torch.uint8), IMAGE, Targets("mask", 1, (4, 5), torch.uint8, 255)),
])  # fmt: skip
def test_what_targets_are_shows_in_them(values: Any, shape: tuple[int, ...], expected: Targets) -> None:
    assert find(values, shape=shape) == expected


def test_tokens_have_a_label_each() -> None:
    assert find(torch.tensor([[1, 4, -100]]), shape=(3,), tokens=True) == Targets("tokens", 5, (3,), ignored=-100)
    assert find(torch.tensor([[7], [8]]), shape=(3,), tokens=True) == Targets("class", 9, ignored=-100)


@pytest.mark.parametrize(("values", "task", "kind"), [
    ([3.0, 70000.0], "regression", "values"),
    ([3, 5], "regression", "values"),
    ([3.0, 70000.0], "classification", "class"),
    ([[1, 0], [0, 1]], "multilabel", "labels"),
    ([[1, 0], [0, 1]], "classification", "probabilities"),
    ([[0.25, 0.75], [0.5, 0.5]], "classification", "probabilities"),
    ([[1.0, 0.0], [0.0, 1.0]], "regression", "values"),
])  # fmt: skip
def test_a_task_says_what_targets_are_where_they_leave_a_doubt(values: Any, task: Any, kind: str) -> None:
    assert find(values, task).kind == kind


@pytest.mark.parametrize(("values", "text"), [
    ([[1, 0], [0, 1]], "with one-hot rows; give one class number .* --task classification, multilabel or regression"),
    ([[0.25, 0.75], [0.5, 0.5]], "with probabilities rows; give one class number for each sample"),
    ([3.0, 70000.0], "targets are whole floats up to 70000, which may be values or class numbers; say which"),
    ([[1, 2], [0, 1]], r"labels have shape \(2, 2\); give one class number for each sample"),
    ({"a": [1, 2]}, "a target is a dict of several values; give a loss that takes it, loss=... from Python"),
])  # fmt: skip
def test_a_doubt_is_said(values: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        find(values)


def test_tokens_stay_in_the_type_they_have_and_are_cast_batch_by_batch() -> None:
    ids = np.arange(60, dtype=np.uint16).reshape(3, 20) % 13
    split = from_arrays(torch.from_numpy(ids), torch.from_numpy(ids.copy()), num_classes=None, input_form="any", where="t")
    assert split.y.dtype == torch.uint16
    x, labels = split.batch([2, 0])
    assert (x.dtype, labels.dtype) == (torch.int64, torch.int64)
    assert labels.tolist() == ids[[2, 0]].tolist()
    assert split.labels(np.array([1])).tolist() == ids[[1]].tolist()


def test_uint8_tokens_are_told_from_images() -> None:
    with pytest.raises(DataError, match=r"or, for tokens, samples as int32 or uint16 \(uint8 is taken for images\)"):
        find_targets(np.full((4, 16), 7, dtype=np.uint8), "train", TargetOptions(), (16,), tokens=False)


@pytest.mark.parametrize("of_samples", [False, True])
def test_several_targets_are_kept_as_one_row_and_come_back(of_samples: bool) -> None:
    targets = {
        "box": torch.rand(5, 4),
        "seen": torch.tensor([True, False, True, True, False]),
        "kinds": (torch.arange(5), torch.rand(5, 2, 3)),
    }
    x = torch.rand(5, 3)
    data: Any = (x, targets)
    if of_samples:
        data = [
            (x[n], {"box": targets["box"][n], "seen": targets["seen"][n], "kinds": tuple(part[n] for part in targets["kinds"])})
            for n in range(5)
        ]
    split = from_torch(data, options=TargetOptions("own"))
    kept = split.batch([3, 1])[1]
    assert (kept.dtype, kept.shape) == (torch.uint8, (2, 4 * 4 + 1 + 8 + 6 * 4))
    for one in (kept, kept[1:].clone(), kept[1:]):  # be it at any place in memory
        found, number = split.targets.unpack(one), [3, 1][-len(one) :]
        assert torch.equal(found["box"], targets["box"][number])
        assert torch.equal(found["seen"], targets["seen"][number])
        assert torch.equal(found["kinds"][0], targets["kinds"][0][number])
        assert torch.equal(found["kinds"][1], targets["kinds"][1][number])


def test_a_target_of_another_form_is_named() -> None:
    split = from_torch(
        [(torch.zeros(3), {"a": 1.5}), (torch.zeros(3), {"a": 1.5}), (torch.zeros(3), {"b": 1.5})][:2],
        options=TargetOptions("own"),
    )
    with pytest.raises(DataError, match=r"sample 7 has targets \(\) float32, others have"):
        split.targets.convert({"b": 1.5}, "sample 7", batched=False)
    values, x = [1.5, 0.5, float("nan"), *[0.5] * 40], torch.zeros(43, 3)
    with pytest.raises(DataError, match=r"^mine: the target of sample 2 is NaN or infinite; repair it or leave the sample out$"):
        from_torch((x, values), where="mine")
    with pytest.raises(DataError, match=r"^sample 2 of mine: its target is NaN or infinite; .* out \(--skip-broken\)$"):
        from_torch(list(zip(x, values, strict=True)), where="mine").batch([2])
    with pytest.raises(DataError, match=r"^sample 2 of mine: its target is NaN or infinite; repair it or leave the sample out$"):
        from_torch([({"a": one, "b": one}, value) for one, value in zip(x, values, strict=True)], where="mine").batch([2])


def test_a_broken_target_is_left_out_with_its_sample() -> None:
    split = from_torch([(torch.zeros(3), value) for value in (1.5, float("nan"), 2.5)], where="mine", skip_broken=True)
    assert list(split.skipped) == ["sample 1 of mine"]
    assert split.batch([0, 1])[1].tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [({"ids": (7,), "mask": (7,)}, "tokens"), ({"features": (3, 5), "ids": (7,)}, "tokens"), ({"ids": (6,)}, None)],
)
def test_samples_of_several_tensors_may_have_a_label_for_each_token(inputs: dict[str, Any], kind: str | None) -> None:
    x = {
        name: torch.rand(4, *shape) if name == "features" else torch.arange(4 * math.prod(shape)).view(4, *shape)
        for name, shape in inputs.items()
    }
    labels = torch.arange(28).view(4, 7) + 2
    labels[:, 5:] = -100
    if kind is None:
        with pytest.raises(DataError, match=r"labels have shape \(4, 7\); give one class number for each sample"):
            from_torch((x, labels))
        return
    split = from_torch((x, labels))
    assert (split.targets.kind, split.targets.num_classes, split.targets.shape) == (kind, 28, (7,))
    assert torch.equal(split.batch([2])[1], labels[2:3])


def test_masks_of_two_parts_are_kept_in_one_type() -> None:
    x, masks = torch.rand(2, *IMAGE), torch.ones(2, 4, 5, dtype=torch.int64)
    partly = masks.clone()
    partly[0, 0] = -100
    dataset = make_dataset((x, partly), (x, masks), name="x", options=TargetOptions(ignored=-100))
    for part, kept in ((dataset.train, partly), (dataset.test, masks)):
        assert part.batch([0, 1])[1].dtype == part.labels(np.arange(2)).dtype == torch.int64
        assert torch.equal(part.batch([0, 1])[1], kept)


@pytest.mark.parametrize("is_structured", [False, True])
@pytest.mark.parametrize(
    ("number", "ignored", "dtype", "classes"),
    [(300, 255, torch.int64, 301), (-1, -1, torch.int64, 2), (7, 255, torch.uint8, 8), (7, -1, torch.int64, 8)],
)
def test_a_mask_that_was_not_looked_at_keeps_its_values(
    number: int, ignored: int, dtype: torch.dtype, classes: int, is_structured: bool
) -> None:
    masks = torch.ones(40, 4, 5, dtype=torch.int64)
    masks[1, 0, 0] = number
    x = torch.rand(40, *IMAGE)
    samples = [({"a": image, "b": image} if is_structured else image, mask) for image, mask in zip(x, masks, strict=True)]
    split = from_torch(samples, options=TargetOptions(ignored=ignored))
    assert (split.targets.dtype, split.num_classes) == (dtype, classes)
    assert torch.equal(split.batch([0, 1])[1].long(), masks[:2])


def test_masks_of_bytes_have_all_their_classes_where_a_negative_number_is_left_out() -> None:
    masks = torch.tensor([156, 255, 0, 1], dtype=torch.uint8)[:, None, None].expand(4, 4, 5)
    for ignored in (-100, -1):
        split = from_torch((torch.rand(4, *IMAGE), masks), options=TargetOptions(ignored=ignored))
        assert (split.targets.num_classes, split.targets.dtype) == (256, torch.int64)
        kept = split.batch([0, 1, 2, 3])[1]
        assert torch.equal(kept, masks.long())
        assert Classification(split.targets).count(kept) == masks.numel()


def test_masks_of_two_types_that_bytes_do_not_hold_are_refused() -> None:
    small = torch.zeros(4, 5, dtype=torch.uint8)
    masks = [small, torch.full((4, 5), 300), *[small] * 38]
    with pytest.raises(DataError, match=r"^sample 1 of mine has a mask with classes beyond 0 to 255, and others are bytes; give"):
        from_torch([(torch.zeros(IMAGE), mask) for mask in masks], where="mine")
    large = [(torch.zeros(IMAGE), mask.long()) for mask in masks]
    assert from_torch(large, num_classes=301).targets.dtype == torch.int64
    assert from_torch(large, num_classes=3).targets.dtype == torch.uint8


@pytest.mark.parametrize("task", ["auto", "own"])
@pytest.mark.parametrize("is_structured", [False, True])
def test_masks_may_be_images_with_a_palette(task: Any, is_structured: bool) -> None:
    mask = Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5) % 3)
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    x = torch.zeros(IMAGE)
    split = from_torch([({"a": x, "b": x} if is_structured else x, mask)] * 2, options=TargetOptions(task))
    assert split.batch([1])[1][0].tolist() == np.asarray(mask).tolist()


def test_a_target_of_another_shape_beside_several_tensors_is_named() -> None:
    x = {"a": torch.zeros(3), "b": torch.zeros(3)}
    with pytest.raises(
        DataError, match=r"^sample 1 of mine has labels of shape \(3,\), others of \(2,\); give all samples labels"
    ):
        from_torch([(x, torch.rand(2)), (x, torch.rand(3))], where="mine").batch([1])


@pytest.mark.parametrize("resize", [None, Resize(4, 5, "crop")])
@pytest.mark.parametrize("of_pairs", [False, True])
def test_masks_of_unsigned_numbers_are_taken(of_pairs: bool, resize: Resize | None) -> None:
    masks, x = np.full((2, 4, 5), 300, dtype=np.uint16), np.zeros((2, *IMAGE), dtype=np.float32)
    split = from_torch(list(zip(x, masks, strict=True)) if of_pairs else (x, masks), resize=resize)
    assert (split.targets.dtype, split.num_classes) == (torch.int64, 301)
    assert split.batch([1])[1].tolist() == masks[1:].tolist()


@pytest.mark.parametrize("is_structured", [False, True])
@pytest.mark.parametrize(
    ("task", "usual", "other", "message"),
    [
        (
            "auto",
            [1.0, 0.0, 1.0],
            [0.0, 3.7, 0.0],
            r"its target holds 3\.7, and others are 0 and 1 alone; mend it, or give --task",
        ),
        ("multilabel", [1, 0, 1], [0, -1, 0], r"its target holds -1, and others are 0 and 1 alone; mend it, or give --task regr"),
        ("auto", [1.0, 0.0, 1.0], [0.0, math.nan, 0.0], r"its target holds nan, and others are 0 and 1 alone"),
        (
            "classification",
            [0.5, 0.5],
            [0.5, 0.4],
            r"its target sums to 0\.9, and others are probabilities, which sum to 1; mend",
        ),
        ("classification", [0.5, 0.5], [1.5, -0.5], r"its target holds 1\.5, and others are probabilities"),
    ],
)
def test_a_target_that_was_not_looked_at_is_held_against_the_kind_of_the_others(
    task: Any, usual: list[Any], other: list[Any], message: str, is_structured: bool
) -> None:
    targets = [torch.tensor(usual)] * 40
    targets[1] = torch.tensor(other)
    x = torch.zeros(3)
    split = from_torch(
        [({"a": x, "b": x} if is_structured else x, y) for y in targets], where="mine", options=TargetOptions(task)
    )
    assert split.batch([0])[1].tolist() == [usual]
    with pytest.raises(DataError, match=rf"^sample 1 of mine: {message}"):
        split.batch([0, 1])
