"""Tasks and objectives of tests that build no workload."""

from lowmem_pnn.methods import TaskObjective
from lowmem_pnn.sources.targets import TargetKind, Targets
from lowmem_pnn.tasks.classification import Classification


def classification(kind: TargetKind = "class", shape: tuple[int, ...] = (), smoothing: float = 0.0) -> Classification:
    """Classification of as many classes as a model has scores."""
    return Classification(Targets(kind, 2, shape, ignored=-100), smoothing)


def class_objective(smoothing: float = 0.0) -> TaskObjective:
    """Cross entropy against the true classes, of samples or of tokens."""
    return TaskObjective(classification(smoothing=smoothing), ())
