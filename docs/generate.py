"""Writes what is generated in the documents: the list of files in ARCHITECTURE.md, from each file's first docstring line.

python docs/generate.py           # writes it
python docs/generate.py --check   # says whether it is up to date: exit code 1 where it is not
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowmem_pnn"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- files: written by docs/generate.py -->", "<!-- end of files -->"

FOLDERS = (
    "cli", "page", "contenders", "api", "preview", "inference", "training", "exporting", "evaluation", "run", "planning", "reporting",
    "sweep", "engine", "workload", "methods", "tasks", "profiling", "compilation", "adapters", "pretrained", "device",
    "language", "stores", "samples", "formats", "zoo", "sources", "memory", "model", "quantization", "optim", "settings",
    "config", "partition_plan", "seeds", "units", "errors",
)  # fmt: skip
"""The folders of the package and the files beside them: imports point from the left to the right, never back."""


def first_line(path: Path) -> str:
    """Return the first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def imported_modules(path: Path) -> set[Path]:
    """Return the files of the package that a file imports, at its top or inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A name may be a module of the folder, or something that the folder's own __init__ gives.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {file for name in names if (file := _file_of(name)) is not None}
    return found


def _file_of(name: str) -> Path | None:
    """Return the file of a dotted name, or of the module that it is in; None where it is not the package's."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return None
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return file
    return None


def files_in_import_order(folder: Path) -> list[Path]:
    """Return a folder's files, each one before those of the same folder that it imports.

    Raises:
        ValueError: files of the folder import each other in a circle.
    """
    waiting = {path: imported_modules(path) for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"}
    ordered: list[Path] = []
    while waiting:
        imported = set().union(*(others - {path} for path, others in waiting.items()))
        tops = [path for path in waiting if path not in imported]
        if not tops:
            raise ValueError(f"files import each other in a circle: {', '.join(str(path.relative_to(ROOT)) for path in waiting)}")
        ordered += tops
        for path in tops:
            del waiting[path]
    return ordered


def file_list() -> str:
    """Return the list of files as Markdown, in the order of imports."""
    lines = []
    for name in FOLDERS:
        folder = PACKAGE / name
        if not folder.is_dir():
            lines += [f"- **`{name}.py`** {first_line(PACKAGE / f'{name}.py')}"]
            continue
        lines += [f"- **`{name}/`** {first_line(folder / '__init__.py')}"]
        lines += [f"  - `{path.name}` {first_line(path)}" for path in files_in_import_order(folder)]
    return "\n".join(lines)


def with_file_list(text: str) -> str:
    """Return the text of ARCHITECTURE.md with the list as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{file_list()}\n\n{END}{after}"


def main() -> None:
    """Write the list, or check it."""
    text = ARCHITECTURE.read_text()
    if "--check" not in sys.argv[1:]:
        ARCHITECTURE.write_text(with_file_list(text))
    elif text != with_file_list(text):
        sys.exit("ARCHITECTURE.md does not list the files as they are; run python docs/generate.py")


if __name__ == "__main__":
    main()
