"""Timings of a model on a machine, measured or nominal: layers, optimizer, drive and memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Seconds:
    """Seconds as a function of the number of samples.

    Args:
        fixed: Seconds for any number of samples.
        per_sample: Seconds for each sample.

    Example:
        >>> Seconds(0.5, 0.25).at(2)
        1.0
    """

    fixed: float
    per_sample: float

    def at(self, samples: int) -> float:
        """Return the seconds for a number of samples at once."""
        return self.fixed + self.per_sample * samples


@dataclass(frozen=True)
class LayerTimings:
    """Timings of one layer.

    Args:
        forward: Forward in train mode.
        backward: Backward to the weights and the inputs.
        backward_to_weights: Backward to the weights alone, where no gradient of the inputs is needed.
        emit: Forward in eval mode, without gradients.
    """

    forward: Seconds
    backward: Seconds
    backward_to_weights: Seconds
    emit: Seconds


@dataclass(frozen=True)
class MachineTimings:
    """Timings of a model on a machine.

    Args:
        layers: Timings of the layers, in the order of the chain.
        step_per_parameter: Seconds of the optimizer's step, per parameter.
        read_per_byte: Seconds per byte read from the drive, or from its pages that the system keeps in memory.
        write_per_byte: Seconds per byte written to the drive, not synced.
        memory_per_byte: Seconds per byte read from or written to the device's memory.
        measured_share: Share of the multiply-accumulates whose layers were timed; the timings of the others are estimated from these.
    """

    layers: tuple[LayerTimings, ...]
    step_per_parameter: float
    read_per_byte: float
    write_per_byte: float
    memory_per_byte: float
    measured_share: float = 1.0
