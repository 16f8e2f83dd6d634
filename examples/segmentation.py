"""A class for each pixel: a small U-Net finds discs in noise; some pixels (255) are left out of the loss."""

import tempfile

import torch
from torch import Tensor, nn

import lowmem_pnn


class UNet(nn.Module):
    """Images (N, 1, 32, 32) to scores (N, 2, 32, 32), with a connection across."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.bottom = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2))
        self.up = nn.Sequential(nn.Conv2d(3 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        return self.up(torch.cat([fine, self.bottom(fine)], 1))


def discs(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 32, 32), and masks (N, 32, 32) of 0, 1, and 255 at the edges."""
    generator = torch.Generator().manual_seed(seed)
    row, column, size = torch.rand(3, samples, 1, 1, generator=generator)
    place = torch.arange(32.0)
    distance = ((place[:, None] - 32 * row) ** 2 + (place - 32 * column) ** 2).sqrt() - 4 - 6 * size
    mask = (distance < 0).to(torch.uint8).masked_fill(distance.abs() < 0.5, 255)
    return (distance < 0).float()[:, None] + 0.7 * torch.randn(samples, 1, 32, 32, generator=generator), mask


train, test = discs(200, seed=0), discs(100, seed=1)
run = {"max_gpu_mem": "100MB", "device": "cpu", "workdir": f"{tempfile.mkdtemp()}/run"}
result = lowmem_pnn.fit(UNet, train, test=test, method="exact", epochs=5, lr=3e-3, **run)
predicted, counted = lowmem_pnn.load_weights(UNet(), result.weights_file)(test[0]).argmax(1), test[1] != 255
assert abs((predicted == test[1])[counted].float().mean().item() - result.scores["test"]["accuracy"]) < 1e-5
print(f"plain PyTorch, same weights: mean IoU {result.scores['test']['miou']:.3f}")
