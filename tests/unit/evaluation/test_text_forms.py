"""How texts are handed to models: their last tokens, a mask, positions, a source and its target, and where the next token is scored."""

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from lowmem_pnn.evaluation.text_forms import Continuation, PairForm, RowForm, source_context_of
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.workload.data_form import DataForm

IDS = TensorSpec((4,), torch.int64)
TOKENS = Targets("tokens", 9, (4,))
SCORES = TensorSpec((4, 9), torch.float32)


def structure(*names: str) -> pytree.TreeSpec:
    return pytree.tree_structure(dict.fromkeys(names, 0))


def test_rows_are_padded_at_their_end_and_cut_at_their_beginning() -> None:
    names = ("input_ids", "attention_mask", "position_ids")
    form = RowForm.of([IDS] * 3, structure(*names), TOKENS, SCORES)
    assert form == RowForm(names, 4, 9)
    (ids, mask, positions), wanted = form.rows([Continuation([5], [6]), Continuation([1, 2, 3, 4, 5, 6])])
    assert ids.tolist() == [[5, 6, 0, 0], [3, 4, 5, 6]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert wanted.tolist() == [[-1, 0, -1, -1], [-1, -1, -1, 1]]


def test_scores_may_be_of_more_tokens_than_the_data_has() -> None:
    form = RowForm.of([IDS], None, TOKENS, TensorSpec((4, 16), torch.float32))
    assert form == RowForm(("input_ids",), 4, 16)


def test_tensors_come_in_the_order_of_the_samples() -> None:
    form = RowForm.of([IDS, IDS], structure("attention_mask", "input_ids"), TOKENS, SCORES)
    assert form is not None
    assert form.names == ("attention_mask", "input_ids")
    (mask, ids), _ = form.rows([Continuation([7])])
    assert (mask.tolist(), ids.tolist()) == ([[1, 0, 0, 0]], [[7, 0, 0, 0]])


@pytest.mark.parametrize(
    ("inputs", "named", "targets", "outputs"),
    [
        ([IDS], None, Targets("classes", 9), TensorSpec((9,), torch.float32)),
        ([IDS], None, TOKENS, TensorSpec((4, 8), torch.float32)),
        ([TensorSpec((4,), torch.float32)], None, TOKENS, SCORES),
        ([IDS, IDS], ("input_ids", "segments"), TOKENS, SCORES),
        ([IDS, TensorSpec((2,), torch.int64)], ("input_ids", "attention_mask"), TOKENS, SCORES),
    ],
)
def test_models_of_other_samples_go_on_with_no_text(inputs, named, targets, outputs) -> None:
    assert RowForm.of(inputs, structure(*named) if named else None, targets, outputs) is None


@pytest.mark.parametrize("given", [{"a": (0, 0), "b": 0}, {"a": [0], "b": {"c": 0}}])
def test_samples_of_nested_tensors_are_no_texts(given: Any) -> None:
    structure = pytree.tree_structure(given)
    form = DataForm((IDS,) * structure.num_leaves, structure, TOKENS, ())
    assert source_context_of(form) is None


def test_sources_are_cut_at_their_end_and_targets_begin_with_their_start() -> None:
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    target = TensorSpec((3,), torch.int64)
    targets, scores = Targets("tokens", 9, (3,)), TensorSpec((3, 9), torch.float32)
    assert PairForm.of([IDS, IDS, target], structure(*names), targets, scores, None, None) is None
    form = PairForm.of([IDS, IDS, target], structure(*names), targets, scores, 8, 1)
    assert form == PairForm(names, 4, 3, 9, 8, 1)
    (ids, mask, written), wanted = form.rows([Continuation([5, 6]), Continuation([2, 3, 4, 5, 6], [7, 3])])
    assert ids.tolist() == [[5, 6, 1, 1], [2, 3, 4, 5]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert written.tolist() == [[8, 1, 1], [8, 7, 3]]
    assert wanted.tolist() == [[0, -1, -1], [-1, -1, 1]]
    assert form.most_tokens == 3
