"""Nominal rates: how long layers take on a machine of a kind, from what is counted of them, not measured.

Plans that are chosen by these are the same on every machine of the kind. Only ratios matter: what recomputing a layer, going through
its weights once more, and moving them take against each other.
"""

from dataclasses import dataclass

from lowmem_pnn.profiling.costs import LayerCost, MemoryProfile
from lowmem_pnn.profiling.timings import LayerSeconds, MachineTimings, Seconds


@dataclass(frozen=True)
class Machine:
    """A kind of machine; all in seconds.

    Args:
        mac: a multiply-accumulate.
        forward_weight: a parameter in a forward, for any number of samples.
        backward_weight: a parameter in a backward: read once more, its gradient written or added.
        call: a layer, forward; twice as long backward.
        touch: a byte of activations, written or read.
        step: a parameter in the optimizer's step.
        read: a byte from the drive, or what the system keeps of it.
        write: a byte to it.
    """

    mac: float
    forward_weight: float
    backward_weight: float
    call: float
    touch: float
    step: float
    read: float
    write: float


# Rounded from what `lowmem_pnn.profiling.benchmark` measures: one core of a server's processor with AVX-512, and a virtual NVMe drive.
CPU = Machine(mac=2e-11, forward_weight=1.4e-9, backward_weight=3e-9, call=1e-4, touch=1e-10, step=1e-9, read=4e-10, write=6e-10)
# Counted from data sheets of small GPUs: half of 10 TFLOP/s, 300 GB/s, some ten kernels a layer; weights come through the host.
CUDA = Machine(
    mac=2e-13, forward_weight=1.3e-11, backward_weight=4e-11, call=1e-4, touch=3e-12, step=1e-10, read=5e-10, write=7e-10
)


def nominal_rates(profile: MemoryProfile, machine: Machine) -> MachineTimings:
    """MachineTimings of a model's layers.

    Args:
        profile: their counts.
        machine: where they run.
    """
    layers = tuple(_seconds(cost, machine) for cost in profile.layers)
    return MachineTimings(layers, machine.step, machine.read, machine.write, machine.touch, measured=0.0)


def _seconds(cost: LayerCost, machine: Machine) -> LayerSeconds:
    computing = cost.forward_macs * machine.mac
    # What a forward leaves is written by it, and read by the backward, which writes as much again.
    moving = cost.kept.per_sample * machine.touch
    forward = Seconds(machine.call + cost.num_params * machine.forward_weight, computing + moving)
    fixed = 2 * machine.call + cost.num_params * machine.backward_weight
    # Products with the weights' transposes, for the inputs' gradient, and with the inputs, for the weights'.
    backward = Seconds(fixed, 2 * (computing + moving))
    return LayerSeconds(forward, backward, Seconds(fixed, computing + 2 * moving), forward)
