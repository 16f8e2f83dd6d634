"""The command on file systems that are full or cannot be written to, and on terminals without letters."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.commands import FIT, lowmem_pnn, train

pytestmark = pytest.mark.usefixtures("data_folder")


@pytest.fixture
def small_disk(data_folder: Path) -> Iterator[Path]:
    """A file system of 100 kB."""
    place = data_folder / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can be mounted only by root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(small_disk: Path) -> None:
    line = f"{FIT} --model mlp:20-60-60-3 --cuts 1 --epochs 2 --data npz:data.npz --workdir"
    done = lowmem_pnn(f"{line} disk/run")
    assert done.code == 5
    assert "no space left on device" in done.fault
    assert done.fault.endswith("make room there, or give a --workdir on another disk")
    assert not (small_disk / "run" / "result.json").exists()
    assert not (small_disk / "run" / "model.safetensors").exists()
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    assert lowmem_pnn("fit --resume --workdir disk/run").code == 0
    assert lowmem_pnn(f"{line} whole").code == 0
    assert Path("whole/model.safetensors").read_bytes() == (small_disk / "run" / "model.safetensors").read_bytes()


def test_a_disk_that_cannot_be_written_to(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert (
        train(workdir="disk/run").fault
        == "cannot make --workdir disk/run: read-only file system; choose a folder that can be written"
    )
    done = train(workdir="disk")
    assert (done.code, "read-only file system" in done.fault) == (5, True)


def test_a_terminal_without_the_letters_gets_the_result() -> None:
    # A process of its own costs seconds: one in which the work is done, and only the page is printed.
    code = (
        "from lowmem_pnn.cli import commands; "
        "commands.plan.callback = lambda **_: commands.click.echo('\u2500 layer \u00fc'); commands.main()"
    )
    command = [sys.executable, "-c", code, "plan"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True, check=True)
    assert done.stdout == b"? layer \xfc\n"


_COMMAND = "from lowmem_pnn.cli import commands; commands.plan.callback = lambda **_: {work}; commands.main()"


@pytest.mark.parametrize(
    ("redirection", "work", "code", "err"),
    [
        ("2>/dev/full", "print('x', file=commands.sys.stderr) or commands.print_result('done')", 0, ""),
        ("2>&-", "print('x', file=commands.sys.stderr) or commands.print_result('done')", 0, ""),
        (
            ">/dev/full",
            "commands.print_result('done', 'it is in run/result.json')",
            5,
            "lowmem-pnn: cannot write the result to standard output: no space left on device; it is in run/result.json\n",
        ),
        (
            ">&-",
            "open('file', 'w').fileno() > 2 and commands.print_result('done', 'it is in run/result.json')",
            5,
            "lowmem-pnn: cannot write the result to standard output: it is closed; it is in run/result.json\n",
        ),
        (">/dev/full 2>/dev/full", "commands.print_result('done')", 5, ""),
    ],
)
def test_output_that_cannot_be_written(redirection: str, work: str, code: int, err: str) -> None:
    line = f'"$0" -c "$1" plan {redirection}'
    done = subprocess.run(["sh", "-c", line, sys.executable, _COMMAND.format(work=work)], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (code, err, "done\n" if code == 0 else "")


def test_a_reader_that_has_left_is_no_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", _COMMAND.format(work="commands.print_result('done')"), "plan"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_commands_are_there_before_anything_heavy_is_imported() -> None:
    heavy = {"torch", "numpy", "torchvision", "matplotlib", "rich", "sklearn"}
    code = f"import sys, lowmem_pnn.cli.commands; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
