"""Fine-tuning a timm network on a folder of images: frozen up to its second stage, a new head for the folder's classes.

`weights="default"` downloads timm's own; here, without a download, a first run on other images leaves the weights to begin with.
"""

import tempfile
from pathlib import Path

import timm
import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor
from torchvision.utils import save_image

import lowmem_pnn

NETWORK, FOLDER, random = "test_resnet", Path(tempfile.mkdtemp()), torch.Generator().manual_seed(0)


def stripes(name: str, degrees: list[int], count: int) -> str:
    """Write a folder of images for each of some angles: noisy stripes."""
    row, column = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    for number in range(count * len(degrees)):
        angle, phase = degrees[number % len(degrees)], 6 * torch.rand((), generator=random)
        wave = (row * torch.tensor(angle).deg2rad().cos() + column * torch.tensor(angle).deg2rad().sin() + phase).sin()
        image = 0.5 + 0.3 * wave + 0.1 * torch.randn(3, 32, 32, generator=random)
        (FOLDER / name / f"{angle}").mkdir(parents=True, exist_ok=True)
        save_image(image, FOLDER / name / f"{angle}" / f"{number}.png")
    return f"imagefolder:{FOLDER / name}"


run = {"max_gpu_mem": "150MB", "device": "cpu", "method": "exact", "epochs": 2, "lr": 3e-3}
first = lowmem_pnn.fit(f"timm:{NETWORK}", stripes("first", [0, 30, 60, 90], 12), workdir=FOLDER / "run-1", **run)
run |= {"weights": first.weights_file, "freeze": "conv1.*,bn1.*,layer1.*,layer2.*", "freeze_norm": True}
train, test = stripes("train", [15, 45, 75], 12), stripes("test", [15, 45, 75], 8)
result = lowmem_pnn.fit(f"timm:{NETWORK}", train, test=test, workdir=FOLDER / "run-2", **run)
model = lowmem_pnn.load_weights(timm.create_model(NETWORK, num_classes=3), result.weights_file).eval()
right = [int(model(image[None]).argmax()) == label for image, label in ImageFolder(FOLDER / "test", ToTensor())]
assert abs(sum(right) / len(right) - result.scores["test"]["accuracy"]) < 1e-6
print(f"plain PyTorch, same weights: {sum(right)} of {len(right)} right")
