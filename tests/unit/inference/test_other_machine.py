"""Options of a run on another machine than it was trained on."""

import pytest

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.inference import other_machine
from lowmem_pnn.inference.other_machine import options_here


def trained(**options: object) -> FitConfig:
    return configure(max_gpu_mem="1GB", model="mlp:64-10", data="digits", method="exact", **options)


def test_what_a_gpu_alone_reads_is_left_out_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = trained(tf32=True, budget_scope="allocator", max_host_mem="2GB")
    monkeypatch.setattr(other_machine, "is_gpu", lambda device: device != "cpu")
    assert options_here(config, None, None) == config
    assert options_here(config, None, "cpu") == trained(device="cpu")
    assert options_here(trained(device="cuda:1"), None, None).device == "cuda:1", "which is refused, unless another is given"


def test_layers_run_as_they_are_where_the_compiler_may_be_missing() -> None:
    assert not options_here(trained(compile=True, device="cpu"), None, None).compile


def test_another_budget_is_a_size_or_a_share_and_another_device_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_pnn.memory.available.bytes_for_budget", lambda device: 10**9 if device == "cpu" else 2 * 10**9)
    assert options_here(trained(), "75%", "cpu").max_gpu_mem == 750_000_000
    assert options_here(trained(device="cpu"), "auto", None).max_gpu_mem == 800_000_000
    assert options_here(trained(), "200MB", "cpu").max_gpu_mem == 200_000_000
    with pytest.raises(ConfigError, match=r"^--max-gpu-mem: 'much' is not a size"):
        options_here(trained(), "much", None)
    with pytest.raises(ConfigError, match=r"^--device 'gpu' is none of auto, cpu, cuda, cuda:INDEX; did you mean 'cuda'\?$"):
        options_here(trained(), None, "gpu")
