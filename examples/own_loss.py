"""A module and a loss of one's own: two answers from one network, learnt together."""

import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem_pnn


class HeightAndKind(nn.Module):
    """Eight measurements to a height and three scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.answers = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, 4): height, and a score for each kind."""
        return self.answers(self.body(x))


def loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:  # the mean over samples
    return F.mse_loss(outputs[:, 0], targets["height"]) + F.cross_entropy(outputs[:, 1:], targets["kind"])


def absolute_error(outputs: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, int]:  # a sum, and the count that it is over
    return (outputs[:, 0] - targets["height"]).abs().sum(), len(outputs)


x = torch.rand(600, 8, generator=torch.Generator().manual_seed(0))
data = x, {"height": x.sum(1), "kind": x[:, :3].argmax(1)}
own = {"loss": loss, "metrics": {"height_error": absolute_error}}
run = {"max_gpu_mem": "100MB", "device": "cpu", "workdir": f"{tempfile.mkdtemp()}/run"}
result = lowmem_pnn.fit(HeightAndKind, data, test=data, method="exact", epochs=6, lr=3e-3, **own, **run)
model = lowmem_pnn.load_weights(HeightAndKind(), result.weights_file)
assert abs(loss(model(x), data[1]).item() - result.scores["test"]["loss"]) < 1e-5
print(f"plain PyTorch, same weights: {result.scores['test']}")
