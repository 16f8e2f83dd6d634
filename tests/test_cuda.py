"""The GPU: its budget's accounting with a driver of our own making, and, where there is one, a real run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plainloops import images, loaded, small_conv

import lowmem_pnn
from lowmem_pnn.device import CudaDevice
from lowmem_pnn.errors import BudgetError, ConfigError

MB = 10**6


class Driver:
    """A device of 8 GB on which others hold 700 MB, and a context of 400 MB."""

    def __init__(self, *, knows_process: bool = True) -> None:
        self.knows_process = knows_process
        self.others, self.context = 700 * MB, 0
        self.allocated = self.peak = 0
        self.cap: int | None = None
        self.emptied = 0

    def start(self) -> None:
        self.context = 400 * MB
        self.allocated = 2 * MB  # what the warm-up leaves

    def device_used(self) -> int:
        return self.others + self.context + self.allocated

    def process_used(self) -> int | None:
        return self.context + self.allocated if self.knows_process else None

    def total(self) -> int:
        return 8_000 * MB

    def reserved(self) -> int:
        return self.allocated

    def peak_reserved(self) -> int:
        return self.peak

    def reset_peak(self) -> None:
        self.peak = self.allocated

    def cap_allocator(self, size: int) -> None:
        self.cap = size

    def empty_cache(self) -> None:
        self.emptied += 1

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)


@pytest.mark.parametrize("knows_process", [True, False], ids=["NVML", "no process in NVML"])
def test_the_allocator_gets_the_budget_without_the_context(knows_process: bool) -> None:
    driver = Driver(knows_process=knows_process)
    with CudaDevice(2_000 * MB, driver=driver) as device:
        assert device.fixed_bytes == 400 * MB
        assert driver.cap == 1_600 * MB
        driver.allocate(998 * MB)
        driver.allocate(-500 * MB)
        assert device.used_bytes() == 900 * MB
        assert device.section_peak_bytes() == 1_400 * MB
        device.begin_section()
        assert device.section_peak_bytes() == 900 * MB
        driver.allocate(50 * MB)
        assert (device.section_peak_bytes(), device.peak_bytes) == (950 * MB, 1_400 * MB)
        device.check_budget()
        device.release()
        assert driver.emptied == 1
    assert driver.cap == driver.total(), "the allocator is free again"
    assert device.peak_bytes == 1_400 * MB


def test_scope_allocator_leaves_the_context_out() -> None:
    driver = Driver()
    with CudaDevice(300 * MB, scope="allocator", driver=driver) as device:
        assert device.fixed_bytes == 0
        assert driver.cap == 300 * MB
        driver.allocate(98 * MB)
        assert device.peak_bytes == 100 * MB


def test_libraries_that_are_loaded_later_are_taken_from_the_allocator() -> None:
    driver = Driver()
    with CudaDevice(1_000 * MB, driver=driver) as device:
        driver.allocate(500 * MB)
        driver.context += 60 * MB
        device.begin_section()
        assert device.fixed_bytes == 460 * MB
        assert driver.cap == 540 * MB
        driver.context += 50 * MB
        device.begin_section()
        with pytest.raises(MemoryError, match="1012000000 bytes in use, above the budget of 1000000000"):
            device.check_budget()


def test_what_others_take_meanwhile_is_not_ours() -> None:
    driver = Driver(knows_process=False)
    with CudaDevice(1_000 * MB, driver=driver) as device:
        driver.others += 3_000 * MB
        device.begin_section()
        assert device.fixed_bytes == 400 * MB
        assert driver.cap == 600 * MB


def test_a_budget_below_the_context_is_refused() -> None:
    with pytest.raises(
        BudgetError,
        match=r"the CUDA context alone holds 400\.0 MB on the device, and --max-gpu-mem is 300\.0 MB; "
        r"give more, or --budget-scope allocator to leave the context out",
    ):
        CudaDevice(300 * MB, driver=Driver()).open()


def test_a_budget_above_the_device_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"--max-gpu-mem 9\.00 GB is more than the device has, 8\.00 GB; give less"):
        CudaDevice(9_000 * MB, driver=Driver()).open()


def test_a_gpu_that_is_not_there_is_refused() -> None:
    found = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=rf"--device cuda:9: found {found} CUDA devices here; give --device cpu"):
        CudaDevice(1_000 * MB, index=9).open()


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("method", ["pnn", "exact", "backprop"])
def test_a_run_on_a_gpu_stays_within_its_budget(method: str, tmp_path: Path) -> None:
    data = images(64)
    result = lowmem_pnn.fit(
        small_conv, data, max_gpu_mem="2GB", device="cuda", method=method, workdir=tmp_path / "run", epochs=2, test=data
    )
    # The peak is the allocator's and what NVML says that the process holds beside it.
    assert 0 < result.peak_bytes <= 2_000_000_000
    assert result.device == torch.cuda.get_device_name(0)
    with torch.no_grad():
        scores = loaded(small_conv, result.weights_file)(data[0])
    assert result.test_accuracy == pytest.approx(float((scores.argmax(1) == data[1]).float().mean()), abs=0.02)


@pytest.mark.gpu
@gpu
def test_a_run_on_a_gpu_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    from lowmem_pnn.errors import Stopped
    from lowmem_pnn.progress import Display

    def run(folder: Path, display: Display, **options: bool) -> Callable[[], torch.nn.Module]:
        result = lowmem_pnn.fit(
            small_conv, images(64), max_gpu_mem="2GB", device="cuda", workdir=folder, epochs=3, cuts="2", commit_every=0,
            display=display, batch_size=16, **options,
        )  # fmt: skip
        return lambda: loaded(small_conv, result.weights_file)

    class Stops(Display):
        def end_epoch(self, line: object) -> None:
            raise Stopped("enough")

    whole = run(tmp_path / "whole", Display())()
    with pytest.raises(Stopped):
        run(tmp_path / "run", Stops())
    resumed = run(tmp_path / "run", Display(), resume=True)()
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())


@pytest.mark.gpu
@gpu
def test_exact_on_a_gpu_is_as_backprop_with_its_dropout(tmp_path: Path) -> None:
    def weights(method: str, **options: str) -> dict[str, torch.Tensor]:
        result = lowmem_pnn.fit(
            small_conv, images(64), max_gpu_mem="2GB", device="cuda", workdir=tmp_path / method, method=method, epochs=2, batch_size=16,
            micro_batch=8, optimizer="sgd", **options,
        )  # fmt: skip
        return loaded(small_conv, result.weights_file).state_dict()

    expected = weights("backprop")
    # Kernels on a GPU may add up in another order each time; another dropout would be far away.
    for name, tensor in weights("exact", cuts="1,2,3").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
