"""On an NVIDIA GPU: runs within the budget, copies beside the computing, stores and optimizers on its tensors."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem_pnn
from helpers.activation_stores import SAMPLE_BYTES, SPECS, read, samples
from helpers.plainloops import loaded
from helpers.quantized_state import PARAMETER_SHAPES, numbers, parameters, quantized, zeros
from helpers.small_networks import images, small_conv
from helpers.tensors import bits, random_tensor
from lowmem_pnn.device import CudaDevice
from lowmem_pnn.device.cuda_driver import CudaCopies
from lowmem_pnn.errors import BudgetError, Stopped
from lowmem_pnn.memory.aligned import aligned_empty
from lowmem_pnn.memory.nvml import Nvml
from lowmem_pnn.optim.low_precision import PIECE_SIZE, Int8, pieces
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.tensor_file import TensorFile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

MB = 10**6
TESTS = Path(__file__).parents[1]


def test_tensors_on_the_gpu_are_appended(tmp_path, pool):
    tensors, labels = samples(SPECS, 20)
    with ActivationWriter(tmp_path / "a", SPECS, 20, 4 * SAMPLE_BYTES, pool) as writer:
        writer.append(tuple(tensor.cuda() for tensor in tensors), labels)
    [(back, _)] = read(ActivationStore.open(tmp_path / "a"), 20, pool)
    assert [bits(tensor) for tensor in back] == [bits(tensor) for tensor in tensors]


def test_pinned_tensors_are_aligned_and_filled_from_files(tmp_path):
    pinned = aligned_empty((5, 7), torch.float16, pin=True)
    assert pinned.is_pinned()
    assert pinned.data_ptr() % 64 == 0
    with TensorFile.create(tmp_path / "x", {"x": (torch.float16, (5, 7))}) as file:
        tensor = random_tensor(torch.float16, (5, 7))
        file.write_from("x", tensor)
        file.read_into("x", pinned)
    assert bits(pinned) == bits(tensor)


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


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"optimizer_state": "int8"},
        {"clip_norm": 0.1, "cuts": "1,2,3"},
        {"cuts": "1,2,3", "micro_batch": 4},
        {"tf32": True},
    ],
    ids=str,
)
def test_options_on_a_gpu_train_as_on_the_cpu(options: dict[str, Any], tmp_path: Path) -> None:
    # Steps of SGD are as long as gradients are, so that other gradients show; quantized state is one of Adam's.
    rate = {"lr": 0.01} if "optimizer_state" in options else {"optimizer": "sgd", "lr": 0.1}

    def weights(device: str, **given: Any) -> Tensor:
        result = lowmem_pnn.fit(
            without_dropout, images(64), max_gpu_mem="2GB", device=device, method="exact", epochs=2, batch_size=16, val_fraction=0,
            workdir=tmp_path / f"{device}{len(given)}", **rate, **given,
        )  # fmt: skip
        return values(loaded(without_dropout, result.weights_file))

    torch.manual_seed(0)
    start, without = values(without_dropout()), weights("cuda")
    expected = weights("cpu", **{name: value for name, value in options.items() if name != "tf32"})
    found, moved = weights("cuda", **options), (expected - start).norm()
    # Kernels round differently: in bf16 and fp16 these weights are 0.03 and 0.04 from those in fp32. Untrained ones would be 1 away.
    is_coarse = bool({"precision", "tf32", "optimizer_state"} & options.keys())
    assert (found - expected).norm() < (0.1 if is_coarse else 0.05) * moved
    # Without the option they are elsewhere: by its rounding, or, where it is another gradient, further than kernels round.
    assert not torch.equal(found, without)
    if "clip_norm" in options or "micro_batch" in options:
        assert (without - expected).norm() > 0.1 * moved


def values(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def without_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 16, 32), nn.ReLU(),
        nn.Linear(32, 4),
    )  # fmt: skip


def test_what_the_process_holds_seen_from_outside_stays_within_the_budget(tmp_path: Path) -> None:
    """Two runs of one process, the second with a context that is there; NVML is asked by this one, whatever it knows of processes."""
    nvml = Nvml.find(0)
    before = None if nvml is None else nvml.used_bytes()
    if nvml is None or before is None:
        pytest.skip("NVML does not know this device")
    code = (
        "import lowmem_pnn, torch\n"
        "from helpers.small_networks import images, small_conv\n"
        "for number in range(2):\n"
        f"    options = dict(max_gpu_mem='1GB', device='cuda', epochs=20, workdir={str(tmp_path / 'run')!r} + str(number))\n"
        "    result = lowmem_pnn.fit(small_conv, images(64), **options)\n"
        "    assert result.context['bytes'] >= 250_000_000, result.context\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    highest = before
    while process.poll() is None:
        highest = max(highest, nvml.used_bytes() or 0)
        time.sleep(0.005)
    assert process.returncode == 0
    assert 0 < highest - before <= 1_000 * MB


def test_the_smallest_budget_that_is_named_on_a_gpu_works(tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cuda", "method": "exact", "budget_scope": "allocator", "epochs": 1, "batch_size": 16}
    with pytest.raises(BudgetError) as caught:
        lowmem_pnn.fit(small_conv, images(64), max_gpu_mem="2MB", workdir=tmp_path / "small", **options)
    assert caught.value.enough_bytes is not None
    result = lowmem_pnn.fit(small_conv, images(64), max_gpu_mem=caught.value.enough_bytes, workdir=tmp_path / "enough", **options)
    assert result.peak_bytes <= caught.value.enough_bytes


def test_a_gpu_that_gets_fuller_is_gone_on_with_in_smaller_micro_batches(tmp_path: Path) -> None:
    class Fills(Display):
        """Leaves the allocator a little more than it holds, from the second epoch on."""

        def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
            if epoch == 1:
                torch.cuda.empty_cache()
                size = torch.cuda.memory_reserved() + 24 * MB
                torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)

    def wide() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
                             nn.Linear(64 * 64 * 64, 4))  # fmt: skip

    data = torch.rand(32, 3, 64, 64), torch.arange(32) % 4
    result = lowmem_pnn.fit(
        wide, data, max_gpu_mem="3GB", device="cuda", method="backprop", workdir=tmp_path / "run", epochs=2, batch_size=32, val_fraction=0,
        display=Fills(),
    )  # fmt: skip
    assert result.oom_retries > 0


def test_a_run_on_a_gpu_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

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


def test_copies_overlap_the_computing_in_a_trace(tmp_path: Path) -> None:
    """Micro-batches of 32 MB go up, each while products of some milliseconds are computed from the one before."""
    from torch.profiler import ProfilerActivity, profile

    from lowmem_pnn.engine.uploads import MicroBatch, Uploads

    with CudaDevice(4_000 * MB) as device:
        uploads = Uploads(device)
        batches = [((torch.randn(2048, 4096),), torch.zeros(2048, dtype=torch.int64)) for _ in range(8)]
        pieces: list[MicroBatch | None] = [MicroBatch.of(batch, slice(0, 2048)) for batch in batches]
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


def test_quantized_state_on_a_gpu() -> None:
    values = numbers(PIECE_SIZE + 300, 0, 3.0)
    for signed in (True, False):
        own, codec = (values if signed else values.abs()), Int8("m", signed)
        state = {key: tensor.cuda() for key, tensor in quantized(codec, torch.zeros_like(own)).items()}
        generator = torch.Generator("cuda")
        for piece in pieces(len(own)):
            codec.quantize(state, piece, own[piece].cuda(), generator)
        assert all(torch.equal(state[key].cpu(), tensor) for key, tensor in quantized(codec, own).items())
    for kind in ("bf16", "int8"):
        spec = OptimizerSpec("adamw", state=kind, seed=2)  # type: ignore[arg-type]
        found = []
        for _ in range(2):
            ours = {name: nn.Parameter(parameter.detach().cuda()) for name, parameter in parameters(*PARAMETER_SHAPES).items()}
            state = {name: {key: tensor.cuda() for key, tensor in one.items()} for name, one in zeros(spec, ours).items()}
            for parameter in ours.values():
                parameter.grad = parameter.detach().sin()
            spec.build(ours, state).step()
            found.append([*ours.values(), *(tensor for one in state.values() for tensor in one.values())])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
