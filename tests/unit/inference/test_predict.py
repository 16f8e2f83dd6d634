"""Prediction: what the arrays of a model that returns several tensors are called."""

from types import SimpleNamespace
from typing import Any

from lowmem_pnn.inference.predict import _output_names


def test_names_of_outputs_are_files_that_nothing_else_is_called() -> None:
    def named(*names: str) -> list[str]:
        chain: Any = SimpleNamespace(output_form=SimpleNamespace(names=names))
        return _output_names(chain)

    assert named("0") == ["outputs"]
    assert named("h", "0", "masks.1") == ["h", "output_0", "masks.1"]
    assert named("aux/z", "aux_z", "targets", "files") == ["aux_z", "aux_z_", "output_targets", "output_files"]
