"""The process: when it is to stop."""

from lowmem_pnn.config.configure import configure
from lowmem_pnn.run.process import Process


def test_a_time_limit_counts_what_processes_that_died_have_spent() -> None:
    config = configure(max_gpu_mem="100MB", model="mlp:20-3", data="digits", time_limit="1h")
    assert not Process().stop_or_limit(config)()
    assert not Process(seconds_spent=3500.0).stop_or_limit(config)()
    assert Process(seconds_spent=3600.0).stop_or_limit(config)()
