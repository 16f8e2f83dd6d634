"""Labels for PNN that know which classes are alike, and recovery of a few hundred steps: what the PNN paper leaves open.

The paper's network on EMNIST (784-80-60-60-60-47, cut after the second hidden layer), in plain PyTorch, for many short trainings: the
left part regresses to one vector per class for 5 epochs (batch 1410, SGD 0.02), the right part learns the classes for 20 (batch 1410).
Accuracy is on a tenth of the training data. One seed each: differences of a point say nothing.

    uniform, sparse, orthogonal   as `--sil` has them
    alike (source)                orthogonal vectors mixed so that the cosines of their deviations are those of class means, by a share; the
                                  means are of a meta model's first layer (784-60-47, trained for 2 epochs), of a random layer's, or of pixels
    sparse, alike                 the fifth of the elements that are largest in such vectors are kappa, the others 0

    python bench/pnn_labels.py [--quick] [--again]
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Cache, default_emnist, emnist_in_words, markdown_table, write_results
from torch import Tensor, nn

CLASSES, WIDTH, BATCH = 47, 60, 1410
# Kind of labels, kappa, share of likeness, learning rate on the right.
LABELS: tuple[tuple[str, float, float, float], ...] = (
    ("sparse", 20, 0, 0.1),
    ("sparse, alike (meta model)", 20, 0.5, 0.1),
    ("sparse, alike (meta model)", 20, 0.8, 0.1),
    ("uniform", 10, 0, 0.02),
    ("orthogonal", 10, 0, 0.02),
    ("alike (meta model)", 10, 0.9, 0.02),
    ("alike (meta model)", 10, 0.9, 0.1),
    ("alike (meta model)", 10, 0.5, 0.1),
    ("alike (random layer)", 10, 0.5, 0.1),
    ("alike (pixels)", 10, 0.5, 0.1),
    ("uniform", 5, 0, 0.1),
    ("orthogonal", 5, 0, 0.1),
    ("alike (meta model)", 5, 0.5, 0.1),
    ("alike (random layer)", 5, 0.5, 0.1),
    ("alike (pixels)", 5, 0.5, 0.1),
)
# Who learns in the recovery, steps, learning rate; batches of 256.
RECOVERIES: tuple[tuple[str, int, float], ...] = tuple((who, steps, 0.1) for who in ("left", "all") for steps in (200, 400, 800))
END_TO_END = (200, 400)


class Data:
    """EMNIST, a tenth of its training images set apart."""

    def __init__(self, name: str) -> None:
        with np.load(name.partition(":")[2]) as arrays:
            x = torch.from_numpy(arrays["x_train"]).flatten(1).float() / 255
            y = torch.from_numpy(arrays["y_train"]).long()
        held = len(y) // 10 + 1
        self.x, self.y, self.x_val, self.y_val = x[held:], y[held:], x[:held], y[:held]


def network(seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """The paper's, left and right of its cut."""
    torch.manual_seed(seed)
    left = nn.Sequential(nn.Linear(784, 80), nn.ReLU(), nn.Linear(80, WIDTH), nn.ReLU())
    right = nn.Sequential(nn.Linear(WIDTH, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, CLASSES))
    return left, right


def learn(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    samples: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    shuffle: bool,
) -> None:
    """SGD with momentum 0.9 and a cosine schedule; `loss` takes numbers of samples."""
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    generator, step = torch.Generator().manual_seed(seed), 0
    while step < steps:
        order = torch.randperm(samples, generator=generator) if shuffle else torch.arange(samples)
        for part in order.split(batch):
            if step == steps:
                break
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss(part).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1


def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """In percent."""
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def cosines_of_classes(data: Data, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """Cosines (classes, classes) of the means of a layer's outputs, each less the mean of all."""
    x, y = data.x[:40000], data.y[:40000]
    with torch.no_grad():
        outputs = layer(x)
    means = torch.stack([outputs[y == number].mean(0) for number in range(CLASSES)])
    means = means - means.mean(0, keepdim=True)
    means = means / means.norm(dim=1, keepdim=True)
    return means @ means.T


def likeness(data: Data, kind: str, seed: int) -> Tensor:
    """Which classes are alike, by the source that a kind of labels names."""
    if "pixels" in kind:
        return cosines_of_classes(data, lambda x: x)
    if "random" in kind:
        torch.manual_seed(seed + 5)
        return cosines_of_classes(data, nn.Sequential(nn.Linear(784, 256), nn.ReLU()))
    torch.manual_seed(seed + 6)
    meta = nn.Sequential(nn.Linear(784, 60), nn.ReLU(), nn.Linear(60, CLASSES))
    steps = 2 * math.ceil(len(data.y) / 256)
    learn(
        meta.parameters(),
        lambda part: nn.functional.cross_entropy(meta(data.x[part]), data.y[part]),
        len(data.y),
        steps,
        256,
        0.1,
        seed,
        True,
    )
    return cosines_of_classes(data, meta[:2])


def vectors_with(cosines: Tensor, seed: int) -> Tensor:
    """Vectors (classes, width) whose products are given ones."""
    values, vectors = torch.linalg.eigh(cosines)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    drawn = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(seed))
    return root @ torch.linalg.qr(drawn).Q.T


def labels(data: Data, kind: str, kappa: float, share: float, seed: int) -> Tensor:
    """Class vectors (classes, width); dense ones with the mean and deviation of kappa * U(0, 1)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    if kind == "uniform":
        return kappa * torch.rand(CLASSES, WIDTH, generator=generator)
    if kind == "sparse":
        return kappa * (torch.rand(CLASSES, WIDTH, generator=generator) < 0.2).float()
    wanted = torch.eye(CLASSES) if not share else (1 - share) * torch.eye(CLASSES) + share * likeness(data, kind, seed)
    vectors = vectors_with(wanted, seed)
    if kind.startswith("sparse"):
        return kappa * (vectors > torch.quantile(vectors, 0.8, dim=1, keepdim=True)).float()
    vectors = vectors - vectors.mean(0, keepdim=True)
    return kappa * (0.5 + vectors / vectors.std() / math.sqrt(12))


def trained(
    data: Data, kind: str, kappa: float, share: float, lr: float, seed: int, epochs: int, batch: int
) -> tuple[nn.Sequential, nn.Sequential, float]:
    """Both parts, one after the other, and the accuracy that they come to."""
    left, right = network(seed)
    wanted, number = labels(data, kind, kappa, share, seed), len(data.y)
    steps = 5 * math.ceil(number / BATCH)

    def distance(part: Tensor) -> Tensor:
        return nn.functional.mse_loss(left(data.x[part]), wanted[data.y[part]])

    learn(left.parameters(), distance, number, steps, BATCH, 0.02, seed, shuffle=False)
    with torch.no_grad():
        inputs, inputs_val = left(data.x), left(data.x_val)
    steps = epochs * math.ceil(number / batch)
    learn(
        right.parameters(),
        lambda part: nn.functional.cross_entropy(right(inputs[part]), data.y[part]),
        number,
        steps,
        batch,
        lr,
        seed,
        True,
    )
    return left, right, accuracy(right, inputs_val, data.y_val)


def end_to_end(data: Data, model: nn.Module, who: Iterable[nn.Parameter], steps: int, lr: float, seed: int) -> float:
    """Accuracy after steps of ordinary training of some parameters."""
    learn(
        who, lambda part: nn.functional.cross_entropy(model(data.x[part]), data.y[part]), len(data.y), steps, 256, lr, seed, True
    )
    return accuracy(model, data.x_val, data.y_val)


def recovered(data: Data, seed: int) -> dict[str, Any]:
    """Accuracy of sparse labels before recoveries and after each of them."""
    left, right, before = trained(data, "sparse", 20, 0, 0.1, seed, 40, 256)
    after = {}
    for who, steps, lr in RECOVERIES:
        parts = copy.deepcopy(nn.Sequential(left, right))
        learning = parts.parameters() if who == "all" else parts[0].parameters()
        after[f"{who}, {steps} steps"] = end_to_end(data, parts, learning, steps, lr, seed + 9)
    return {"before": before, "after": after}


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four kinds of labels alone")
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    name = default_emnist()
    if not name.startswith("npz:"):
        parser.error(
            "put emnist47.npz, or the official split with the same names of arrays, into the folder that LOWMEM_PNN_DATA names"
        )
    torch.set_num_threads(1)
    data, cache = Data(name), Cache("pnn_labels", arguments.again)
    kinds = LABELS[:4] if arguments.quick else LABELS
    found = []
    for kind, kappa, share, lr in kinds:
        key = {"labels": kind, "kappa": kappa, "share": share, "lr": lr, "seed": 0, "data": Path(name).name}
        figures = cache.get(key, lambda one=(kind, kappa, share, lr): {"accuracy": trained(data, *one, 0, 20, BATCH)[2]})  # type: ignore[misc]
        found.append({**key, **figures})
    rows = [
        [one["labels"], f"{one['kappa']:g}", f"{one['share']:g}", f"{one['lr']:g}", f"{one['accuracy']:.1f}"] for one in found
    ]
    parts = [emnist_in_words(name), (__doc__ or "").split("\n\n")[1]]
    parts.append(markdown_table(["labels", "kappa", "share of likeness", "lr on the right", "validation accuracy %"], rows))
    result: dict[str, Any] = {"labels": found}
    if not arguments.quick:
        recovery = cache.get({"recovery": "sparse", "seed": 0, "data": Path(name).name}, lambda: recovered(data, 0))
        rows = [["none", f"{recovery['before']:.1f}"], *([who, f"{after:.1f}"] for who, after in recovery["after"].items())]
        for steps in END_TO_END:
            model = nn.Sequential(*network(0))
            key = {"end to end": steps, "seed": 0, "data": Path(name).name}
            figures = cache.get(
                key,
                lambda model=model, steps=steps: {"accuracy": end_to_end(data, model, model.parameters(), steps, 0.2, 0)},  # type: ignore[misc]
            )
            rows.append([f"no PNN: all from the beginning, {steps} steps, lr 0.2", f"{figures['accuracy']:.1f}"])
        parts.append(
            "Sparse labels, kappa 20, 40 epochs on the right in batches of 256; then recovery in batches of 256, lr 0.1:"
        )
        parts.append(markdown_table(["recovery", "validation accuracy %"], rows))
        result["recovery"] = recovery
    suffix = "_quick" if arguments.quick else ""
    title = "Labels for PNN that know the classes, and short recoveries"
    write_results(f"pnn_labels{suffix}", title, "\n\n".join(parts), result, machines=cache.machines)


if __name__ == "__main__":
    main()
