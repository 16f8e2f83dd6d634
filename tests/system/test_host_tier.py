"""The host tier and kills: what was in memory alone goes with the process, and the run with its last commit to the same weights."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lowmem_pnn
from helpers.plainloops import assert_same_weights, loaded, step_lines
from helpers.small_networks import images, small_conv

TESTS = Path(__file__).parents[1]
OPTIONS = {"method": "exact", "cuts": "1,2,3", "epochs": 6, "batch_size": 4, "val_fraction": 0, "log_every": 1}
RUN = f"""
import sys
import lowmem_pnn
from helpers.small_networks import images, small_conv
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.training import setup

setup._device_of = lambda config, rank: SimulatedDevice(30_000_000)
lowmem_pnn.fit(small_conv, images(48), max_gpu_mem=30_000_000, workdir=sys.argv[1], resume=len(sys.argv) > 2, commit_every=0.1, **{OPTIONS!r})
"""


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    places = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RUN, str(folder), *more], env=environment)


def test_a_run_that_is_killed_goes_on_from_its_last_commit_to_the_same_weights(tmp_path: Path) -> None:
    plain = lowmem_pnn.fit(small_conv, images(48), max_gpu_mem="300MB", device="cpu", workdir=tmp_path / "cpu", **OPTIONS)  # type: ignore[arg-type]
    folder = tmp_path / "run"
    process = start(folder)
    until = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len(step_lines(folder)) < 20:
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert start(folder, "resume").wait(300) == 0
    assert_same_weights(loaded(small_conv, folder / "model.safetensors"), loaded(small_conv, plain.weights_file))
    assert [line["loss"] for line in step_lines(folder)] == [line["loss"] for line in step_lines(tmp_path / "cpu")]
