"""Stored weights that a forward reads without calling their modules: found, kept as the model has them, and said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.networks import vector
from lowmem_pnn.adapters.prepared_model import prepared
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.capture.stored_reads import StoredReadError
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.planning.notes import adapter_notes
from lowmem_pnn.workload import Workload, make_workload
from lowmem_pnn.workload.inputs import python_inputs


def config(**options: Any) -> FitConfig:
    return configure(max_gpu_mem="100MB", model="python:net", data="python:table", device="cpu", method="exact", **options)


def assembled(build: Callable[[], nn.Module], data: Any, **options: Any) -> Workload:
    full = config(**options)
    return make_workload(full, *python_inputs(build, data, data, data)(full), torch.device("cpu"))


class Block(nn.Module):
    """Does something with the weight of a linear layer, whose forward runs too."""

    def __init__(self, read: Callable[["Block", Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down, self.read = nn.Linear(8, 8), nn.Linear(8, 8), read

    def forward(self, x: Tensor) -> Tensor:
        read = self.read(self, x)
        x = self.down(self.up(x).relu())
        return x + read if isinstance(read, Tensor) else x


def net(read: Callable[[Block, Tensor], Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), *(Block(read) for _ in range(3)), nn.Linear(8, 3))


ROWS = torch.rand(12, 8), torch.arange(12) % 3
READS: dict[str, Callable[[Block, Tensor], Any]] = {
    "type": lambda block, x: x.to(block.up.weight.dtype),
    "product": lambda block, x: F.linear(x, block.up.weight),
    "elements": lambda block, x: x * block.up.weight[0],
    "in a list": lambda block, x: torch.stack([block.up.weight]).sum() * x,
    "data": lambda block, x: x @ block.up.weight.data,
    "as one of its parameters": lambda block, x: x.to(next(block.up.parameters()).dtype),
}


@pytest.mark.parametrize("form", ["bf16", "nf4"])
@pytest.mark.parametrize("read", READS)
def test_a_weight_that_the_forward_reads_is_kept_as_the_model_has_it(read: str, form: str) -> None:
    workload = assembled(lambda: net(READS[read]), ROWS, freeze="1.*,2.*,3.*", frozen_dtype=form)
    types = {name: one.dtype for layer in workload.bare.layers for name, one in layer.parameters().items()}
    assert workload.unstored == {"1.up", "2.up", "3.up"}
    assert {types[f"{number}.up.weight"] for number in (1, 2, 3)} == {torch.float32}
    assert {types[f"{number}.down.weight"] for number in (1, 2, 3)} == {torch.bfloat16 if form == "bf16" else torch.uint8}
    assert {name: one.dtype for name, one in workload.build_model(0).named_parameters()} == types
    note = "the weights of 3 modules (up) are kept in fp32: the forward of the model reads them without calling these"
    assert note in adapter_notes(workload)


def test_what_is_asked_of_any_form_keeps_a_weight_small() -> None:
    def ask(block: Block, x: Tensor) -> Any:
        up = block.up.weight
        return torch.zeros(8, device=up.device) if up.requires_grad or up.is_cuda else None

    def ask_shape(block: Block, x: Tensor) -> Any:
        return torch.zeros(block.up.weight.shape[0])

    for read, form, names in ((ask, "nf4", set()), (ask_shape, "int8", set()), (ask_shape, "nf4", {"1.up", "2.up", "3.up"})):
        assert assembled(lambda read=read: net(read), ROWS, freeze="1.*,2.*,3.*", frozen_dtype=form).unstored == names


class TiedByHand(nn.Module):
    """Makes its scores by a product with its table, as many write it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(self.words(x)), self.words.weight)


@pytest.mark.parametrize("options", [{"freeze": "words.*", "frozen_dtype": "bf16"}, {"weights_dtype": "bf16"}])
def test_a_table_that_makes_the_scores_by_hand(options: dict[str, Any]) -> None:
    ids = torch.arange(70).view(10, 7) % 20
    if "freeze" in options:
        with pytest.raises(
            ConfigError, match=r"^--frozen-dtype bf16 has no effect here: the forward reads the weight of 'words'"
        ):
            assembled(TiedByHand, (ids, (ids + 1) % 20), **options)
        return
    workload = assembled(TiedByHand, (ids, (ids + 1) % 20), **options)
    types = {name: one.dtype for layer in workload.bare.layers for name, one in layer.parameters().items()}
    assert (types["words.weight"], types["body.weight"]) == (torch.float32, torch.bfloat16)
    assert "the weight of 'words' is kept in fp32: the forward of the model reads it without calling" in " ".join(
        adapter_notes(workload)
    )


def test_a_capture_of_such_a_model_says_what_it_is() -> None:
    model = prepared(net(READS["product"]), config(freeze="1.*", frozen_dtype="int8"))
    with pytest.raises(
        StoredReadError, match=r"^forward of model Sequential reads the weight of '1.up' without calling it"
    ) as raised:
        capture(model, vector(8))
    assert raised.value.names == {"1.up"}
