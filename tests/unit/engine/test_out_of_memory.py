"""Out of memory: what it is told for in the end, where a library's words may have meant something else."""

import pytest

from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.engine.out_of_memory import too_large, unless_out_of_memory


def raising(error: Exception) -> None:
    def work() -> int:
        raise error

    assert unless_out_of_memory(work) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: out of memory"), ""),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
            " (the library said: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED)",
        ),
        (MemoryError(), ""),
    ],
    ids=["plain", "ambiguous", "ours"],
)
def test_the_words_of_a_library_are_in_the_error_where_nothing_smaller_helped(error: Exception, said: str) -> None:
    raising(error)
    with SimulatedDevice(1_000_000) as device:
        assert str(too_large(device, "for it")) == (
            f"memory ran out for it: 0 B of 1.0 MB were in use{said}; begin a new run with a larger --max-gpu-mem, or more partitions"
        )
