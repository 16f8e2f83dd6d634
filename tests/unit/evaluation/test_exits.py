"""Exits: which is chosen, and what its model holds."""

from helpers.neuroflux_layers import layers_with_heads
from lowmem_pnn.config.configure import configure
from lowmem_pnn.evaluation.exits import ExitModel, choose_exit


def test_the_exit_is_the_smallest_within_the_tolerance() -> None:
    assert choose_exit([0.2, 0.7, 0.71, 0.715], tolerance=0.02) == 1
    assert choose_exit([0.2, 0.7, 0.71, 0.715], tolerance=0.0) == 3
    assert choose_exit([0.9, 0.7], tolerance=0.0) == 0


def test_the_model_of_an_exit_has_no_other_head() -> None:
    chain = layers_with_heads(configure(max_gpu_mem="1GB", model="mlp:12-4", data="digits", method="neuroflux"))
    model = ExitModel(chain, 1)
    prefixes = {name.split(".")[0] for name in model.state_dict()}
    assert prefixes == {"head", "body"}
    assert not any("auxiliary_heads" in name for name in model.state_dict())
