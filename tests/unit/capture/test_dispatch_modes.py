"""Tensors that depend on sizes and constants alone: a forward may decide by their values, on every training device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.model.precision import Precision


class Works(nn.Module):
    """Does what it is given between two layers."""

    def __init__(self, work: Callable[["Works", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.recurrent = nn.LSTM(6, 6)
        self.table = torch.arange(6.0)
        self.work = work

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(torch.relu(self.second(self.work(self, torch.relu(self.first(x))))))
        return scores


def by_all_of_a_mask(model: Works, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[0], 6, device=x.device, dtype=torch.bool)
    return x if mask.all() else x * mask


def by_a_number(model: Works, x: Tensor) -> Tensor:
    return x * torch.linspace(0, 0.5, 5, device=x.device)[2].item()


def rows_of_a_constant(model: Works, x: Tensor) -> Tensor:
    kept = torch.tensor([1, 1, 1, 0, 1, 1], device=x.device).nonzero().flatten()
    return nn.functional.pad(x[:, kept], (0, 1))


def products_and_masks(model: Works, x: Tensor) -> Tensor:
    mask = torch.ones(6, 6, device=x.device, dtype=torch.bool).tril()
    eye = torch.eye(6, device=x.device)
    x = (eye @ (x @ eye).T).T
    return x.unsqueeze(1).expand(-1, 6, -1).masked_fill(~mask, 0).amax(1)


def a_product_of_constants(model: Works, x: Tensor) -> Tensor:
    eye = torch.eye(6, device=x.device)
    return x + (eye @ eye)[0]


def a_table(model: Works, x: Tensor) -> Tensor:
    return x + model.table.to(x.device) + torch.zeros(6, device=model.table.device)


def a_state(model: Works, x: Tensor) -> Tensor:
    """Of zeros, whose device is looked at before any mode is asked."""
    zeros = torch.zeros(1, 6, device=x.device, dtype=x.dtype)
    output: Tensor = model.recurrent(x, (zeros, zeros))[0]
    return output


@pytest.mark.parametrize(
    "work",
    [by_all_of_a_mask, by_a_number, rows_of_a_constant, products_and_masks, a_product_of_constants, a_table, a_state],
    ids=lambda work: work.__name__,
)
def test_a_model_is_cut_for_a_gpu_as_for_the_cpu(
    work: Callable[[Works, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mixed precision, for which fake tensors are on the training device, and autocast would be off where there is none."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)

    def cut(device: str) -> Chain:
        return capture(Works(work), TensorSpec((6,), torch.float32), Precision("bf16", device))

    expected, found = cut("cpu"), cut("cuda")
    assert len(expected.layers) >= 3
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    assert found.boundaries == expected.boundaries
