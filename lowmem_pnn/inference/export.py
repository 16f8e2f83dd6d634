"""Export of finished runs: what was trained is opened, and written in the form that is asked for."""

from pathlib import Path
from typing import Any

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.exporting.export import export_exit, export_merged, find_exit, refuse_part
from lowmem_pnn.exporting.export_folder import ExportFolder
from lowmem_pnn.exporting.export_formats import ExportFormat, check_name
from lowmem_pnn.exporting.transformers_folder import export_to_transformers
from lowmem_pnn.inference.load import workload_of
from lowmem_pnn.run.finished import open_finished
from lowmem_pnn.stores.disk import file_system_faults
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.workload.inputs import Model


def export_run(
    path: Path,
    *,
    to: ExportFormat | None,
    merge: bool,
    exit: str | int,
    out: str | Path | None,
    model: Model | None,
    trust: bool,
) -> dict[str, Any]:
    """Write the model of a finished run; arguments are those of `lowmem_pnn.export`."""
    check_name(to)
    if merge and to not in (None, "safetensors"):
        raise ConfigError(f"--merge writes safetensors, and not {to}; leave --to out")
    with file_system_faults(path), RunDirectory.open(path, to_read=True) as rundir:
        finished = open_finished(rundir)
        number = find_exit(finished.result, exit, path)
        if merge or to == "hf":
            refuse_part(finished.result, number, "--merge" if merge else "--to hf")
        chosen = None if out is None else Path(out)
        folder = None if to == "hf" else ExportFolder.find(path, number, finished.result, chosen)
        workload = workload_of(finished, path, model, trust=trust)
        rundir.clear()
        if folder is None or to == "hf":
            return export_to_transformers(workload, finished.config, finished.result, path, chosen)
        if merge:
            return export_merged(workload, path, folder)
        return export_exit(workload, finished.result, number, path, folder, to)
