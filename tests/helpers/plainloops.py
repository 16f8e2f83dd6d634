"""Training in plain PyTorch, against which ours is held; the data and the networks for it."""

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.small_networks import Data
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.methods.sil import draw_class_vectors
from lowmem_pnn.optim.lr_schedules import lr_factor
from lowmem_pnn.seeds import permutation_of, seed_of
from lowmem_pnn.sources.datasets import make_dataset
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.workload.inputs import split_data

Loss = Callable[[Tensor, Tensor], Tensor]
# Samples, labels and the share of the batch that they are; backward from their loss, which is returned.
Backward = Callable[[Tensor, Tensor, float], float]

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def built(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def training_split(data: Data, **options: Any) -> Split:
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)
    return split_data(make_dataset(data, name="data"), config)[1]["train"]


def loaded(build: Callable[[], nn.Module], weights_file: str | Path) -> nn.Module:
    """The user's own model with the trained weights, and nothing of ours."""
    model = build()
    model.load_state_dict(load_file(weights_file), strict=True)
    return model.eval()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def step_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that tell of a step, and not of an epoch."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" in line]


def make_optimizer(config: FitConfig, partition: int, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's own, over what learns of a partition's parameters."""
    name = config.value_for("optimizer", partition)
    settings: dict[str, Any] = {"lr": config.value_for("lr", partition), "weight_decay": config.weight_decay}
    if name == "sgd":
        settings["momentum"] = config.momentum
    extra = {"fused": True} if config.fused else {"foreach": False}
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = OPTIMIZERS[name](learning, **settings, **extra)
    return optimizer


def cross_entropy(config: FitConfig, output: Tensor, labels: Tensor) -> Tensor:
    """The mean over samples, or over tokens: output (B, classes) and labels (B,), or (B, T, classes) and (B, T)."""
    return nn.functional.cross_entropy(output.float().flatten(0, -2), labels.flatten(), label_smoothing=config.label_smoothing)


def scaler_for(config: FitConfig) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=config.precision == "fp16")


def backward_of(
    model: nn.Module, loss_of: Loss, config: FitConfig | None = None, scaler: torch.amp.GradScaler | None = None
) -> Backward:
    """Forward in the precision that is asked for, and back from the scaled loss."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision if config else "fp32")

    def backward(x: Tensor, y: Tensor, share: float) -> float:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            output = model(x)
        loss = loss_of(output, y)
        if share != 1.0:
            loss = loss * share
        (scaler.scale(loss) if scaler else loss).backward()
        return float(loss.detach())

    return backward


def backward_in_chunks(model: nn.Module, head: nn.Linear, config: FitConfig, rows: int) -> Backward:
    """The model's last layer and the loss, for so many rows at a time where there are more."""
    at_once = backward_of(model, functools.partial(cross_entropy, config))

    def backward(x: Tensor, y: Tensor, share: float) -> float:
        if y.numel() <= rows:
            return at_once(x, y, share)
        given: list[Tensor] = []
        with head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0])):
            model(x)
        [body_output] = given
        inputs = body_output.detach().requires_grad_()
        flat, labels = inputs.flatten(0, -2), y.flatten()
        total = 0.0
        for begin in range(0, len(labels), rows):
            part = slice(begin, begin + rows)
            scores = head(flat[part])
            loss = nn.functional.cross_entropy(scores, labels[part], reduction="sum", label_smoothing=config.label_smoothing)
            loss = loss / len(labels)
            if share != 1.0:
                loss = loss * share
            loss.backward()
            total += float(loss.detach())
        body_output.backward(inputs.grad)
        return total

    return backward


def train_epochs(
    model: nn.Module,
    backward: Backward,
    batch_of: Callable[[np.ndarray], Data],
    order_of: Callable[[int], np.ndarray],
    config: FitConfig,
    *,
    groups: dict[int, list[nn.Parameter]],
    epochs: int,
    batch_size: int,
    place: tuple[str, int],
    micro_batch_of: Callable[[int], int] | None = None,
    smallest: int = 1,
    scaler: torch.amp.GradScaler | None = None,
) -> float:
    """The loop that everybody writes, with our seeds.

    Args:
        model: in its mode.
        backward: of a micro-batch.
        batch_of: samples by number.
        order_of: an epoch's.
        config: optimizer, rates, clipping.
        groups: for each partition that learns, its parameters.
        epochs: passes over the samples.
        batch_size: samples a step.
        place: words that the seed of every micro-batch's forward has, before step and number.
        micro_batch_of: samples at once, in each step; None for what the configuration says.
        smallest: fewer samples than this join the micro-batch before them; a batch of fewer is left out.
        scaler: of the loss, which `backward` has applied.

    Returns:
        The mean loss over the last epoch's samples.
    """
    optimizers = [make_optimizer(config, partition, parameters) for partition, parameters in groups.items()]
    rates = [config.value_for("lr", partition) for partition in groups]
    total_steps = epochs * math.ceil(len(order_of(0)) / batch_size)
    step = 0
    for epoch in range(epochs):
        order = order_of(epoch)
        loss_sum, num_samples = 0.0, 0
        for begin in range(0, len(order), batch_size):
            x, y = batch_of(order[begin : begin + batch_size])
            if len(y) >= smallest:
                micro = micro_batch_of(step) if micro_batch_of else config.micro_batch or batch_size
                starts = list(range(0, len(y), micro))
                if len(y) - starts[-1] < smallest:
                    starts.pop()
                loss = 0.0
                for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(y)], strict=True)):
                    torch.manual_seed(seed_of(config.seed, *place, step, number))
                    loss += backward(x[start:stop].clone(), y[start:stop], (stop - start) / len(y))
                if scaler is not None:
                    for optimizer in optimizers:
                        scaler.unscale_(optimizer)
                if config.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
                for optimizer, rate in zip(optimizers, rates, strict=True):
                    [group] = optimizer.param_groups
                    group["lr"] = rate * lr_factor(config.lr_schedule, step, total_steps, config.warmup_steps)
                    if scaler is None:
                        optimizer.step()
                    else:
                        scaler.step(optimizer)
                    optimizer.zero_grad()
                if scaler is not None:
                    scaler.update()
                loss_sum += loss * len(y)
                num_samples += len(y)
            step += 1
    return loss_sum / num_samples


def train_plainly(
    model: nn.Module,
    batch_of: Callable[[np.ndarray], Data],
    order_of: Callable[[int], np.ndarray],
    config: FitConfig,
    *,
    partition: int = 0,
    loss_of: Loss | None = None,
    micro_batch_of: Callable[[int], int] | None = None,
    epochs: int | None = None,
) -> nn.Module:
    """A model, or one partition, trained against a loss of its own."""
    train_epochs(
        model.train(),
        backward_of(model, loss_of or functools.partial(cross_entropy, config)),
        batch_of,
        order_of,
        config,
        groups={partition: list(model.parameters())},
        epochs=epochs or config.value_for("epochs", partition),
        batch_size=config.value_for("batch_size", partition),
        place=("forward", partition),
        micro_batch_of=micro_batch_of,
    )
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


@dataclass
class Trained:
    """A model, and the mean loss over its last epoch's samples."""

    model: nn.Module
    train_loss: float


def train_by_exact(
    build: Callable[[], nn.Module],
    data: Data,
    *,
    parts_of: Callable[[Any], list[list[nn.Parameter]]] = lambda model: [list(model.parameters())],
    head_of: Callable[[Any], nn.Linear] | None = None,
    micro_batch_of: Callable[[int], int] | None = None,
    smallest: int = 1,
    **options: Any,
) -> Trained:
    """What `--method exact` is to give, however it is cut.

    Args:
        build: makes the model.
        data: samples and labels.
        parts_of: the parameters of each partition; needed where each has its own learning rate.
        head_of: the last layer, which `loss_chunk` needs.
        micro_batch_of: samples at once, in each step; None for what the options say.
        smallest: samples that the modules accept at least.
        **options: of the run.
    """
    options = {"method": "exact", **options}
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)
    split = training_split(data, **options)
    model = built(build, config.seed).train()
    scaler = scaler_for(config)
    backward = backward_of(model, functools.partial(cross_entropy, config), config, scaler)
    if config.loss_chunk is not None:
        assert head_of is not None
        backward = backward_in_chunks(model, head_of(model), config, config.loss_chunk)
    train_loss = train_epochs(
        model,
        backward,
        split.batch,
        lambda epoch: (
            permutation_of(len(split), config.seed, "epoch", epoch)
            if config.shuffle[0]
            else permutation_of(len(split), config.seed, "own order")
        ),
        config,
        groups=dict(enumerate(parts_of(model))),
        epochs=config.value_for("epochs", 0),
        batch_size=config.value_for("batch_size", 0),
        place=("forward", 0),
        micro_batch_of=micro_batch_of,
        smallest=smallest,
        scaler=scaler,
    )
    return Trained(model, train_loss)


def train_by_pnn(
    build: Callable[[], nn.Sequential],
    starts: list[int],
    data: Data,
    *,
    kept: Callable[[Tensor], Tensor] = lambda outputs: outputs,
    **options: Any,
) -> nn.Module:
    """What `--method pnn` is to give for a Sequential that is cut before the modules `starts`, at activations of one tensor.

    Args:
        build: makes the model.
        starts: modules that start a partition.
        data: samples and labels.
        kept: what is left of a partition's outputs where they are not kept exactly.
        **options: of the run.
    """
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)
    split = training_split(data, **options)
    model = built(build, config.seed)
    assert isinstance(model, nn.Sequential)
    parts = parts_at(model, starts)
    samples, labels = split.batch(np.arange(len(split)))
    own_order = permutation_of(len(split), config.seed, "own order")
    inputs = samples
    for partition, part in enumerate(parts):
        last = partition == len(parts) - 1
        with torch.no_grad():
            shape = part.eval()(inputs[:2]).shape[1:]
        codes = None if last else draw(config, partition, shape)
        # Activations were written in the own order; the data set, and the codes of its labels, are in the data set's.
        written = partition > 0 and not config.parallel_sil
        train_plainly(
            part,
            lambda indices, x=inputs, y=labels: (x[indices], y[indices]),  # type: ignore[misc]
            order_of_partition(config, partition, len(split), written),
            config,
            partition=partition,
            loss_of=None if codes is None else functools.partial(_distance, config, codes),
        )
        if config.parallel_sil:
            inputs = inputs if codes is None else codes[labels]
            continue
        if partition == 0:
            inputs, labels = inputs[own_order], labels[own_order]
        size = config.value_for("batch_size", partition)
        pieces = [piece for batch in inputs.split(size) for piece in batch.split(config.micro_batch or size)]
        with torch.no_grad():
            part.eval()
            inputs = kept(torch.cat([part(piece.clone()) for piece in pieces]))
    return model


def draw(config: FitConfig, partition: int, shape: tuple[int, ...]) -> Tensor:
    """The codes of the four classes at the boundary after a partition."""
    seed = seed_of(config.seed, "sil", partition + 1)
    kappa: float = config.value_for("kappa", partition)
    if config.sil_target == "pooled":
        shape = {1: shape, 2: shape[1:], 3: shape[:1]}[len(shape)]
    if config.sil == "uniform":
        return torch.rand(4, *shape, generator=torch.Generator().manual_seed(seed)) * kappa
    [codes] = draw_class_vectors([shape], 4, kappa, seed, config.sil)
    return codes


def _distance(config: FitConfig, codes: Tensor, output: Tensor, labels: Tensor) -> Tensor:
    """What a partition but the last minimises; of images (B, C, H, W) and of tokens (B, T, D) the means, if these are asked for."""
    if config.sil_target == "pooled" and output.dim() > 2:
        output = output.mean((2, 3)) if output.dim() == 4 else output.mean(1)
    return nn.functional.mse_loss(output, codes[labels])


def order_of_partition(config: FitConfig, partition: int, size: int, written: bool) -> Callable[[int], np.ndarray]:
    """In which order a partition that learns by itself sees its samples, by epoch."""
    if config.value_for("shuffle", partition):
        return lambda epoch: permutation_of(size, config.seed, "samples" if written else "epoch", epoch)
    return lambda epoch: np.arange(size) if written else permutation_of(size, config.seed, "own order")


def stop_at(batch: int) -> Callable[[], bool]:
    """Asks a run to stop at its `batch`th batch, for `should_stop`."""
    asked = itertools.count(1)
    return lambda: next(asked) >= batch


def parts_at(model: nn.Sequential, starts: list[int]) -> list[nn.Sequential]:
    """The partitions of a Sequential that is cut before the modules `starts`; they share its modules."""
    bounds = [0, *starts, len(model)]
    return [model[start:stop] for start, stop in itertools.pairwise(bounds)]


def recover_plainly(model: nn.Sequential, starts: list[int], data: Data, recovering: list[int], **options: Any) -> Trained:
    """What `--recovery-epochs` are to give after `train_by_pnn`.

    Args:
        model: trained; changed in place.
        starts: modules that start a partition.
        data: samples and labels.
        recovering: the partitions that learn, from 0; the others are frozen, in eval mode.
        **options: of the run.
    """
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)
    split = training_split(data, **options)
    parts = parts_at(model, starts)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for number, part in enumerate(parts):
        part.train(number in recovering)
        if number not in recovering:
            part.requires_grad_(False)
    train_loss = train_epochs(
        model,
        backward_of(model, functools.partial(cross_entropy, config)),
        split.batch,
        lambda epoch: (
            permutation_of(len(split), config.seed, "recovery", epoch)
            if config.shuffle[-1]
            else permutation_of(len(split), config.seed, "own order")
        ),
        config,
        groups={number: list(parts[number].parameters()) for number in recovering},
        epochs=config.recovery_epochs,
        batch_size=config.value_for("batch_size", len(parts) - 1),
        place=("recovery", 0),
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])
    return Trained(model, train_loss)
