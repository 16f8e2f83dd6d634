"""Which GPUs a build of PyTorch can use, and what is said of one that it cannot."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_pnn.cli import doctor
from lowmem_pnn.cli.doctor import Findings
from lowmem_pnn.cli.options import command_options
from lowmem_pnn.config.configure import configure
from lowmem_pnn.device import CpuDevice, CudaDevice, support
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.memory.available import available_bytes
from lowmem_pnn.run.ranks import ALONE, Rank
from lowmem_pnn.training import setup

OLD = (
    r"GTX 1080 has compute capability 6\.1, and torch .* is built for 7\.5, 8\.0, 12\.0; "
    r"pip install torch torchvision --index-url https://download\.pytorch\.org/whl/cu126"
)


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is older than this build of PyTorch."""
    properties = SimpleNamespace(name="GTX 1080", major=6, minor=1, uuid="a", total_memory=8 * 10**9, is_integrated=0)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda index: (6, 1),
        "get_device_name": lambda index: "GTX 1080",
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_120"],
        "get_device_properties": lambda index: properties,
        "mem_get_info": lambda index: (7 * 10**9, 8 * 10**9),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


@pytest.mark.usefixtures("old_gpu")
def test_a_gpu_without_kernels_is_refused_or_left_and_named() -> None:
    with pytest.raises(ConfigError, match=f"--device cuda:0: {OLD}"):
        CudaDevice(10**9).open()
    config = configure(max_gpu_mem="10MB", model="mlp:64-10", data="digits")
    assert setup._device_of(config, ALONE).kind == "cpu"
    assert setup._why_not_taken() == support.missing_kernels(0)
    assert support.budget_on("auto", "50%") == pytest.approx(available_bytes("cpu") / 2, rel=0.2), "of the device that trains"
    for device in ("auto", 0, None):  # a file of options may give anything
        line = command_options({"max_gpu_mem": "50%", "device": device})
        assert line["max_gpu_mem"] == pytest.approx(available_bytes("cpu") / 2, rel=0.2)
    found = Findings()
    doctor._device(found)
    assert "GTX 1080, compute capability 6.1, 7.00 GB of 8.00 GB free" in found.facts["gpu 0"]
    assert found.problems[0].startswith("gpu 0 cannot be used: GTX 1080 has compute capability 6.1")


def test_a_budget_above_what_is_free_beside_the_floor_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    display = SimpleNamespace(message=said.append)
    device = CpuDevice(6_400_000_000)
    device.floor_bytes = 3_400_000_000  # with a data set in arrays
    for free in (6_400_000_000, 5_000_000_000):
        monkeypatch.setattr(setup, "available_bytes", lambda free=free: free)
        setup._say_what_is_free(device, display)  # type: ignore[arg-type]
    assert said == [
        "the budget is 6.40 GB, and 5.00 GB are free beside libraries and data (3.40 GB): a run that needs more may be swapped or killed by the "
        "system; give less --max-gpu-mem"
    ]


def test_a_driver_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(nvmlInit=lambda: None, nvmlSystemGetCudaDriverVersion=lambda: 12040)
    monkeypatch.setitem(sys.modules, "pynvml", library)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(support, "has_driver", lambda: True)
    monkeypatch.setattr(setup, "has_driver", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    why = support.why_no_gpu()
    assert why.startswith("the driver knows CUDA 12.4, and torch ")
    assert why.endswith("/whl/cu126")
    assert setup._why_not_taken() == f"no GPU is taken, though there is a driver: {why}"
    found = Findings()
    doctor._device(found)
    assert found.problems == [f"there is an NVIDIA driver, and no GPU is taken: {why}"]
    assert found.facts["gpu"] == f"none: {why}"


def test_without_a_driver_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(setup, "has_driver", lambda: False)
    assert setup._why_not_taken() is None


def test_a_gpu_without_a_number_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="a", total_memory=1, is_integrated=0)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (asked.append(index), (10**9 * (index + 1), 1))[1])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert command_options({"max_gpu_mem": "50%", "device": "cuda"})["max_gpu_mem"] == 1_500_000_000
    assert command_options({"max_gpu_mem": "50%", "device": "cuda:1"})["max_gpu_mem"] == 1_000_000_000
    assert support.budget_on("cuda", "50%") == 500_000_000
    assert asked == [2, 1, 0]
    config = configure(max_gpu_mem="1GB", model="mlp:64-10", data="digits", device="cuda", max_host_mem="2GB")
    device = setup._device_of(config, Rank(2, 4, 2))
    assert isinstance(device, CudaDevice)
    assert (device.torch_device.index, device._max_host_mem) == (2, 2_000_000_000)


def test_builds_for_rocm_name_their_architectures_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.3")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx942"])
    assert support.missing_kernels(0) is None
    assert support.why_no_gpu() == "this torch is built for ROCm, and finds none"
