"""Training methods: which visits in which order, and what each partition learns."""

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.methods.backprop import Backprop
from lowmem_pnn.methods.base import Labels, Method, Objective, Sweep, Visit, share_of
from lowmem_pnn.methods.exact import Exact
from lowmem_pnn.methods.neuroflux import NeuroFlux
from lowmem_pnn.methods.pnn import Pnn
from lowmem_pnn.methods.sil import SyntheticLabels

__all__ = [
    "Backprop",
    "Exact",
    "Labels",
    "Method",
    "NeuroFlux",
    "Objective",
    "Pnn",
    "Sweep",
    "SyntheticLabels",
    "Visit",
    "make_method",
    "share_of",
]


def make_method(config: FitConfig) -> Method:
    """The method that a configuration names."""
    methods: dict[str, type[Method]] = {"pnn": Pnn, "neuroflux": NeuroFlux, "exact": Exact, "backprop": Backprop}
    return methods[config.method](config)
