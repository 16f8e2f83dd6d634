"""The shape of the project: imports point one way, public names exist, documents are true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem_pnn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowmem_pnn"

# Each line may import from the lines below it, and from its own.
LEVELS = [
    ["__main__"],
    ["cli", "supervisor"],
    ["trainer"],
    ["lifecycle", "exporting"],
    ["preflight", "walk"],
    ["sweeping", "warming"],
    ["joining", "exits", "measuring", "logbook", "retreat"],
    ["run", "sweeper"],
    ["prospects"],
    ["sweep_steps"],
    ["planning", "initialisation", "opening"],
    ["progress"],
    ["clocks"],
    ["report", "footprint", "inputs"],
    ["rates", "nominal"],
    ["forecast"],
    ["workload", "scores", "state"],
    ["executor"],
    ["stage", "arrivals", "uploads"],
    ["feeds", "crossing", "stepping"],
    ["passes", "early_stop", "supply", "computation"],
    ["residency"],
    ["methods"],
    ["planner", "profiler", "compiling"],
    ["grouping", "likeness", "fakebench"],
    ["partitioning"],
    ["device", "costs", "optimizers", "options", "ranks"],
    ["config", "plans"],
    ["chain", "tracer", "dataflow", "stores", "sources", "short_state", "seeds", "schedules", "streams"],
    ["numerics"],
    ["units", "errors", "stalls", "__init__"],
]


def _noun(module: str) -> str:
    """The part of a module's name that LEVELS lists."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lowmem_pnn"):
            if node.module == "lowmem_pnn":
                # A submodule, or a public name of the package.
                found |= {alias.name for alias in node.names if _is_module(alias.name)}
            else:
                found.add(_noun(node.module))
        elif isinstance(node, ast.Import):
            found |= {_noun(alias.name) for alias in node.names if alias.name.startswith("lowmem_pnn.")}
    return found


def _is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()


def test_every_module_has_its_level() -> None:
    listed = {noun for level in LEVELS for noun in level}
    there = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there == listed


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    level = {noun: number for number, nouns in enumerate(LEVELS) for noun in nouns}
    own = path.stem if path.parent == PACKAGE else path.parent.name
    if own == "__init__":
        pytest.skip("the package's lazy public names")
    upward = {noun for noun in _imports(path) if level[noun] < level[own]}
    assert not upward, f"{own} imports {sorted(upward)}, which stand above it"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_says_what_it_is_in_one_line(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring is not None
    assert docstring.splitlines()[0].endswith((".", ":", ")."))


def test_all_is_complete() -> None:
    for name in lowmem_pnn.__all__:
        assert getattr(lowmem_pnn, name) is not None
    public = {name for name in vars(lowmem_pnn) if not name.startswith("_")}
    submodules = {name for name in public if _is_module(name)}
    assert public - submodules - {"TYPE_CHECKING", "Any"} <= set(lowmem_pnn.__all__)


def test_help_does_not_import_torch() -> None:
    code = "import sys\nfrom lowmem_pnn.cli import cli\ntry:\n    cli(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_readme_has_the_two_commands_and_ci_runs_the_test_one() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "lowmem-pnn fit --max-gpu-mem 2GB" in readme
    for text in (readme, ci):
        assert "-e '.[dev]'" in text
        assert "python -m pytest" in text.replace('"$venv/bin/python"', "python")


def test_architecture_names_every_file() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    missing = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" and path.name not in text]
    assert not missing, f"ARCHITECTURE.md does not mention {missing}"


def test_nothing_names_this_machine() -> None:
    files = [path for pattern in ("*.md", "*.toml", "*.cfg", "*.py") for path in ROOT.rglob(pattern) if ".venv" not in path.parts]
    assert files
    for path in files:
        if path != Path(__file__):
            assert not re.search(r"/(root|home/\w+|work/main)/", path.read_text()), path
