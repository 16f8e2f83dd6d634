"""Runs the command line in this process, as a supervisor's worker does, and says what came of it; small data to run it on."""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from lowmem_pnn.cli import commands as cli
from lowmem_pnn.cli.supervisor import WORKER_VARIABLE

# What programs that read results rely on.
CONTRACT = {
    "method", "model", "data", "seed", "device", "budget_bytes", "budget_scope", "floor_bytes", "peak_bytes", "host_peak_bytes",
    "predicted_peak_bytes", "training_state_bytes", "partitions", "epochs", "seconds", "samples_per_second", "train_loss", "val_loss",
    "test_accuracy", "test_f1", "macs", "exits", "chosen_exit", "bytes_read", "bytes_written", "oom_retries", "resumed",
    "weights_file", "preprocessing", "versions",
}  # fmt: skip
OF_A_PARTITION = {
    "start", "stop", "layers", "params", "micro_batch", "batch", "epochs", "predicted_peak_bytes", "peak_bytes", "seconds",
}  # fmt: skip
FIT = "fit --max-gpu-mem 100MB --device cpu --epochs 1 "


@dataclass
class Outcome:
    """An exit code, and what was printed."""

    code: int
    out: str
    err: str
    as_json: bool = False

    @property
    def fault(self) -> str:
        """The one line that says why it failed, which is the last; what comes before it is progress."""
        assert self.code != 0, self.out
        assert self.out == "" or self.as_json, "on a failure nothing is printed on stdout, or what it was as JSON"
        assert "Traceback" not in self.err
        line = self.err.rstrip("\n").splitlines()[-1]
        assert line.startswith("lowmem-pnn: "), self.err
        return line.removeprefix("lowmem-pnn: ")


def lowmem_pnn(*arguments: object) -> Outcome:
    """Run `lowmem-pnn ARGUMENTS`; a single text is split as a shell would."""
    texts = shlex.split(str(arguments[0])) if len(arguments) == 1 else [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {WORKER_VARIABLE: "1", "COLUMNS": "130"}),
        mock.patch.object(sys, "argv", ["lowmem-pnn", *texts]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
    return Outcome(code, out.getvalue(), err.getvalue(), "--json" in texts)


def check_keys(result: Mapping[str, Any]) -> None:
    """Check that a result as JSON has what programs rely on."""
    assert set(result) >= CONTRACT
    assert all(set(partition) >= OF_A_PARTITION for partition in result["partitions"])


def write_data(path: Path, **changes: np.ndarray) -> Path:
    """Write 120 samples of 20 values in 3 classes, and 30 to test on, as .npz; `changes` replaces arrays."""
    random = np.random.RandomState(0)
    x = random.rand(150, 20).astype(np.float32)
    y = (x[:, 0] * 3).astype(np.int64)
    arrays = {"x_train": x[:120], "y_train": y[:120], "x_test": x[120:], "y_test": y[120:], **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def train(more: str = "", model: str = "mlp:20-16-3", data: str = "npz:data.npz", workdir: str = "run") -> Outcome:
    """Train for one epoch on the data in the folder `data_folder`, with `more` options."""
    return lowmem_pnn(f"{FIT} --model '{model}' --data '{data}' --workdir '{workdir}' {more}")
