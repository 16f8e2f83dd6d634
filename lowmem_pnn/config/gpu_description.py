"""The description of a GPU that is not here, as `plan --gpu` takes it."""

from dataclasses import dataclass

from lowmem_pnn.errors import ConfigError, UnitError
from lowmem_pnn.units import parse_bytes

_EXAMPLE = "8GB,pcie=12,tflops=10,disk=2.5,ram=16GB"
_LEAST_BYTES = 1_000_000
_SPEEDS = {"pcie": "GB/s between host and device", "tflops": "TFLOP/s of fp32", "disk": "GB/s of the drive"}


@dataclass(frozen=True, kw_only=True)
class GpuDescription:
    """A GPU, and the machine around it.

    Args:
        memory_bytes: memory of the device.
        pcie: rate between host and device, each way, in GB/s.
        tflops: computing rate in fp32 by the data sheet, in TFLOP/s; half of it is counted on.
        disk: rate of the drive, in GB/s.
        ram_bytes: memory of the host; None where it is not known.

    Example:
        >>> GpuDescription.parse("8GB,pcie=6,ram=16GB")
        GpuDescription(memory_bytes=8000000000, pcie=6.0, tflops=10.0, disk=2.5, ram_bytes=16000000000)
    """

    memory_bytes: int
    pcie: float = 12.0
    tflops: float = 10.0
    disk: float = 2.5
    ram_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> "GpuDescription":
        """Read a description: the memory, and after it what else is known, as KEY=NUMBER.

        Raises:
            ConfigError: the memory is missing, a key is unknown or given twice, or a value is no number or no size above 0.
        """
        first, *rest = (part.strip() for part in text.split(","))
        speeds: dict[str, float] = {}
        ram: int | None = None
        seen: set[str] = set()
        for part in rest:
            key, equals, value = (word.strip() for word in part.partition("="))
            if not equals or (key != "ram" and key not in _SPEEDS):
                raise ConfigError(
                    f"--gpu: {part!r} is none of {', '.join(f'{name}=N' for name in _SPEEDS)} and ram=SIZE; write {_EXAMPLE}"
                )
            if key in seen:
                raise ConfigError(f"--gpu: {key} is given twice; write {_EXAMPLE}")
            seen.add(key)
            if key == "ram":
                ram = _size(value, "the host's memory")
            else:
                speeds[key] = _rate(key, value)
        return cls(memory_bytes=_size(first, "the GPU's memory, which comes first,"), ram_bytes=ram, **speeds)

    def check_device(self, device: str) -> None:
        """Refuse a training device that is no GPU.

        Args:
            device: the device, as the option names it.

        Raises:
            ConfigError: it is the CPU.
        """
        if device == "cpu":
            raise ConfigError("--gpu describes a GPU to plan for, and --device cpu asks for the CPU; leave one of them out")


def _size(text: str, what: str) -> int:
    try:
        size = parse_bytes(text)
    except UnitError as error:
        raise ConfigError(f"--gpu: {what} is not a size ({error}); write {_EXAMPLE}") from None
    if size < _LEAST_BYTES:
        raise ConfigError(f"--gpu: {what} is {size} bytes, as {text} reads; write {_EXAMPLE}")
    return size


def _rate(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--gpu: {key}={text} is no number above 0 ({_SPEEDS[key]}); write {_EXAMPLE}")
    return value
