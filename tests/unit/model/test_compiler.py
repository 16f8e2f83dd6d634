"""The compiler's requirements: a tested version of torch."""

import pytest
import torch

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.compiler import check_compiler


@pytest.mark.parametrize("version", ["2.13.0", "2.15.0+cu130", "2.140.0", "3.0.0a0+git1234"])
def test_a_version_of_torch_that_was_not_tested_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ConfigError) as refused:
        check_compiler()
    assert str(refused.value) == (
        f"--compile is tested with torch 2.14.x, and this is torch {version}; leave --compile out or install a tested version"
    )


def test_the_installed_version_is_a_tested_one() -> None:
    check_compiler()
