"""Ranks under torchrun: the bits of one process, stopped, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import lowmem_pnn, write_data
from lowmem_pnn.run.ranks import rank_folder
from lowmem_pnn.stores.run_directory import read_journal

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _no_torchrun_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# A model that a file beside it makes slow.
_SLOW = """
import time
from pathlib import Path
import torch

SLOW = Path(__file__).with_name("slow")

class Slow(torch.nn.Module):
    def forward(self, x):
        if len(x) and type(x) is torch.Tensor and x.device.type == "cpu" and SLOW.exists():
            time.sleep(0.15)
        return x

def build():
    layers = [torch.nn.Linear(20, 16), Slow(), torch.nn.Linear(16, 3), Slow()]
    return torch.nn.Sequential(*layers)
"""
_FIT = (
    "fit --max-gpu-mem 100MB --device cpu --model it.py:build --data npz:data.npz --epochs 3 --cuts 1 --parallel-sil --batch-size 16 "
    "--commit-every 0 --no-report"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the run of one process."""
    place = tmp_path_factory.mktemp("whole")
    write(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert lowmem_pnn(f"{_FIT} --workdir run --quiet").code == 0
    return weights(place / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def write(folder: Path) -> None:
    write_data(folder / "data.npz")
    (folder / "it.py").write_text(_SLOW)


class Torchrun:
    """`torchrun --nproc-per-node 2 -m lowmem_pnn ARGUMENTS`."""

    def __init__(self, folder: Path, arguments: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lowmem_pnn"]
        self.process = subprocess.Popen(
            [*command, *arguments.split()],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Wait for it; its exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=300)  # on a machine that others use too
        return self.process.returncode, out, err


@pytest.fixture
def torchrun(folder: Path) -> Iterator[Callable[[str], Torchrun]]:
    """Starts torchrun; what still runs at the end is ended, so that a test that fails leaves nothing behind."""
    started: list[Torchrun] = []

    def run(arguments: str) -> Torchrun:
        started.append(Torchrun(folder, arguments))
        return started[-1]

    yield run
    for each in started:
        if each.process.poll() is None:
            each.process.terminate()
            each.process.communicate(timeout=60)


def wait_for(happens: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not happens():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def journal(folder: Path) -> dict[str, Any]:
    return read_journal(folder / "journal.json")[0]


def commits(folder: Path) -> int:
    return int(journal(folder)["number"]) if (folder / "journal.json").exists() else 0


@pytest.mark.slow
def test_torchrun_that_was_stopped_and_lost_a_rank_gives_the_bits_of_one_process_and_one_result(
    folder: Path, torchrun: Callable[[str], Torchrun], whole: bytes
) -> None:
    ranks = [rank_folder(folder / "run", number) for number in range(2)]
    (folder / "slow").touch()
    stopped = torchrun(f"{_FIT} --workdir run")
    wait_for(lambda: min(map(commits, ranks)) > 2, stopped.process)
    stopped.process.send_signal(signal.SIGTERM)
    code, out, err = stopped.end()
    assert (code != 0, out) == (True, "")
    assert err.count("lowmem-pnn: stopped; lowmem-pnn fit --resume --workdir run") == 2
    assert {journal(rank)["stage"] for rank in ranks} == {"training"}
    before = [commits(rank) for rank in ranks]

    resumed = torchrun("fit --resume --workdir run --json --quiet --trust")
    wait_for(lambda: commits(ranks[1]) > before[1] + 2, resumed.process)
    os.kill(int((ranks[1] / "lock").read_text()), signal.SIGKILL)
    (folder / "slow").unlink()
    code, out, err = resumed.end()
    assert code == 0, err
    assert "lowmem-pnn: the worker died of SIGKILL; going on from the last commit" in err
    assert json.loads(out) == json.loads((folder / "run" / "result.json").read_text())
    assert json.loads(out)["resumed"] == 1
    assert weights(folder / "run") == whole
    assert sorted(path.name for path in folder.iterdir() if path.is_dir() and "pycache" not in path.name) == ["run"]
