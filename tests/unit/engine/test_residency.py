"""Residency: tensors come to the device and go back bit for bit, tied and frozen ones too."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.plainloops import built
from helpers.simulated import ADAM, Values, chain_of, resident
from helpers.small_networks import small_conv
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.errors import BudgetError
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.training.initial_weights import partition_layout


def test_a_partition_that_cannot_be_loaded_is_a_budget_error_and_leaves_nothing(pool: ThreadPoolExecutor) -> None:
    with SimulatedDevice(1 << 30, 20_000) as device:
        with pytest.raises(
            BudgetError,
            match=r"layers '0' to '3' do not fit with their optimizer state: memory ran out at .* kB of 1\.07 GB; give a larger --max",
        ):
            resident(small_conv, (3, 8, 8), device, pool)
        assert device.used_bytes() == 0


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)])
        self.layers[1].weight = self.layers[0].weight
        self.layers[1].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](self.layers[1](self.layers[0](x)))


def test_a_residency_comes_and_goes_bit_for_bit(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    chain = chain_of(_Twice, 8)
    layout = partition_layout(chain, chain.layers, ADAM)
    with SimulatedDevice(1 << 30) as device:
        residency = Residency(chain, 0, len(chain.layers), device, ADAM)
        residency.load(Values(built(_Twice), ADAM), pool)
        # Tied weights are one tensor, frozen ones have no optimizer state.
        [tied] = {id(layer.parameters()[name]) for layer in chain.layers for name in layer.parameters() if "bias" not in name
                  and "layers.2" not in name}  # fmt: skip
        assert tied == id(residency.trainable["layers.0.weight"])
        assert "layers.1.bias" not in residency.trainable
        assert not any(key.startswith("optimizer/layers.1.bias") for key in layout)
        for layer in chain.layers:
            layer.module.train()
        chain(torch.randn(4, 8)).square().sum().backward()
        for optimizer in residency.optimizers:
            optimizer.step()
        held = {**residency.trainable, **residency.buffers}
        kept = {name: tensor.detach().clone() for name, tensor in held.items()}
        moments = residency.optimizers[0].state[residency.trainable["layers.0.weight"]]["exp_avg"].clone()
        with TensorFile.create(tmp_path / "weights", layout) as file:
            residency.save(file)
        del held
        residency.unload()
        kept_bytes = sum(tensor.nbytes for tensor in kept.values()) + moments.nbytes
        assert device.used_bytes() == kept_bytes, "memory is given back"
        assert {tensor.device.type for layer in chain.layers for tensor in layer.parameters().values()} == {"meta"}
        assert not residency.optimizers

        with TensorFile.open(tmp_path / "weights") as file:
            residency.load(file, pool)
        again = {**residency.trainable, **residency.buffers}
        assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
        assert residency.optimizers
        state = residency.optimizers[0].state[residency.trainable["layers.0.weight"]]
        assert torch.equal(state["exp_avg"], moments)
        assert float(state["step"]) == 1.0
        assert all(tensor.data_ptr() % 64 == 0 for tensor in again.values())
        residency.unload()
