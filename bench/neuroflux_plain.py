"""Plain PyTorch under a memory limit: a process of its own, that trains a network with accumulation and, if asked, checkpointing.

    python bench/neuroflux_plain.py SETTINGS.json

SETTINGS.json has fields of `FitConfig`; checkpoints (bool): recompute every block in backward; and micro_batches: sizes. One size is
trained with for all epochs. Of several, smallest first, each takes one batch, to see what memory it needs.

The last line printed is JSON: for each size its seconds (of the last epoch) and the peak of private memory so far, above what the
process held after a small warm-up, which is the floor that `lowmem-pnn` counts its budget from.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import StepMeter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem_pnn.config.configure import configure
from lowmem_pnn.device.cpu import warm_up
from lowmem_pnn.seeds import permutation_of
from lowmem_pnn.workload import open_data


def blocks_of(model: Any) -> list[nn.Module]:
    """What a checkpoint surrounds, in a `cifar-` network: residual blocks, or a convolution with all until the next."""
    if hasattr(model, "layer1"):
        stages = (model.layer1, model.layer2, model.layer3, model.layer4)
        return [nn.Sequential(model.conv1, model.bn1, model.relu), *(block for stage in stages for block in stage)]
    children = list(model.features)
    starts = [at for at, child in enumerate(children) if not isinstance(child, nn.BatchNorm2d | nn.ReLU | nn.MaxPool2d)]
    return [nn.Sequential(*children[begin:end]) for begin, end in pairwise([*starts, len(children)])]


def main() -> None:
    """Train, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="JSON file, as `neuroflux_paper.py` writes it")
    settings: dict[str, Any] = json.loads(parser.parse_args().settings.read_text())
    checkpoints, micro_batches = settings.pop("checkpoints"), settings.pop("micro_batches")
    config = configure(max_gpu_mem="1TB", method="backprop", **settings)
    inputs = open_data(config)
    source, splits = inputs.source, inputs.splits
    warm_up(torch.device("cpu"))
    train = splits["train"]
    meter = StepMeter()
    meter.begin()
    torch.manual_seed(config.seed)
    model: Any = source.build()
    blocks, last = blocks_of(model), model.fc if hasattr(model, "fc") else model.classifier
    (lr,), (batch,) = config.lr, config.batch_sizes
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=config.momentum, fused=True)

    def forward(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpoints else block(x)
        scores: Tensor = last(x.mean((2, 3)))
        return scores

    def train_epoch(epoch: int, micro_batch: int, most: int) -> float:
        """Seconds of an epoch, or of its first samples."""
        began = time.perf_counter()
        order = permutation_of(len(train), config.seed, "epoch", epoch)[:most]
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            samples, labels = train.batch(chosen)
            for at in range(0, len(chosen), micro_batch):
                part = slice(at, at + micro_batch)
                loss = nn.functional.cross_entropy(forward(samples[part]), labels[part])
                torch.autograd.backward(loss * (len(labels[part]) / len(chosen)))
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began

    meter.lap()
    found = []
    (epochs,) = {*config.epochs} if len(micro_batches) == 1 else (1,)
    for micro_batch in micro_batches:
        for epoch in range(epochs):
            seconds = train_epoch(epoch, micro_batch, len(train) if len(micro_batches) == 1 else batch)
            meter.lap()
        found.append(
            {"micro_batch": micro_batch, "seconds": seconds, "peak_bytes": meter.figures(skip=0)["private_above_imports"]}
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
