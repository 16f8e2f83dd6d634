"""Training in plain PyTorch, against which ours is held; the data and the networks for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lowmem_pnn.config import FitConfig, configure
from lowmem_pnn.seeds import permutation_of, seed_of
from lowmem_pnn.sources.datasets import Split, make_dataset
from lowmem_pnn.workload import split_data

Data = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def vectors(num_samples: int = 40, width: int = 12, num_classes: int = 4, seed: int = 0) -> Data:
    """Samples around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num_samples) % num_classes
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    return centres[y] + torch.randn(num_samples, width, generator=generator) / 2, y


def images(num_samples: int = 40, side: int = 8, num_classes: int = 4, seed: int = 0) -> Data:
    x, y = vectors(num_samples, 3 * side * side, num_classes, seed)
    return x.view(-1, 3, side, side), y


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))


def small_conv() -> nn.Module:
    """Four layers, with BatchNorm and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(12 * 16, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 4),
    )  # fmt: skip


def built(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def training_split(data: Data, **options: Any) -> Split:
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)
    return split_data(make_dataset(data, name="data"), config)["train"]


def loaded(build: Callable[[], nn.Module], weights_file: str | Path) -> nn.Module:
    """The user's own model with the trained weights, and nothing of ours."""
    model = build()
    model.load_state_dict(load_file(weights_file), strict=True)
    return model.eval()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def make_optimizer(config: FitConfig, partition: int, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": config.value_for("lr", partition), "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        settings["momentum"] = config.momentum
    extra = {"fused": True} if config.fused else {"foreach": False}
    return OPTIMIZERS[config.optimizer](parameters, **settings, **extra)


def train_plainly(
    model: nn.Module,
    batch_of: Callable[[np.ndarray], Data],
    order_of: Callable[[int], np.ndarray],
    config: FitConfig,
    *,
    partition: int = 0,
    loss_of: Loss = nn.functional.cross_entropy,
    micro_batch_of: Callable[[int], int] | None = None,
) -> nn.Module:
    """The loop that everybody writes, with our seeds."""
    size = config.value_for("batch_size", partition)
    optimizer = make_optimizer(config, partition, [p for p in model.parameters() if p.requires_grad])
    step = 0
    model.train()
    for epoch in range(config.value_for("epochs", partition)):
        order = order_of(epoch)
        for begin in range(0, len(order), size):
            x, y = batch_of(order[begin : begin + size])
            micro = micro_batch_of(step) if micro_batch_of else config.micro_batch or size
            for number, start in enumerate(range(0, len(y), micro)):
                torch.manual_seed(seed_of(config.seed, "forward", partition, step, number))
                part_x, part_y = x[start : start + micro].clone(), y[start : start + micro]
                loss = loss_of(model(part_x), part_y)
                if len(part_y) < len(y):
                    loss = loss * (len(part_y) / len(y))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return model


def train_by_backprop(build: Callable[[], nn.Module], data: Data, micro_batch_of: Any = None, **options: Any) -> nn.Module:
    """What `--method backprop` is to give."""
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", method="backprop", **options)
    split = training_split(data, **options)
    return train_plainly(
        built(build, config.seed),
        split.batch,
        lambda epoch: permutation_of(len(split), config.seed, "epoch", epoch),
        config,
        micro_batch_of=micro_batch_of,
    )


def train_by_pnn(build: Callable[[], nn.Sequential], starts: list[int], data: Data, **options: Any) -> nn.Module:
    """What `--method pnn` is to give for a Sequential that is cut before the modules `starts`, at activations of one tensor."""
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)
    split = training_split(data, **options)
    model = built(build, config.seed)
    assert isinstance(model, nn.Sequential)
    bounds = [0, *starts, len(model)]
    own_order = permutation_of(len(split), config.seed, "own order")
    x, y = split.batch(np.arange(len(split)))
    for partition in range(len(bounds) - 1):
        part = model[bounds[partition] : bounds[partition + 1]]
        last = partition == len(bounds) - 2
        with torch.no_grad():
            shape = part.eval()(x[:2]).shape[1:]
        codes = torch.rand(4, *shape, generator=torch.Generator().manual_seed(seed_of(config.seed, "sil", partition + 1)))
        codes = codes * config.value_for("kappa", partition if not last else 0)

        def loss_of(output: Tensor, labels: Tensor, last: bool = last, codes: Tensor = codes) -> Tensor:
            return nn.functional.cross_entropy(output, labels) if last else nn.functional.mse_loss(output, codes[labels])

        word = "samples" if partition else "epoch"
        train_plainly(
            part,
            lambda indices, x=x, y=y: (x[indices], y[indices]),  # type: ignore[misc]
            lambda epoch, word=word: permutation_of(len(split), config.seed, word, epoch),  # type: ignore[misc]
            config,
            partition=partition,
            loss_of=loss_of,
        )
        if partition == 0:
            x, y = x[own_order], y[own_order]
        size = config.value_for("batch_size", partition)
        with torch.no_grad():
            part.eval()
            x = torch.cat([part(x[begin : begin + size].clone()) for begin in range(0, len(x), size)])
    return model
