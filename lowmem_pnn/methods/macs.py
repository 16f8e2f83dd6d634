"""MACs: forward multiply-accumulates of a program, up to any position in it.

What PNN's paper puts on the x axis (arXiv 2403.11204, sections 3 and 4): forward passes over training samples, of the partition that
runs. Here outputs that are written and forwards that are computed again count too; measuring the model does not, nor do batches that
were done again.
"""

from collections.abc import Sequence

from lowmem_pnn.methods.visits import Sweep, Visit
from lowmem_pnn.partition_plan import Plan

Program = Sequence[Visit | Sweep]


def epoch_macs(item: Visit | Sweep, plan: Plan, samples: int) -> int:
    """Return the MACs of one pass of a visit or sweep over the training samples; 0 if it reads others.

    Args:
        item: visit or sweep of the program.
        plan: partitions of the model.
        samples: training samples, or as many of them as were passed so far.
    """
    visits = item.visits if isinstance(item, Sweep) else (item,)
    forwards = [visit for visit in visits if visit.split == "train" and visit.action not in ("step", "join")]
    if isinstance(item, Visit) and item.macro_batch is not None:
        samples = min(samples, item.macro_batch[1] - item.macro_batch[0])
    return samples * sum(_forward_macs(visit, plan) for visit in forwards)


def _forward_macs(visit: Visit, plan: Plan) -> int:
    """Return the MACs of one sample, those of thin parts included."""
    if visit.action == "meta":
        return sum(plan.thin_macs)
    if visit.thin and visit.action == "emit":
        return plan.thin_macs[visit.partition]
    own = plan.partitions[visit.partition].forward_macs
    return own + (sum(plan.thin_macs[visit.partition + 1 :]) if visit.thin else 0)


def macs_until(program: Program, plan: Plan, samples: int, visit: int, epoch: int = 0, samples_done: int = 0) -> int:
    """Return the MACs before a position in a program.

    Args:
        program: visits and sweeps of the run.
        plan: partitions of the model.
        samples: training samples.
        visit: position in the program.
        epoch: finished epochs of the visit or sweep there.
        samples_done: samples passed in the epoch under way.
    """
    total = sum(item.epochs * epoch_macs(item, plan, samples) for item in program[:visit])
    if visit < len(program):
        total += epoch * epoch_macs(program[visit], plan, samples) + epoch_macs(program[visit], plan, samples_done)
    return total


def program_macs(program: Program, plan: Plan, samples: int) -> int:
    """Return the MACs of a whole program; arguments as for `macs_until`."""
    return macs_until(program, plan, samples, len(program))


def samples_learnt(program: Program, samples: int) -> int:
    """Count the samples in all epochs of learning; those of several partitions count for each of them."""
    return sum(samples * item.epochs_learnt for item in program)
