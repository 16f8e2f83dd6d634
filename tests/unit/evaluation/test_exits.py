"""Exits: which is chosen, and what its model holds."""

from helpers.neuroflux_layers import layers_with_heads
from lowmem_pnn.config.configure import configure
from lowmem_pnn.evaluation.exits import ExitModel, choose_exit, chosen_exit


def test_the_exit_is_the_smallest_within_the_tolerance() -> None:
    assert choose_exit([0.2, 0.7, 0.71, 0.715], tolerance=0.02) == 1
    assert choose_exit([0.2, 0.7, 0.71, 0.715], tolerance=0.0) == 3
    assert choose_exit([0.9, 0.7], tolerance=0.0) == 0


def test_of_several_labels_the_loss_chooses() -> None:
    # Of 80 labels three hold: no label at all is 96.25 % right.
    exits = [
        {"val_accuracy": 0.9625, "val_loss": 0.16},
        {"val_accuracy": 0.967, "val_loss": 0.1010},
        {"val_accuracy": 0.97, "val_loss": 0.1},
    ]
    assert chosen_exit(exits, tolerance=0.01) == 1
    assert chosen_exit(exits, tolerance=0.01, by_loss=True) == 2
    assert chosen_exit(exits, tolerance=0.0, by_loss=True) == 3
    assert chosen_exit([{"val_accuracy": None, "val_loss": None}], tolerance=0.01, by_loss=True) is None


def test_the_model_of_an_exit_has_no_other_head() -> None:
    chain = layers_with_heads(configure(max_gpu_mem="1GB", model="mlp:12-4", data="digits", method="neuroflux"))
    model = ExitModel(chain, 1)
    prefixes = {name.split(".")[0] for name in model.state_dict()}
    assert prefixes == {"head", "body"}
    assert not any("auxiliary_heads" in name for name in model.state_dict())
