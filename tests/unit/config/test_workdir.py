"""Folders of runs: names that no shell minds, and the first that is free."""

from pathlib import Path

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.workdir import next_workdir, run_name


def test_next_workdir_is_the_first_that_is_free(tmp_path: Path) -> None:
    config = configure(max_gpu_mem="1GB", data="digits", model="some where/net.py:build")
    assert run_name(config) == "net.py-build-pnn"
    assert next_workdir(config, tmp_path).name == "net.py-build-pnn-1"
    (tmp_path / "net.py-build-pnn-1").mkdir()
    assert next_workdir(config, tmp_path).name == "net.py-build-pnn-2"
