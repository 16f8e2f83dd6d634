"""Training methods: which visits in which order, and what each partition learns."""

from lowmem_pnn.config import FitConfig
from lowmem_pnn.methods.backprop import Backprop
from lowmem_pnn.methods.base import Labels, Method, Objective, Visit
from lowmem_pnn.methods.pnn import Pnn, SyntheticLabels

__all__ = ["Backprop", "Labels", "Method", "Objective", "Pnn", "SyntheticLabels", "Visit", "make_method"]


def make_method(config: FitConfig) -> Method:
    """The method that a configuration names."""
    return {"pnn": Pnn, "backprop": Backprop}[config.method](config)
