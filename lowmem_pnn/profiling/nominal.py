"""Nominal timings: the seconds of layers on a kind of machine, computed from their counts instead of measured.

Plans that are chosen by nominal timings are the same on every machine of the kind. Only ratios matter: recomputing a layer against
going through its weights once more, and against moving them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from lowmem_pnn.config.gpu_description import GpuDescription
from lowmem_pnn.profiling.costs import LayerCost, MemoryProfile, Product
from lowmem_pnn.profiling.timings import LayerTimings, MachineTimings, Seconds


@dataclass(frozen=True)
class MachineSpeed:
    """Speed of a kind of machine: seconds of each operation.

    Args:
        mac: Seconds of a multiply-accumulate.
        forward_weight: Seconds per parameter in a forward, for any number of samples.
        backward_weight: Seconds per parameter in a backward: read once more, its gradient written or added.
        call: Seconds of a layer's forward for any number of samples; its backward takes twice as long.
        memory_byte: Seconds per byte of activations read or written.
        step: Seconds per parameter in the optimizer's step.
        read_byte: Seconds per byte read from the drive, or from its pages that the system keeps in memory.
        written_byte: Seconds per byte written to the drive.
    """

    mac: float
    forward_weight: float
    backward_weight: float
    call: float
    memory_byte: float
    step: float
    read_byte: float
    written_byte: float


# Share of the data sheet's computing rate that training reaches.
_REACHED = 0.5
# Rounded measurements of `lowmem_pnn.profiling.benchmark`: one core of a server's processor with AVX-512, and a virtual NVMe drive.
CPU = MachineSpeed(
    mac=2e-11,
    forward_weight=1.4e-9,
    backward_weight=3e-9,
    call=1e-4,
    memory_byte=1e-10,
    step=1e-9,
    read_byte=4e-10,
    written_byte=6e-10,
)
# Counted from data sheets of small GPUs: half of 10 TFLOP/s, 300 GB/s, some ten kernels a layer; weights come through the host.
CUDA = MachineSpeed(
    mac=2e-13,
    forward_weight=1.3e-11,
    backward_weight=4e-11,
    call=1e-4,
    memory_byte=3e-12,
    step=1e-10,
    read_byte=5e-10,
    written_byte=7e-10,
)


def speed_of(*, shares_host: bool) -> MachineSpeed:
    """Return the speed of a kind of machine.

    Args:
        shares_host: whether it computes on the host itself.
    """
    return CPU if shares_host else CUDA


def speed_of_gpu(gpu: GpuDescription, *, drive: bool = True) -> MachineSpeed:
    """Return the speed of a described GPU: half of its computing rate, and all else as of a small one.

    Args:
        gpu: the GPU.
        drive: whether weights and state come from the drive, through the host; else from the host's memory.
    """
    byte = 1e-9 / (min(gpu.disk, gpu.pcie) if drive else gpu.pcie)
    return replace(CUDA, mac=2 / (_REACHED * gpu.tflops * 1e12), read_byte=byte, written_byte=byte)


def keeping_rule(recompute: Literal["auto", "always", "never"], *, shares_host: bool) -> Callable[[Product], bool]:
    """Return the rule by which the output of a product is kept for a second forward, rather than computed again.

    Args:
        recompute: whether products are computed again always, never, or, auto, where writing and reading their outputs takes longer on
            this kind of machine.
        shares_host: whether the machine computes on the host itself.
    """
    speed = speed_of(shares_host=shares_host)
    if recompute == "auto":
        return lambda product: product.macs * speed.mac > product.nbytes * (speed.written_byte + speed.read_byte)
    return lambda _: recompute == "never"


def nominal_timings(profile: MemoryProfile, speed: MachineSpeed) -> MachineTimings:
    """Compute the timings of a model's layers on a kind of machine.

    Args:
        profile: Counts of the layers.
        speed: Speed of the machine.
    """
    layers = tuple(layer_timings(cost, speed) for cost in profile.layers)
    return MachineTimings(layers, speed.step, speed.read_byte, speed.written_byte, speed.memory_byte, measured_share=0.0)


def layer_timings(cost: LayerCost, speed: MachineSpeed) -> LayerTimings:
    """Compute the timings of a layer on a kind of machine.

    Args:
        cost: Counts of the layer.
        speed: Speed of the machine.
    """
    computing = cost.forward_macs * speed.mac
    # A forward writes what it keeps; the backward reads that, and writes as much again.
    moving = cost.kept.per_sample * speed.memory_byte
    forward = Seconds(speed.call + cost.num_params * speed.forward_weight, computing + moving)
    fixed = 2 * speed.call + cost.num_params * speed.backward_weight
    # Products with the weights' transposes, for the gradient of the inputs, and with the inputs, for that of the weights.
    backward = Seconds(fixed, 2 * (computing + moving))
    return LayerTimings(forward, backward, Seconds(fixed, computing + 2 * moving), forward)
