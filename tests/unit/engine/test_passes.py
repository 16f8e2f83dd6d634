"""Passes: a last layer in chunks gives what it gives as a whole, and only layers that treat rows alike are cut so."""

import pytest
import torch
from torch import Tensor, nn

from helpers.tasks import class_objective
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.engine.passes import _weighted_loss, backward_from_loss, outputs_in_chunks
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.model.layer import is_rowwise


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.relu(self.hidden(self.embedding(x))))
        return scores


@pytest.fixture
def chain() -> Chain:
    torch.manual_seed(3)
    return capture(_Tokens(), TensorSpec((5,), torch.int64))


def gradients(chain: Chain, chunk_rows: int | None, share: float, smoothing: float) -> tuple[float, dict[str, Tensor]]:
    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1))
    parameters = {name: tensor for layer in chain.layers for name, tensor in layer.parameters().items()}
    for parameter in parameters.values():
        parameter.grad = None
    loss = backward_from_loss(chain.layers, (tokens[:, :-1],), tokens[:, 1:], class_objective(smoothing), share, chunk_rows)
    return loss, {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 19, 20, 64])
@pytest.mark.parametrize(("share", "smoothing"), [(1.0, 0.0), (0.25, 0.1)])
def test_chunks_come_to_the_same_loss_and_gradients(chain: Chain, chunk_rows: int, share: float, smoothing: float) -> None:
    loss, whole = gradients(chain, None, share, smoothing)
    found_loss, found = gradients(chain, chunk_rows, share, smoothing)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    if chunk_rows >= 20:  # rows of the micro-batch: nothing is cut
        assert found_loss == loss


def test_outputs_in_chunks_are_all_rows_once(chain: Chain) -> None:
    tokens = torch.randint(0, 11, (3, 5))
    labels = torch.arange(15).view(3, 5)
    with torch.no_grad():
        found = outputs_in_chunks(chain.layers, (tokens,), labels, 4, lambda outputs, labels: (outputs[0], labels))
        whole = chain(tokens)
    assert [len(rows) for rows, _ in found] == [4, 4, 4, 3]
    torch.testing.assert_close(torch.cat([rows for rows, _ in found]), whole.flatten(0, 1))
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(15))


def test_only_one_linear_layer_works_by_rows() -> None:
    def last(model: nn.Module) -> bool:
        return is_rowwise(capture(model, TensorSpec((4,), torch.float32)).layers[-1])

    assert last(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    assert not last(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.BatchNorm1d(3)))
    assert not last(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Softmax(0)))


def test_a_micro_batch_of_which_nothing_counts_is_no_loss_whatever_its_outputs_are() -> None:
    scores = torch.zeros(2, 3, requires_grad=True)
    masked = scores.masked_fill(torch.tensor([True, False, False]), -torch.inf)
    loss = _weighted_loss(class_objective(), (masked,), torch.full((2,), -100), 0.0)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.zeros(2, 3))
