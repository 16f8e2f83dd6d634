"""Figure 1 of the PNN paper: the weights of many small networks that differ in nothing but their first values."""

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Figure 1: 300 networks of 100, 50 and 10 neurons, PyTorch's initialisation, 15 epochs, batch 256; the optimizer is not told.
WIDTHS, EPOCHS, BATCH, LR, IMAGES = (784, 100, 50, 10), 15, 256, 1e-3, 10_000
TOGETHER = 25


def weights_of_many(data: str, networks: int, cache: Path) -> dict[str, Any]:
    """Train small networks on the digits among the images; the extremes of their middle layer's weights.

    All but the seed is the same in each. They are trained side by side, as batched matrix products; what is done is kept.

    Args:
        data: a name as `--data` takes it; classes 0 to 9 are digits.
        networks: how many.
        cache: folder for what is done.

    Returns:
        `largest` and `smallest`, a number for each network, and the mean test accuracy.
    """
    from lowmem_pnn.sources.datasets import find_dataset

    groups = [range(begin, min(begin + TOGETHER, networks)) for begin in range(0, networks, TOGETHER)]
    paths = {group: cache / f"networks-{group.start}-{group.stop}.json" for group in groups}
    if missing := [group for group in groups if not paths[group].exists()]:
        dataset = find_dataset(data, Path("data"), "flat")
        assert dataset.test is not None
        x, y = _digits(dataset.train)
        test = _digits(dataset.test)
        for group in missing:
            outcome = _train(group, x[:IMAGES], y[:IMAGES], *test)
            cache.mkdir(parents=True, exist_ok=True)
            paths[group].write_text(json.dumps(outcome))
    found = [json.loads(path.read_text()) for path in paths.values()]
    joined: dict[str, Any] = {name: [value for part in found for value in part[name]] for name in ("largest", "smallest")}
    return {**joined, "accuracy": statistics.mean(value for part in found for value in part["accuracy"]), "images": IMAGES}


def _train(seeds: range, x: torch.Tensor, y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor) -> dict[str, list[float]]:
    """Train a group of networks, side by side: the extremes of their middle layers, and their test accuracies in percent."""
    layers = [_initial(seeds, *shape) for shape in pairwise(WIDTHS)]
    parameters = [tensor.requires_grad_() for layer in layers for tensor in layer]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    generator = torch.Generator().manual_seed(seeds.start)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            scores = _forward(x[chosen], layers)
            loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), y[chosen].repeat(len(seeds)))
            # The mean over networks; each is to learn as if it were alone.
            torch.autograd.backward(loss * len(seeds))
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        right = (_forward(test_x, layers).argmax(-1) == test_y).float().mean(1)
    middle = layers[1][0].detach().flatten(1)
    return {
        "largest": middle.max(1).values.tolist(),
        "smallest": middle.min(1).values.tolist(),
        "accuracy": (100 * right).tolist(),
    }


def _digits(split: Any) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [split.batch(np.arange(begin, min(begin + 4096, len(split)))) for begin in range(0, len(split), 4096)]
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    return x[y < 10], y[y < 10]


def _initial(seeds: range, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (networks, inputs, outputs) and biases (networks, 1, outputs) as `nn.Linear` draws them."""
    weights, biases = [], []
    for seed in seeds:
        torch.manual_seed(1000 * outputs + seed)
        layer = torch.nn.Linear(inputs, outputs)
        weights.append(layer.weight.detach().T)
        biases.append(layer.bias.detach()[None])
    return torch.stack(weights), torch.stack(biases)


def _forward(x: torch.Tensor, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Images (B, pixels) through all networks: scores (networks, B, classes)."""
    hidden = x.expand(len(layers[0][0]), *x.shape)
    for number, (weight, bias) in enumerate(layers):
        hidden = torch.baddbmm(bias, hidden, weight)
        hidden = hidden.relu() if number < len(layers) - 1 else hidden
    return hidden
