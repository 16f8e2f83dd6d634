"""What was measured, or assumed, of the speed of layers, of the optimizer and of the drive."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Seconds:
    """Seconds as a function of the number of samples.

    Example:
        >>> Seconds(0.5, 0.25).at(2)
        1.0
    """

    fixed: float
    per_sample: float

    def at(self, samples: int) -> float:
        """Seconds for so many samples at once."""
        return self.fixed + self.per_sample * samples


@dataclass(frozen=True)
class LayerSeconds:
    """How long a layer takes.

    Args:
        forward: in train mode.
        backward: to its weights and its inputs.
        backward_first: to its weights alone: nobody asks for its inputs' gradients.
        emit: forward in eval mode, without gradients.
    """

    forward: Seconds
    backward: Seconds
    backward_first: Seconds
    emit: Seconds


@dataclass(frozen=True)
class MachineTimings:
    """What was measured of a model on a machine.

    Args:
        layers: in the order of the chain.
        step: seconds of the optimizer per parameter.
        read: seconds per byte from the drive, or what the system keeps of it in memory.
        write: seconds per byte to it, not synced.
        touch: seconds per byte that goes through memory, read and written.
        measured: share of the multiply-accumulates whose layers were timed; the others are estimated from these.
    """

    layers: tuple[LayerSeconds, ...]
    step: float
    read: float
    write: float
    touch: float
    measured: float = 1.0
