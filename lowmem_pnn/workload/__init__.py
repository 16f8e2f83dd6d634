"""A workload: what a configuration comes to once its data is open and its model is cut into layers."""

from lowmem_pnn.workload.assembly import by_other_method, make_workload, profile_workload
from lowmem_pnn.workload.compilation import with_compiled_layers
from lowmem_pnn.workload.inputs import Inputs, open_data
from lowmem_pnn.workload.workload import Workload

__all__ = ["Inputs", "Workload", "by_other_method", "make_workload", "open_data", "profile_workload", "with_compiled_layers"]
