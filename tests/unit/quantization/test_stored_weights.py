"""Stored weights: what is kept, and that layers compute with it as PyTorch does with the cast weight."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.quantization import stored_weights
from lowmem_pnn.quantization.stored_weights import NF4_LEVELS, StoredForm, can_be_stored, is_stored_linear, num_values, store

FORMS = ("bf16", "int8", "nf4")


def stored_linear(linear: nn.Linear, form: StoredForm) -> nn.Linear:
    twin = copy.deepcopy(linear)
    store(twin, form, {end: nn.Parameter(part, False) for end, part in form.encode(linear.weight).items()})
    return twin


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", [(7, 13), (64, 64), (300, 257)])
def test_what_is_kept_has_the_layout_and_is_kept_once_and_for_all(name: str, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values[0] = 0
    form = StoredForm(name, shape, torch.float32)
    parts = form.encode(values)
    assert {end: (part.dtype, tuple(part.shape)) for end, part in parts.items()} == form.layout()
    kept = form.decode(parts, torch.float32)
    assert torch.equal(form.decode(form.encode(kept), torch.float32), kept)
    assert torch.equal(form.decode(parts, torch.bfloat16), kept.bfloat16())


def test_bf16_is_rounded_to_nearest() -> None:
    values = torch.randn(5, 9)
    form = StoredForm("bf16", (5, 9), torch.float32)
    assert torch.equal(form.decode(form.encode(values), torch.float32), values.bfloat16().float())


def test_int8_is_the_nearest_of_255_values_in_a_row() -> None:
    values = torch.randn(40, 3000)
    form = StoredForm("int8", (40, 3000), torch.float32)
    parts = form.encode(values)
    scales = values.abs().amax(1) / 127
    assert torch.equal(parts["_scale"], scales)
    assert torch.equal(parts[""], (values / scales[:, None]).round().to(torch.int8))


def test_nf4_is_the_nearest_of_16_levels_in_a_block_of_64() -> None:
    values = torch.randn(130, 1000)
    form = StoredForm("nf4", (130, 1000), torch.float32)
    blocks = nn.functional.pad(values.flatten(), (0, -values.numel() % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS)
    nearest = levels[(blocks / largest)[..., None].sub(levels).abs().argmin(-1)] * largest
    assert torch.equal(form.decode(form.encode(values), torch.float32), nearest.flatten()[: values.numel()].view(130, 1000))
    assert sum(math.prod(shape) * dtype.itemsize for dtype, shape in form.layout().values()) == 130 * 1000 // 2 + 2032 * 4


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_a_linear_layer_computes_as_pytorch_does_with_the_cast_weight(name: str, autocast: bool) -> None:
    linear = nn.Linear(32, 16).requires_grad_(False)
    form = StoredForm(name, (16, 32), torch.float32)
    ours, plain = stored_linear(linear, form), copy.deepcopy(linear)
    plain.weight.data = form.decode(form.encode(linear.weight), torch.float32)
    inputs = torch.randn(3, 5, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [one(inputs) for one in (ours, plain)]
    gradient = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, inputs, gradient)[0] for output in outputs]
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)
    assert is_stored_linear(ours)
    assert not is_stored_linear(plain)
    assert sum(num_values(ours).values()) == 16 * 32


def test_the_cast_weight_is_not_kept_for_backward() -> None:
    layer = stored_linear(nn.Linear(32, 16).requires_grad_(False), StoredForm("int8", (16, 32), torch.float32))
    saved: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.dtype) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 32, requires_grad=True))
    assert saved == [torch.int8, torch.float32]  # codes, and a scale for each row


@pytest.mark.parametrize("name", FORMS)
def test_a_large_weight_is_cast_some_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, form = nn.Linear(65, 600), StoredForm(name, (600, 65), torch.float32)
    x = torch.randn(2, 9, 65)
    results = []
    decoded: list[int] = []
    real = StoredForm.decode

    def decode(self: StoredForm, *rest: Any) -> Tensor:
        decoded.append(self.shape[0])
        return real(self, *rest)

    monkeypatch.setattr(StoredForm, "decode", decode)
    for limit in (stored_weights.TILED_BYTES, 600 * 65 * 4):
        monkeypatch.setattr(stored_weights, "TILED_BYTES", limit)
        monkeypatch.setattr(stored_weights, "_TILE_BYTES", 1)
        given = x.clone().requires_grad_()
        output = stored_linear(linear, form)(given)
        output.square().sum().backward()
        results.append((output, given.grad))
    assert decoded == [600, 600, 256, 256, 88, 256, 256, 88]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_learns_or_has_a_forward_of_its_own_is_not_stored() -> None:
    class Scaled(nn.Embedding):
        def forward(self, indices: torch.Tensor) -> torch.Tensor:
            return super().forward(indices) * 2

    assert can_be_stored(nn.Linear(3, 4).requires_grad_(False))
    assert can_be_stored(nn.Embedding(3, 4).requires_grad_(False))
    assert not can_be_stored(nn.Linear(3, 4))
    assert not can_be_stored(Scaled(3, 4).requires_grad_(False))
    assert not can_be_stored(nn.Linear(3, 4, dtype=torch.float64).requires_grad_(False))
    assert not can_be_stored(nn.LayerNorm(4).requires_grad_(False))
    assert can_be_stored(nn.Embedding(3, 4), learns=True)
    assert not can_be_stored(nn.Embedding(3, 4, scale_grad_by_freq=True), learns=True)
    assert can_be_stored(nn.Embedding(3, 4, scale_grad_by_freq=True).requires_grad_(False))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_linear_layer_in_bf16_learns_as_one_whose_weight_is_cast(autocast: bool) -> None:
    torch.manual_seed(0)
    module, inputs = nn.Linear(24, 40), torch.randn(3, 5, 24, requires_grad=True)
    weight = nn.Parameter(module.weight.detach().bfloat16())
    bias = nn.Parameter(module.bias.detach().clone())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = nn.functional.linear(inputs, weight if autocast else weight.float(), bias)
    expected.float().square().sum().backward()
    form = StoredForm("bf16", (40, 24), torch.float32)
    assert can_be_stored(module, learns=True)
    assert not can_be_stored(module)
    store(module, form, {end: nn.Parameter(part) for end, part in form.encode(module.weight).items()})
    again = inputs.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = module(again)
    found.float().square().sum().backward()
    assert torch.equal(found, expected)
    assert torch.equal(again.grad, inputs.grad)
    assert torch.equal(module.weight.grad, weight.grad)
    assert module.weight.grad.dtype == torch.bfloat16
    assert torch.allclose(module.bias.grad, bias.grad, rtol=1e-2 if autocast else 1e-6)


def test_rows_of_a_table_in_bf16_learn_as_those_of_one_that_is_cast() -> None:
    torch.manual_seed(0)
    module, indices = nn.Embedding(30, 8, padding_idx=0), torch.tensor([[3, 29, 3, 0], [7, 3, 0, 11]])
    whole = nn.Parameter(module.weight.detach().bfloat16().float())
    form = StoredForm("bf16", (30, 8), torch.float32)
    store(module, form, {end: nn.Parameter(part) for end, part in form.encode(module.weight).items()})
    scale = torch.randn(2, 4, 8)
    found, expected = module(indices), nn.functional.embedding(indices, whole, padding_idx=0)
    assert torch.equal(found, expected)
    (found * scale).sum().backward()
    (expected * scale).sum().backward()
    assert torch.equal(module.weight.grad, whole.grad.bfloat16())
