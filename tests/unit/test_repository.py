"""The shape of the project: imports point one way, public names exist, documents are true."""

import ast
import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import lowmem_pnn

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lowmem_pnn"

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))


def _generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generate()


def _place(path: Path) -> str:
    """What the order of imports calls a file: its folder, or itself in the package's root."""
    return path.stem if path.parent == PACKAGE else path.relative_to(PACKAGE).parts[0]


def test_the_order_of_imports_names_every_folder_and_file_of_the_root() -> None:
    there = {_place(path) for path in PYTHON_FILES} - {"__init__", "__main__"}
    assert there == set(generate.FOLDERS)


def test_imports_point_one_way_between_folders() -> None:
    order = {"__main__": -1, **{name: number for number, name in enumerate(generate.FOLDERS)}, "__init__": len(generate.FOLDERS)}
    for path in PYTHON_FILES:
        own = _place(path)
        if own == "__init__":
            continue  # the package's lazy public names
        upward = {_place(other) for other in generate.imported_modules(path) if order[_place(other)] < order[own]}
        assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}, which stand above it"


@pytest.mark.parametrize("folder", sorted({path.parent for path in PYTHON_FILES}), ids=lambda folder: folder.name)
def test_imports_point_one_way_inside_folders(folder: Path) -> None:
    assert generate.files_in_import_order(folder), "a folder holds files"


def test_folders_and_files_stay_small_enough_to_take_in() -> None:
    for folder in {path.parent for path in PYTHON_FILES}:
        files = [path for path in folder.iterdir() if path.is_file()]
        assert len(files) <= (12 if folder == PACKAGE else 20), f"{folder} holds {len(files)} files"
    for root, most in ((PACKAGE, 400), (ROOT / "tests", 600)):
        for path in root.rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= most, f"{path.relative_to(ROOT)} has {lines} lines, above {most}"


def test_every_file_says_what_it_is_in_one_line() -> None:
    for path, tree in ((path, generate.parsed(path)) for path in PYTHON_FILES):
        docstring = ast.get_docstring(tree)
        assert docstring is not None, path
        assert docstring.splitlines()[0].endswith((".", ":", ").")), path


def test_all_is_complete() -> None:
    for name in lowmem_pnn.__all__:
        assert getattr(lowmem_pnn, name) is not None
    public = {name for name in vars(lowmem_pnn) if not name.startswith("_")}
    submodules = {name for name in public if isinstance(getattr(lowmem_pnn, name), ModuleType)}
    assert public - submodules - {"TYPE_CHECKING", "Any"} <= set(lowmem_pnn.__all__)


def test_readme_has_the_two_commands_and_ci_runs_the_test_one() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "lowmem-pnn fit --max-gpu-mem 2GB" in readme
    for text in (readme, ci):
        assert "-e '.[dev]'" in text
        assert "python -m pytest" in text.replace('"$venv/bin/python"', "python")


def test_architecture_lists_the_files_as_they_are() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert text == generate.with_file_list(text), "run python docs/generate.py"


def test_the_page_of_networks_is_what_the_bench_found() -> None:
    assert (ROOT / "docs" / "models.md").read_text() == generate.models_page(), "run python docs/generate.py"


def test_nothing_names_this_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("a checkout without git")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert ROOT / "README.md" in files
    for path in files:
        if path != Path(__file__) and path.suffix != ".png" and path.is_file():
            assert not re.search(rb"/(root|home/\w+|work/main)/", path.read_bytes()), path


def test_a_runs_state_changes_in_run_alone() -> None:
    def is_of_state(target: ast.expr) -> bool:
        """Whether a target of an assignment is a part of something called `state`."""
        while isinstance(target, ast.Attribute | ast.Subscript):
            target = target.value
            if isinstance(target, ast.Attribute) and target.attr == "state":
                return True
        return False

    for path, tree in ((path, generate.parsed(path)) for path in PYTHON_FILES):
        if _place(path) == "run" or "run" not in set(map(_place, generate.imported_modules(path))):
            continue  # here it may, or there is none
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
            assert not any(map(is_of_state, targets)), f"{path.relative_to(ROOT)}:{node.lineno} changes a run's state"
