"""The description of a GPU that is not here: what is read, and what is refused in one line."""

import pytest

import lowmem_pnn
from lowmem_pnn.config.gpu_description import GpuDescription
from lowmem_pnn.errors import ConfigError

SHOWN = "; write 8GB,pcie=12,tflops=10,disk=2.5,ram=16GB"


def test_the_memory_is_enough() -> None:
    assert GpuDescription.parse("6GiB") == GpuDescription(memory_bytes=6 << 30, pcie=12, tflops=10, disk=2.5, ram_bytes=None)


def test_all_is_read_in_any_order_and_with_spaces() -> None:
    assert GpuDescription.parse("8GB, ram=16GB, disk=1, pcie = 6,tflops=0.5") == GpuDescription(
        memory_bytes=8 * 10**9, pcie=6, tflops=0.5, disk=1, ram_bytes=16 * 10**9
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "--gpu: the GPU's memory, which comes first, is not a size ('' is not a size; write 512MB or 512MiB)"),
        ("pcie=12", "--gpu: the GPU's memory, which comes first, is not a size ('pcie=12' is not a size; write 512MB or 512MiB)"),
        ("8", "--gpu: the GPU's memory, which comes first, is 8 bytes, as 8 reads"),
        ("8GB,16GB", "--gpu: '16GB' is none of pcie=N, tflops=N, disk=N and ram=SIZE"),
        ("8GB,vram=8GB", "--gpu: 'vram=8GB' is none of pcie=N, tflops=N, disk=N and ram=SIZE"),
        ("8GB,pcie=fast", "--gpu: pcie=fast is no number above 0 (GB/s between host and device)"),
        ("8GB,tflops=0", "--gpu: tflops=0 is no number above 0 (TFLOP/s of fp32)"),
        ("8GB,disk=inf", "--gpu: disk=inf is no number above 0 (GB/s of the drive)"),
        ("8GB,disk=nan", "--gpu: disk=nan is no number above 0 (GB/s of the drive)"),
        ("8GB,ram=much", "--gpu: the host's memory is not a size ('much' is not a size; write 512MB or 512MiB)"),
        ("8GB,pcie=1,pcie=2", "--gpu: pcie is given twice"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GpuDescription.parse(text)
    assert str(caught.value) == words + SHOWN


def test_the_cpu_is_no_gpu_to_plan_for() -> None:
    with pytest.raises(ConfigError, match=r"^--gpu describes a GPU to plan for, and --device cpu asks for the CPU; leave one"):
        lowmem_pnn.plan("mlp:64-10", "digits", gpu="8GB", device="cpu")
