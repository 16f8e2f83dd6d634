"""Imports for sources: factories in files and modules, and a torchvision that does not import."""

from pathlib import Path

import pytest

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.sources import imports
from lowmem_pnn.sources.imports import import_torchvision, load_factory


def write(folder: Path, text: str, name: str = "net.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path, "box = []\ndef a():\n    return box\ndef b():\n    return box\n")
    assert load_factory(f"{path}:a")() is load_factory(f"{path}:b")()
    write(tmp_path, "def a():\n    return 'changed'\n")
    assert load_factory(f"{path}:a")() == "changed"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), r"torch .* and torchvision .* do not match.*nms.*pip install"),
        (AttributeError("partially initialized module 'torchvision'"), r"do not match: importing torchvision failed with Attr"),
        (ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), r"torchvision is not installed; run: "),
        (ModuleNotFoundError("No module named 'PIL'", name="PIL"), r"torchvision needs 'PIL'.*; run: pip install PIL"),
    ],
)  # fmt: skip
def test_a_torchvision_that_does_not_import(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(imports.importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=message):
        import_torchvision("models")
