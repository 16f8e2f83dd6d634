"""Layers of a workload, compiled for all that a run does with them."""

import dataclasses

import torch

from lowmem_pnn.compilation.compiled_layer import CompileVariant
from lowmem_pnn.compilation.compiler import Compiler
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.workload.workload import Workload


def with_compiled_layers(workload: Workload, device: torch.device) -> Workload:
    """Return the workload with its layers compiled for all that a run does with them.

    Args:
        workload: workload with `--compile`.
        device: training device.

    Raises:
        ConfigError: a layer cannot be compiled.
    """
    config = workload.config
    if state := workload.chain.python_state:
        raise ConfigError(
            f"--compile: a forward changes {next(iter(state))!r}, whose value compiled code would freeze; leave --compile out"
        )
    most = min(max(config.batch_sizes), config.micro_batch or max(config.batch_sizes))
    compiler = Compiler(range(min(2, most), most + 1), device)
    for number, layer in enumerate(workload.chain.layers):
        compiler.compile(
            layer, workload.chain.boundaries[number], [*_training_variants(workload, number), CompileVariant(trains=False)]
        )
    counted = {"layers": len(workload.chain.layers), "functions": compiler.num_functions, "seconds": compiler.seconds}
    return dataclasses.replace(workload, compiled=counted)


def _training_variants(workload: Workload, number: int) -> list[CompileVariant]:
    """How a layer is trained: its inputs have gradients, unless they are the model's, a partition's that learns alone, or a unit's."""
    config, method = workload.config, workload.method
    if number == 0:
        return [CompileVariant(trains=True)]
    if method.sweeps or config.method == "backprop":
        inside, first = True, False
    elif method.learns_per_layer:
        inside, first = config.recovery_epochs > 0, True
    else:
        # Without cuts the plan, which is made later, says where partitions begin.
        begins = {workload.chain.layer_index(cut) for cut in config.cuts or ()}
        first = config.cuts is None or number in begins
        inside = number not in begins or config.recovery_epochs > 0
    return [CompileVariant(trains=True, learns_input=learns) for learns, wanted in ((True, inside), (False, first)) if wanted]
