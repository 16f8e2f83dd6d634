"""Training methods: their programs of visits and sweeps, and the objective of each partition."""

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.methods.backprop import Backprop
from lowmem_pnn.methods.base import Method
from lowmem_pnn.methods.exact import Exact
from lowmem_pnn.methods.incubate import Incubate, ThroughTail
from lowmem_pnn.methods.neuroflux import NeuroFlux
from lowmem_pnn.methods.objectives import Objective, TaskObjective
from lowmem_pnn.methods.pnn import Pnn
from lowmem_pnn.methods.program import Learning, program_of, visits_of_rank
from lowmem_pnn.methods.sil import SyntheticLabels
from lowmem_pnn.methods.visits import SplitName, Sweep, Visit, evaluation_visits

__all__ = [
    "Backprop",
    "Exact",
    "Incubate",
    "Learning",
    "Method",
    "NeuroFlux",
    "Objective",
    "Pnn",
    "SplitName",
    "Sweep",
    "SyntheticLabels",
    "TaskObjective",
    "ThroughTail",
    "Visit",
    "evaluation_visits",
    "make_method",
    "program_of",
    "visits_of_rank",
]


def make_method(config: FitConfig) -> Method:
    """Return the method that a configuration names."""
    methods: dict[str, type[Method]] = {
        "pnn": Pnn,
        "neuroflux": NeuroFlux,
        "incubate": Incubate,
        "exact": Exact,
        "backprop": Backprop,
    }
    return methods[config.method](config)
