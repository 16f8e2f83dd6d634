"""Boxes around discs: torchvision's RetinaNet up to its heads is the model, and its own losses of what they say are the loss."""

import tempfile

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

import lowmem_pnn


class Heads(nn.Module):
    """Images (N, 3, 64, 64) to scores and boxes of all anchors, which the detector makes losses or detections of."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(*[nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in ((3, 16), (16, 32), (32, 32))])
        body.out_channels = 32
        given = {"min_size": 64, "max_size": 64, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        self.detector = RetinaNet(body, 2, anchor_generator=AnchorGenerator(((12, 20),), ((1.0,),)), **given)
        for name, weight in self.detector.head.named_parameters():
            if name.endswith("0.weight"):  # torchvision's own are for 256 channels
                nn.init.kaiming_normal_(weight)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.detector.head([self.detector.backbone(images)])


def loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:  # the mean over images
    return sum(rules.compute_loss(listed(targets), outputs, [anchors] * len(targets["boxes"])).values())


def listed(targets: dict[str, Tensor]) -> list[dict[str, Tensor]]:  # as torchvision has them
    return [dict(zip(targets, values, strict=True)) for values in zip(*targets.values(), strict=True)]


rules = Heads().detector
[anchors] = rules.anchor_generator(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), [torch.zeros(1, 32, 8, 8)])
centre, size = torch.rand(120, 2, generator=torch.Generator().manual_seed(0)) * 32 + 16, torch.linspace(5, 10, 120)[:, None]
place = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="xy"), -1)
images = ((place - centre[:, None, None]).norm(dim=-1) < size[..., None]).float()[:, None].expand(-1, 3, -1, -1)
boxes = {"boxes": torch.cat([centre - size, centre + size], 1)[:, None], "labels": torch.ones(120, 1, dtype=torch.int64)}
run = {"max_gpu_mem": "150MB", "device": "cpu", "workdir": f"{tempfile.mkdtemp()}/run", "batch_size": 8, "lr": 3e-3, "epochs": 2}
result = lowmem_pnn.fit(Heads, (images, boxes), test=(images, boxes), loss=loss, method="exact", **run)
detector = lowmem_pnn.load_weights(Heads(), result.weights_file).detector
own = sum(detector(list(images), listed(boxes)).values()).item()  # in train mode: losses
assert abs(own - result.scores["test"]["loss"]) < 1e-4 * own
best = torch.stack([(found["boxes"][0]) for found in detector.eval()(list(images))])
overlap = box_iou(best, boxes["boxes"][:, 0]).diagonal().mean().item()
print(f"plain PyTorch, same weights: loss {own:.3f}, boxes overlap by {overlap:.2f}")
