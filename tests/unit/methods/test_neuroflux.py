"""neuroflux: its visits; layers of a block exchange no gradients; only the last layer has no head."""

from typing import Any

import torch
from torch import Tensor

from helpers.neuroflux_layers import OPTIONS, layers_with_heads
from helpers.small_networks import images
from helpers.tasks import classification
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.engine.passes import backward_from_loss
from lowmem_pnn.methods import Visit, make_method


def test_units_of_a_block_do_not_exchange_gradients() -> None:
    torch.manual_seed(0)
    config = configure(max_gpu_mem="1GB", model="mlp:12-4", data="digits", **{k: v for k, v in OPTIONS.items() if k != "device"})
    method = make_method(config)
    data = images(8)

    def gradients(spoilt: int | None) -> list[dict[str, Tensor]]:
        chain = layers_with_heads(config)
        for number, layer in enumerate(chain.layers):
            if number == spoilt:
                for parameter in layer.parameters().values():
                    parameter.data += 1
        objective = method.objective(0, 1, chain.boundaries[-1], classification())
        torch.manual_seed(1)
        backward_from_loss(chain.train().layers, (data[0],), data[1], objective, 1.0, None)
        return [{name: p.grad.clone() for name, p in layer.parameters().items() if p.grad is not None} for layer in chain.layers]

    whole = gradients(None)
    for later in (1, 2, 3):
        other = gradients(later)
        for number in range(later):
            assert whole[number].keys() == other[number].keys()
            assert all(torch.equal(whole[number][name], other[number][name]) for name in whole[number])
        assert any(not torch.equal(whole[later][name], other[later][name]) for name in whole[later])


def test_only_the_last_unit_has_no_head() -> None:
    chain = layers_with_heads(configure(max_gpu_mem="1GB", model="mlp:12-4", data="digits", method="neuroflux"))
    assert [layer.head is None for layer in chain.layers] == [False, False, False, True]
    assert not any(name.startswith("auxiliary_heads") for name in chain.persistent)


def test_laps_and_macro_batches_pass_over_every_sample_as_often_as_asked() -> None:
    def config(**options: Any) -> FitConfig:
        return configure(max_gpu_mem="1GB", model="mlp:12-4", data="digits", method="neuroflux", **options)

    sizes = {"train": 100, "val": 10}
    laps = make_method(config(epochs=5, visits="laps=2")).visits(2, sizes)
    assert [(v.partition, v.epochs_before, v.epochs) for v in laps if isinstance(v, Visit) and v.action == "learn"] == [
        (0, 0, 2), (1, 0, 2), (0, 2, 3), (1, 2, 3),
    ]  # fmt: skip
    woven = make_method(config(epochs=2, visits="interleaved", batch_size=10, macro_batches=4)).visits(3, sizes)
    for partition in range(3):
        seen = [v.macro_batch for v in woven if isinstance(v, Visit) and (v.action, v.partition) == ("learn", partition)]
        assert seen == 2 * [(0, 40), (40, 80), (80, 100)]
    assert [v.ends_epoch for v in woven if isinstance(v, Visit) and v.commits] == [False, False, True] * 2
