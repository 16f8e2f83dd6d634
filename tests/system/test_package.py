"""The packages that are published: both hold what they should, and say it in a form that the index takes."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
PARTS = ("lowmem_pnn", "tests", "docs", "examples", "bench")

pytestmark = pytest.mark.skipif(int(setuptools.__version__.partition(".")[0]) < 77, reason="pyproject.toml needs setuptools 77")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("dist")
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "_build", "site")
    source.mkdir()
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=leave)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    code = f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def files_of(*parts: str) -> set[str]:
    paths = (path for part in parts for path in (ROOT / part).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if not {"__pycache__", "_build", "site"} & set(path.parts[:-1])}


def test_the_source_holds_tests_documents_and_examples(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of(*PARTS) - names == set()
    assert {"README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "setup.cfg"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".pyo"))]


def test_the_wheel_holds_the_package_alone(built: Path) -> None:
    (file,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(file).namelist() if ".dist-info/" not in name}
    assert names == files_of("lowmem_pnn")


def test_the_index_takes_both(built: Path) -> None:
    pytest.importorskip("twine")
    files = [str(path) for path in built.iterdir()]
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
