"""The GPU: its budget's accounting with a driver of our own making, and, where there is one, a real run."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowmem_pnn
from helpers.plainloops import loaded
from helpers.small_networks import images, small_conv
from lowmem_pnn.device import CudaDevice
from lowmem_pnn.device.cuda import CudaCopies
from lowmem_pnn.device.simulated import DelayedCopies
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

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copies(self) -> DelayedCopies:
        return DelayedCopies()

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


def test_page_locked_memory_counts_as_the_hosts() -> None:
    with CudaDevice(1_600 * MB, driver=Driver()) as device:
        assert device.transfers is not None
        before = device.host_peak_bytes
        piece = device.transfers.empty((1000,), torch.float32)
        assert device.host_peak_bytes >= before + device.transfers.slab.size
        assert device.transfers.slab.size == 1 << 26
        assert device.transfers.slab.owns(piece)


def test_a_copy_waits_for_what_was_computed_and_what_is_computed_then_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few calls of torch.cuda, in their order: there may be no GPU here."""
    log: list[tuple[object, ...]] = []
    current = ["computing"]

    class Event:
        def __init__(self, of: str) -> None:
            self.of = of

        def synchronize(self) -> None:
            log.append(("host waits for", self.of))

        def query(self) -> bool:
            return False

    class Stream:
        names = iter(["up", "down"])

        def __init__(self, device: object = None, name: str | None = None) -> None:
            self.name = name or next(self.names)

        def wait_stream(self, other: "Stream") -> None:
            log.append((self.name, "waits for", other.name))

        def wait_event(self, event: Event) -> None:
            log.append((self.name, "waits for", event.of))

        def record_event(self) -> Event:
            log.append((self.name, "marks"))
            return Event(self.name)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, current[0] = current[0], stream.name
        yield
        current[0] = before

    class Target(Tensor):
        def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
            log.append((current[0], "copies", non_blocking))
            return super().copy_(source)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name=current[0]))
    monkeypatch.setattr(torch.cuda, "stream", on)
    copies = CudaCopies(torch.device("cuda", 0))
    target = torch.zeros(3).as_subclass(Target)
    event = copies.upload(torch.ones(3), target)
    assert target.tolist() == [1, 1, 1]
    assert not event.is_complete()
    event.block_computing()
    event.wait()
    copies.download(torch.ones(3), target)
    assert log == [
        ("up", "waits for", "computing"), ("up", "copies", True), ("up", "marks"), ("computing", "waits for", "up"),
        ("host waits for", "up"), ("down", "waits for", "computing"), ("down", "copies", True), ("down", "marks"),
    ]  # fmt: skip


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
    from lowmem_pnn.reporting.progress import Display

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


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("options", [{"method": "pnn", "cuts": "2"}, {"method": "exact", "cuts": "1,2,3"}], ids=["pnn", "exact"])
def test_copies_beside_the_computing_give_the_same_weights_as_synchronous_ones(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def weights(folder: str) -> dict[str, Tensor]:
        result = lowmem_pnn.fit(
            small_conv, images(64), max_gpu_mem="2GB", device="cuda", workdir=tmp_path / folder, epochs=2, batch_size=16,
            micro_batch=8, **options,
        )  # fmt: skip
        assert 0 < result.peak_bytes <= 2_000_000_000
        return loaded(small_conv, result.weights_file).state_dict()

    expected = weights("beside")
    copy = CudaCopies._copy

    def synchronously(self: CudaCopies, stream: torch.cuda.Stream, source: Tensor, target: Tensor) -> Any:
        torch.cuda.synchronize()
        event = copy(self, stream, source, target)
        torch.cuda.synchronize()
        return event

    monkeypatch.setattr(CudaCopies, "_copy", synchronously)
    for name, tensor in weights("synchronous").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.gpu
@gpu
def test_copies_in_flight_on_a_gpu_are_never_overwritten_and_stay_within_the_limit() -> None:
    with CudaDevice(2_000 * MB) as device:
        transfers = device.transfers
        assert transfers is not None
        weight = torch.randn(2048, 2048, device=device.torch_device)
        downloads = []
        for number in range(200):
            upload = device.upload([torch.full((512, 2048), float(number))])
            product = weight @ weight  # keeps the device busy while the copy goes on
            assert upload is not None
            (tensor,) = upload.get()
            downloads.append((number, device.download(tensor + 1)))
            del tensor, product
            assert 0 < transfers.in_flight_bytes <= 2_000 * MB // 32
            if len(downloads) > 3:
                number, download = downloads.pop(0)
                host = download.get()
                assert (float(host.min()), float(host.max())) == (number + 1, number + 1)
                del host, download
        device.finish_transfers()
        assert transfers.in_flight_bytes == 0
        assert device.peak_bytes <= 2_000 * MB


@pytest.mark.gpu
@gpu
def test_copies_overlap_the_computing_in_a_trace(tmp_path: Path) -> None:
    """Micro-batches of 32 MB go up, each while products of some milliseconds are computed from the one before."""
    from torch.profiler import ProfilerActivity, profile

    from lowmem_pnn.engine.uploads import Piece, Uploads

    with CudaDevice(4_000 * MB) as device:
        uploads = Uploads(device)
        batches = [((torch.randn(2048, 4096),), torch.zeros(2048, dtype=torch.int64)) for _ in range(8)]
        pieces: list[Piece | None] = [Piece.of(batch, slice(0, 2048)) for batch in batches]
        weight = torch.randn(4096, 4096, device=device.torch_device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            for now, then in zip(pieces, [*pieces[1:], None], strict=True):
                assert now is not None
                (x,) = uploads.take(now, then)
                for _ in range(20):
                    x = x @ weight
                    x = x / x.norm()
                torch.cuda.current_stream().synchronize()  # as the loss is read
                del x
        trace.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"] and event["dur"] > 100]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert len(copies) == len(batches)
    assert all("Pinned" in event["name"] for event in copies)
    overlapped = 0.0
    for copy in copies[1:]:
        begin, end = copy["ts"], copy["ts"] + copy["dur"]
        overlapped += sum(max(0.0, min(end, one["ts"] + one["dur"]) - max(begin, one["ts"])) for one in kernels)
    assert overlapped > 0.5 * sum(copy["dur"] for copy in copies[1:])
