"""Blocks of neuroflux: their batches stay within the budget."""

import itertools
import random

import torch
from torch import nn

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.planning.neuroflux_blocks import feasible_batch, similar_batch_cuts
from lowmem_pnn.profiling.costs import Affine
from lowmem_pnn.profiling.memory_profiler import MeasurementCache, profile
from lowmem_pnn.profiling.peaks import peak_of

CPU = torch.device("cpu")


def test_batches_of_blocks_never_pass_the_budget_over_random_networks() -> None:
    rng = random.Random(0)
    measured: MeasurementCache = {}
    chains = []  # which have to exist as long as the measurements
    for _ in range(3):
        widths = [rng.choice([8, 24, 64]) for _ in range(rng.randint(2, 4))]
        parts: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise([3, *widths]):
            parts += [nn.Conv2d(inputs, outputs, 3, rng.choice([1, 2]), 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        with torch.device("meta"):
            model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4)).to("meta")
        chain = capture(model, TensorSpec((3, 16, 16), torch.float32))
        chains.append(chain)
        costs = profile(chain, optimizers=[OptimizerSpec("adam")], device=CPU, per_layer_loss=True, cache=measured)
        none = Affine(0, 0)
        least = max(peak_of((layer,), costs.smallest_micro_batch, costs.smallest_micro_batch, none) for layer in costs.layers)
        for _ in range(8):
            room = int(least * rng.uniform(1.0, 8.0))
            cuts = similar_batch_cuts(costs, most=256, room=room, objectives=[none] * len(costs.layers), tolerance=rng.random())
            for start, stop in itertools.pairwise([0, *cuts, len(costs.layers)]):
                batch = feasible_batch(costs, start, stop, 256, room, none)
                assert batch >= costs.smallest_micro_batch
                assert peak_of(costs.layers[start:stop], batch, batch, none) <= room
                assert batch == 256 or peak_of(costs.layers[start:stop], batch + 1, batch + 1, none) > room
