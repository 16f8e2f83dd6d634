"""The start of a run: when it is to stop."""

from lowmem_pnn.config.configure import configure
from lowmem_pnn.training.start import _or_late


def test_a_time_limit_counts_what_processes_that_died_have_spent() -> None:
    config = configure(max_gpu_mem="100MB", model="mlp:20-3", data="digits", time_limit="1h")
    assert not _or_late(lambda: False, config)()
    assert not _or_late(lambda: False, config, 3500.0)()
    assert _or_late(lambda: False, config, 3600.0)()
