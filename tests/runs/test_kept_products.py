"""Products that sweeps keep for the second forward: the bits are those of a plain loop, and nothing is computed twice that was kept."""

from pathlib import Path
from typing import Any

import pytest

import lowmem_pnn
from helpers.exact_runs import COMMON, KINDS, check_equal, num_layers
from lowmem_pnn.preview import preview
from lowmem_pnn.sweep import kept_products
from lowmem_pnn.units import format_bytes


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations whose kept outputs were taken."""
    names: list[str] = []
    original = kept_products._Taking.__torch_dispatch__

    def counting(self: Any, func: Any, *args: Any) -> Any:
        before = self._place
        result = original(self, func, *args)
        if self._place > before and self._operations[before] is not None:
            names.append(func.__name__)
        return result

    monkeypatch.setattr(kept_products._Taking, "__torch_dispatch__", counting)
    return names


@pytest.mark.parametrize("kind", ["conv", "unet", "gpt", pytest.param("conv", marks=pytest.mark.resident, id="conv-resident")])
def test_exact_with_kept_products_is_same_as_plain_pytorch(kind: str, tmp_path: Path, taken: list[str]) -> None:
    build, data = KINDS[kind].build, KINDS[kind].data
    cuts = ",".join(map(str, range(1, num_layers(build, data))))
    check_equal(
        build, data, tmp_path / "run", {"smallest": KINDS[kind].smallest}, cuts=cuts, micro_batch=4, recompute="never", **COMMON
    )
    assert taken
    assert not list((tmp_path / "run").rglob("scratch*"))


def test_plan_keeps_what_the_disk_has_room_for_and_never_is_refused_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(**options: Any) -> lowmem_pnn.PlanReport:
        options = {"max_gpu_mem": "60MB", "method": "exact", "batch_size": 256, "cuts": "1,2,3", "timing": False, **options}
        return lowmem_pnn.plan("mlp:64-1024-1024-1024-10", "digits", **options)

    def kept(report: lowmem_pnn.PlanReport) -> list[str]:
        return [note for note in report.notes if note.startswith("products of")]

    all_of_them, none = planned(recompute="never"), planned(recompute="always")
    # A product of the first layer (64 wide) is computed faster than it is moved; the last layer goes forward once.
    assert kept(planned()) == [
        "products of 2 layers are kept in a file from forward to backward, 2.1 MB a batch (--recompute always: none, they are computed twice)"
    ]
    assert kept(all_of_them)[0].startswith("products of 3 layers are kept in a file from forward to backward, 3.1 MB a batch")
    assert not kept(none)
    assert all_of_them.disk_bytes - none.disk_bytes == 3 * 1024 * 4 * 256
    tight = none.disk_bytes + 1500 * 1024
    assert kept(planned(max_disk=tight))[0].startswith("products of 1 layer are kept in a file from forward to backward, 1.0 MB")
    # So much is free on the disk, of which a tenth is left alone.
    monkeypatch.setattr(preview, "free_disk_bytes", lambda folder: int(tight / 0.9))
    assert kept(planned())[0].startswith("products of 1 layer are kept in a file from forward to backward, 1.0 MB")
    monkeypatch.setattr(preview, "free_disk_bytes", lambda folder: none.disk_bytes)
    assert not kept(planned())
    needed, free = format_bytes(all_of_them.disk_bytes), format_bytes(none.disk_bytes)
    note = f"the run needs up to {needed} on disk, and {free} are free there: make room, give a --workdir on another disk, or give --recompute"
    assert planned(recompute="never").notes[-1].startswith(note)
    refused = planned(max_disk=tight, recompute="never")
    assert not refused.fits
    assert "--recompute always (3.1 MB less)" in refused.reason
