"""Merged weights are the adapters' products added to the decoded base, whatever it is kept as, and however small the pieces."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.adapters import merging
from lowmem_pnn.adapters.merging import MergedWeights
from lowmem_pnn.adapters.prepared_model import prepared
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.config.configure import configure
from lowmem_pnn.model.chain import TensorSpec


class Model(nn.Module):
    """Linear layers of sizes that no block of 64 fits, an embedding that is tied to the head, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(13, 24)
        self.up = nn.Linear(24, 37)
        self.down = nn.Linear(37, 24, bias=False)
        self.head = nn.Linear(24, 13, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.tokens(ids) * self.scale
        return self.head(x + self.down(self.up(x).relu()))


def trained(form: str, lora: str | None = "r=3,alpha=6,targets=up+down") -> nn.Module:
    options: dict[str, Any] = {"lora": lora} if lora else {"freeze": "tokens.*,up.*"}
    torch.manual_seed(0)
    model = prepared(Model(), configure(max_gpu_mem="1GB", model="python:m", data="python:d", frozen_dtype=form, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("piece", [1, 200, 1 << 20])
def test_merged_weights_are_the_base_and_the_product_of_the_adapters(
    form: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_PIECE", piece)
    model = trained(form)
    state = model.state_dict()
    chain = capture(model, TensorSpec((5,), torch.int64))
    merged = MergedWeights(chain, lambda name, elements: state[name] if elements is None else state[name].reshape(-1)[elements])
    plain = Model()
    assert merged.changes_something
    assert {name: shape for name, (_, shape) in merged.layout.items()} == {
        name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()
    }
    assert {dtype for dtype, _ in merged.layout.values()} == {torch.float32}
    plain.load_state_dict(
        {
            name: torch.cat([one.reshape(-1) for one in merged.pieces(name)]).view(shape)
            for name, (_, shape) in merged.layout.items()
        }
    )
    ids = torch.arange(10).view(2, 5)
    assert torch.allclose(plain(ids), model(ids), rtol=1e-5, atol=1e-5)
    if form == "fp32":
        assert torch.equal(plain.up.bias, model.up.bias)
        assert not torch.equal(plain.up.weight, model.up.weight)
        added = (model.up.lora_B @ model.up.lora_A) * 2
        assert torch.allclose(plain.up.weight, model.up.weight + added, rtol=1e-6, atol=1e-6)


def test_a_base_in_a_smaller_type_is_decoded_without_adapters_too() -> None:
    model = trained("int8", lora=None)
    state = model.state_dict()
    chain = capture(model, TensorSpec((5,), torch.int64))
    merged = MergedWeights(chain, lambda name, elements: state[name] if elements is None else state[name].reshape(-1)[elements])
    [weight] = merged.pieces("up.weight")
    assert torch.equal(weight.view(37, 24), state["up.weight"].float() * state["up.weight_scale"][:, None])


def test_a_plain_model_has_nothing_to_merge() -> None:
    chain = capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), TensorSpec((4,), torch.float32))
    assert not MergedWeights(chain, lambda name, elements: torch.empty(0)).changes_something
