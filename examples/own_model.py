"""A model and a data set of one's own, for the command line and from Python.

On the command line, factories are named by file and function:

    lowmem-pnn fit --max-gpu-mem 100MB --model examples/own_model.py:network --model-arg width=256 \
        --data examples/own_model.py:spirals --epochs 20 --kappa 1

From Python:

    python examples/own_model.py
"""

import math
import tempfile

import torch
from torch import nn
from torch.utils.data import TensorDataset

import lowmem_pnn


class Residual(nn.Module):
    """x + f(x): a block that is never cut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the shape (batch, width)."""
        return x + torch.relu(self.linear(self.norm(x)))


def network(width: int = 128, depth: int = 4) -> nn.Module:
    """Points of the plane to three classes."""
    return nn.Sequential(nn.Linear(2, width), *[Residual(width) for _ in range(depth)], nn.Linear(width, 3))


def spirals(samples: int = 3000) -> tuple[TensorDataset, TensorDataset]:
    """Three arms of a spiral: (train, test)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    radius = torch.rand(samples, generator=generator)
    angle = 4 * radius + labels * (2 * math.pi / 3) + 0.1 * torch.randn(samples, generator=generator)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    cut = samples * 4 // 5
    return TensorDataset(points[:cut], labels[:cut]), TensorDataset(points[cut:], labels[cut:])


def main() -> None:
    """Train with the function that builds the network, and load the weights into a plain one."""
    from safetensors.torch import load_file

    train, test = spirals()
    with tempfile.TemporaryDirectory() as folder:
        result = lowmem_pnn.fit(
            network,
            train,
            test=test,
            max_gpu_mem="100MB",
            method="backprop",
            epochs=10,
            lr=3e-3,
            device="cpu",
            workdir=f"{folder}/run",
        )
        print(result)
        model = network()
        model.load_state_dict(load_file(result.weights_file), strict=True)
    points, labels = test.tensors
    accuracy = (model.eval()(points).argmax(1) == labels).float().mean().item()
    assert result.test_accuracy is not None
    assert abs(accuracy - result.test_accuracy) < 1e-6, "plain PyTorch scores what the run reported"
    print(f"plain PyTorch, same weights: {accuracy:.1%}")


if __name__ == "__main__":
    main()
