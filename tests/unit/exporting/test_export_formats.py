"""Formats that a trained model is exported in: what is shown to the model and to its file to compare them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.exporting import export_formats
from lowmem_pnn.exporting.export_formats import largest_difference
from lowmem_pnn.model.chain import TensorSpec

TOKENS = (TensorSpec((3,), torch.int64), TensorSpec((3,), torch.int64))
LARGEST = torch.finfo(torch.float64).max


class MeanOfShown(nn.Module):
    """Numbers that are shown, on average, to the power of two."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return 2.0 ** ((ids * mask).sum(1) / mask.sum(1))


def test_masks_hide_nothing_from_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MeanOfShown()
    monkeypatch.setattr(export_formats, "_reader", lambda *_: lambda ids, mask: model(ids, mask) + 0.5)
    assert largest_difference(model, TOKENS, Path("model.pt2"), "pt2", ["input_ids", "attention_mask"]) == 0.5


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([torch.nan, 1.0], [torch.nan, 1.5], 0.5),
        ([torch.inf, 1.0], [torch.inf, 1.0], 0.0),
        ([torch.nan], [1.0], LARGEST),
        ([torch.inf], [-torch.inf], LARGEST),
        ([], [], 0.0),
    ],
)
def test_a_difference_is_a_number(one: Any, other: Any, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_formats, "_reader", lambda *_: lambda x: torch.tensor(other))
    given: Any = lambda x: torch.tensor(one)  # noqa: E731
    assert largest_difference(given, TOKENS[:1], Path("model.pt2"), "pt2", ["x"]) == expected
