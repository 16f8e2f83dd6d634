"""The examples and the README's Python run as a user would run them, but in this process, which has imported PyTorch."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from helpers.equal_models import cut_once

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.syspath_prepend(path.parent)
    with cut_once():  # an example opens its model again and again
        runpy.run_path(str(path), run_name="__main__")
    assert "plain PyTorch, same weights" in capsys.readouterr().out


def test_python_in_readme_and_documents_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = [block for file in files for block in re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL)]
    assert len(blocks) >= 3
    with cut_once():
        exec("\n".join(blocks), {"__name__": "__main__"})
    assert "budget  100.0 MB" in capsys.readouterr().out
