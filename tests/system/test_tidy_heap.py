"""A tidy heap, in processes of their own: freed blocks are used again, within what is expected, and given back above it."""

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from lowmem_pnn.memory.tunables import has_tidy_heap, with_tunables

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")


# A process that has imported what codes need is forked for each of them.
_FORKS = """
import os, sys
import torch
import lowmem_pnn.device
import lowmem_pnn.memory.aligned

for code in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""


def in_processes(tunables: str, *codes: str) -> list[Any]:
    """What fresh processes print as JSON, started with tunables of glibc."""
    done = subprocess.run(
        [sys.executable, "-c", _FORKS, *map(textwrap.dedent, codes)],
        env={**os.environ, "GLIBC_TUNABLES": tunables},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


# Blocks of 4 MiB come and go among small ones, as activations do among what autograd notes of them.
ROUNDS = """
    import json, resource
    import torch
    from lowmem_pnn.device import CpuDevice
    from lowmem_pnn.units import MEBIBYTE

    with CpuDevice(128 * MEBIBYTE) as device:
        device.set_expected_peak(80 * MEBIBYTE)
        small, faults = [], []
        for _ in range(6):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = []
            for number in range(12):
                blocks.append(torch.ones(MEBIBYTE))
                small = [*small[-240:], *(torch.ones(4) for _ in range(20))]
            for start in (1, 0):
                del blocks[start::2]
            device.release_for_next()
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(json.dumps({"faults": max(faults[2:]), "peak": device.peak_bytes}))
"""


def test_freed_blocks_are_used_again_in_a_tidy_heap() -> None:
    pages = 12 * 1024  # of 4 KiB, in a round's blocks
    # In small pages, so that every page that is taken from the system shows.
    [tidy] = in_processes(with_tunables("glibc.malloc.hugetlb=0"), ROUNDS)
    assert tidy["faults"] < pages / 5
    assert tidy["peak"] < 80 << 20, "as much is expected"
    [other] = in_processes("glibc.malloc.hugetlb=0", ROUNDS)
    assert other["faults"] > pages / 2, "without it they go back to the system"


# Blocks that are freed at once, all but those at the heap's end.
ABOVE = """
    import json, time
    import torch
    from lowmem_pnn.device import CpuDevice
    from lowmem_pnn.units import MEBIBYTE

    with CpuDevice(128 * MEBIBYTE) as device:
        device.enforce()
        device.set_expected_peak(40 * MEBIBYTE)
        held = [torch.ones(MEBIBYTE) for _ in range(20)]
        last = held.pop()  # at the heap's end, which cannot be given back then
        held.clear()
        ends = time.monotonic() + 5
        while device.used_bytes() > 40 * MEBIBYTE and time.monotonic() < ends:
            time.sleep(0.01)
        used = device.used_bytes()
        time.sleep(0.02)  # until the meter has told the limit
        # The limit knows that the holes are empty: as much as the budget has can be had, in blocks that fit no hole.
        more = torch.ones(25 * MEBIBYTE)
        print(json.dumps({"used": used, "peak": device.peak_bytes}))
"""

# Every other block is freed, and then a large one is mapped.
HOLES = """
    import json
    import torch
    from lowmem_pnn.device import CpuDevice
    from lowmem_pnn.memory.aligned import PAGE_BYTES, aligned_empty
    from lowmem_pnn.units import MEBIBYTE

    with CpuDevice(128 * MEBIBYTE) as device:
        device.enforce()
        held = [torch.ones(MEBIBYTE) for _ in range(20)]
        del held[::2], held[-1]
        holes = device.used_bytes()
        block = aligned_empty((80 * MEBIBYTE,), torch.uint8, alignment=PAGE_BYTES).fill_(1)
        print(json.dumps({"holes": holes, "peak": device.peak_bytes}))
"""


def test_a_tidy_heap_gives_back_what_is_more_than_expected_and_its_holes_for_a_large_block() -> None:
    above, holes = in_processes(with_tunables(""), ABOVE, HOLES)
    assert above["used"] < 40 << 20
    assert above["peak"] <= 128 << 20
    # What is expected leaves the holes where they are; a block that is mapped, as those of weights are, has no use for them.
    assert holes["holes"] > 70 << 20
    assert holes["peak"] <= 128 << 20


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", with_tunables(""))
    assert has_tidy_heap()
    monkeypatch.setenv("GLIBC_TUNABLES", with_tunables("glibc.malloc.tcache_count=7"))
    assert not has_tidy_heap()
    assert with_tunables(with_tunables("")) == with_tunables("")
