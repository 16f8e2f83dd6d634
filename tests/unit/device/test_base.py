"""Devices: errors that count as out of memory, the CPU's floor, meter and memory limit, and the simulated device."""

import pytest
import torch

from lowmem_pnn.device import is_out_of_memory, why_it_failed
from lowmem_pnn.device.budget import OverBudget, other_cause


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OverBudget("12 bytes in use, above the budget of 10"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
        RuntimeError(
            'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":1131, please report a bug to PyTorch.'
        ),
    ],
    ids=str,
)
def test_out_of_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("can't allocate memory"),
        RuntimeError("could not create a primitive descriptor for the LSTM forward propagation primitive. Run workload"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_what_a_library_said_is_told_where_it_may_mean_something_else() -> None:
    failed = RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED\nat conv")
    assert other_cause(failed) == "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED at conv"
    assert other_cause(RuntimeError("CUDA error: out of memory")) == ""


def test_a_missing_kernel_is_named_with_what_to_do() -> None:
    error = RuntimeError("could not create a primitive descriptor for the LSTM forward propagation primitive. Run workload")
    assert (
        why_it_failed(error) == "this processor has no kernel for its LSTM in the type that it computes in; give --precision fp32"
    )
    assert why_it_failed(ValueError("shapes\ndiffer")) == "ValueError: shapes differ; mend its forward"
