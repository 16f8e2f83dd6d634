"""Several labels a sample: which of four tones sound at once in a short recording."""

import math
import tempfile

import torch
from torch import Tensor, nn

import lowmem_pnn

TONES = torch.tensor([3.0, 5.0, 8.0, 13.0])


def recordings(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return sounds (N, 1, 128) with noise, and for each tone whether it sounds (N, 4)."""
    generator = torch.Generator().manual_seed(seed)
    sounds = (torch.rand(samples, 4, generator=generator) < 0.4).float()
    time = torch.linspace(0, 2 * math.pi, 128)
    phases = 2 * math.pi * torch.rand(samples, 4, 1, generator=generator)
    waves = torch.sin(TONES[:, None] * time + phases)
    return ((sounds[..., None] * waves).sum(1, keepdim=True) + 0.3 * torch.randn(samples, 1, 128, generator=generator)), sounds


def network() -> nn.Module:
    """Sounds (N, 1, 128) to a logit for each tone."""
    first, second = nn.Conv1d(1, 32, 15, 2, 7), nn.Conv1d(32, 64, 15, 2, 7)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 4))


train, test = recordings(1000, seed=0), recordings(300, seed=1)
run = {"max_gpu_mem": "100MB", "device": "cpu", "workdir": f"{tempfile.mkdtemp()}/run"}
result = lowmem_pnn.fit(
    network, train, test=test, method="exact", class_weights="balanced", epochs=5, lr=3e-3, early_stop=3, **run
)
model = lowmem_pnn.load_weights(network(), result.weights_file).eval()
right = ((model(test[0]) > 0) == (test[1] > 0)).float().mean().item()
assert abs(right - result.scores["test"]["accuracy"]) < 1e-6
print(f"plain PyTorch, same weights: {right:.1%} of labels, average precision {result.scores['test']['average_precision']:.3f}")
