"""A workload: what a configuration comes to once its data is open and its model is cut into layers."""

from lowmem_pnn.workload.assembly import by_other_method, make_workload, profile_workload
from lowmem_pnn.workload.compilation import with_compiled_layers
from lowmem_pnn.workload.inputs import Inputs, open_data
from lowmem_pnn.workload.meta_model import MetaModel, meta_model
from lowmem_pnn.workload.workload import Workload

__all__ = [
    "Inputs",
    "MetaModel",
    "Workload",
    "by_other_method",
    "make_workload",
    "meta_model",
    "open_data",
    "profile_workload",
    "with_compiled_layers",
]
