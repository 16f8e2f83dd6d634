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


def in_a_process(code: str, tunables: str) -> Any:
    """What a fresh process prints as JSON, started with tunables of glibc."""
    environment = {**os.environ, "GLIBC_TUNABLES": tunables}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


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
    tidy = in_a_process(ROUNDS, with_tunables("glibc.malloc.hugetlb=0"))
    assert tidy["faults"] < pages / 5
    assert tidy["peak"] < 80 << 20, "as much is expected"
    assert in_a_process(ROUNDS, "glibc.malloc.hugetlb=0")["faults"] > pages / 2, "without it they go back to the system"


def test_a_tidy_heap_gives_back_what_is_more_than_expected() -> None:
    found = in_a_process(
        """
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
        """,
        with_tunables(""),
    )
    assert found["used"] < 40 << 20
    assert found["peak"] <= 128 << 20


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", with_tunables(""))
    assert has_tidy_heap()
    monkeypatch.setenv("GLIBC_TUNABLES", with_tunables("glibc.malloc.tcache_count=7"))
    assert not has_tidy_heap()
    assert with_tunables(with_tunables("")) == with_tunables("")


def test_the_heaps_holes_make_room_for_a_large_block() -> None:
    """What is expected leaves the holes where they are; a block that is mapped, as those of weights are, has no use for them."""
    found = in_a_process(
        """
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
        """,
        with_tunables(""),
    )
    assert found["holes"] > 70 << 20
    assert found["peak"] <= 128 << 20
