"""What plain PyTorch is predicted to need: by itself, with checkpointing, and with gradients that add up."""

from lowmem_pnn.profiling.costs import Affine, LayerCost, MemoryProfile
from lowmem_pnn.workload.plain_training import accumulated_training_bytes, checkpointed_training_bytes, plain_training_bytes


def profile(layers: int, sample_bytes: int) -> MemoryProfile:
    """Layers of 100 bytes of weights, as many of gradients and twice as many of state, that keep their outputs."""
    grows = Affine(0, sample_bytes)
    return MemoryProfile(
        tuple(
            LayerCost(
                name=str(number), num_params=25, weight_bytes=100, buffer_bytes=0, gradient_bytes=100, optimizer_bytes=200, step_bytes=10,
                forward_peak=grows, kept=grows, backward_peak=Affine(100, sample_bytes), emit_peak=grows, input_bytes=grows,
                output_bytes=grows, forward_macs=1,
            )
            for number in range(layers)
        )
    )  # fmt: skip


def test_without_activations_all_need_the_state() -> None:
    state = 9 * 400 + 10
    of_nothing = profile(9, 0)
    assert plain_training_bytes(of_nothing, 8) == state
    assert checkpointed_training_bytes(of_nothing, 8) == state
    assert accumulated_training_bytes(of_nothing, 8, 1) == 9 * 400 + 100, "a gradient is made before it is added to another"


def test_activations_are_of_segments_or_of_micro_batches() -> None:
    wide = profile(9, 1000)
    weights, batch = 9 * 300, 8 * 1000
    # The input of the model, what all nine layers keep, and the last one's gradients: of its outputs, its inputs and its weights.
    assert plain_training_bytes(wide, 8) == weights + batch + 9 * batch + 3 * batch
    # Of three segments the last one, with the inputs of all of them.
    assert checkpointed_training_bytes(wide, 8) == weights + 3 * batch + 3 * batch + 3 * batch
    assert accumulated_training_bytes(wide, 8, 1) == weights + 9 * 100 + 13 * 1000
