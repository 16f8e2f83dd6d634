"""Writes what is generated in the documents: ARCHITECTURE.md's list of files, from their first docstring lines, and docs/models.md.

python docs/generate.py           # writes it
python docs/generate.py --check   # says whether it is up to date: exit code 1 where it is not
"""

import ast
import functools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowmem_pnn"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
MODELS, COVERAGE = ROOT / "docs" / "models.md", ROOT / "bench" / "results" / "model_coverage.json"
BEGIN, END = "<!-- files: written by docs/generate.py -->", "<!-- end of files -->"

FOLDERS = (
    "cli", "page", "contenders", "estimators", "api", "preview", "inference", "training", "exporting", "evaluation", "run", "planning",
    "reporting", "sweep", "engine", "workload", "methods", "tasks", "profiling", "compilation", "adapters", "pretrained", "device",
    "language", "stores", "samples", "formats", "zoo", "sources", "memory", "capture", "model", "quantization", "optim", "settings",
    "config", "partition_plan", "dispatch_mode", "seeds", "units", "errors",
)  # fmt: skip
"""The folders of the package and the files beside them: imports point from the left to the right, never back."""


def first_line(path: Path) -> str:
    """Return the first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text())


@functools.cache
def imported_modules(path: Path) -> frozenset[Path]:
    """Return the files of the package that a file imports, at its top or inside its functions."""
    found = set[Path]()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A name may be a module of the folder, or something that the folder's own __init__ gives.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {file for name in names if (file := _file_of(name)) is not None}
    return frozenset(found)


@functools.cache
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


def models_page() -> str:
    """Return the page of networks, made of what `bench/model_coverage.py` found."""
    found = json.loads(COVERAGE.read_text())
    networks = found["networks"]
    measured = [entry for entry in networks if "plain" in entry]
    others = [entry for entry in networks if "plain" not in entry]
    equal = sum(bool(entry["structure"].get("equal")) for entry in measured)
    rows = "\n".join(_measured_row(entry) for entry in measured)
    cut_rows = "\n".join(f"| {entry['name']} | {' | '.join(_cut_cells(entry))} |" for entry in others)
    cut = sum(entry["captured"].get("layers", 0) > 2 for entry in networks)
    return f"""# Networks of torchvision and timm

How finely are networks cut, and in how little memory do they train? Of {len(networks)} classifiers, the smallest of each family,
{cut} are cut into more than two layers. `lowmem-pnn plan --model NAME` says the same of any other network.

## Trained

{len(measured)} networks have been trained. For {equal} of them one step of `--method exact`, with a partition for every layer, gives
the bits of plain PyTorch's.

| network | layers | largest layer | step equal | plain PyTorch, MB | smallest budget, MB | share |
| --- | ---: | ---: | --- | ---: | ---: | ---: |
{rows}

- *Largest layer*: its share of the weights. A network with one large layer saves less.
- *Plain PyTorch*: its peak above imports.
- *Smallest budget*: the one that `plan` names; two steps were trained in it.
- *Share*: the smallest budget, divided by plain PyTorch's peak.
- Small networks save little or nothing: the kernels' own memory and the reserve set a floor.

Batch 16, images of 64x64 (or the smallest size that the network takes), AdamW, CPU, torch {found["machine"]["torch"]}.

## Cut, not trained yet

| network | layers | largest layer |
| --- | ---: | ---: |
{cut_rows}

## Where this comes from

`python bench/model_coverage.py` measures, into `bench/results/model_coverage.json`, and `python docs/generate.py` writes this page.
"""


def _cut_cells(entry: dict[str, Any]) -> list[str]:
    """Return how many layers a network has, and the largest one's share of the weights."""
    cut = entry["captured"]
    return [str(cut.get("layers", "not cut")), f"{cut['largest']:.0%}" if "largest" in cut else "-"]


def _measured_row(entry: dict[str, Any]) -> str:
    plain, parts = entry["plain"].get("peak"), entry["structure"]
    fits = [one for one in entry.get("fits", ()) if "peak" in one]
    budget = fits[0]["budget"] if fits else None
    equal = "yes" if parts.get("equal") else f"to {parts['largest_difference']:.0e}" if "largest_difference" in parts else "-"
    sizes = [f"{size / 1e6:.0f}" if size else "-" for size in (plain, budget)]
    share = f"{budget / plain:.2f}" if plain and budget else "-"
    return f"| {' | '.join([entry['name'], *_cut_cells(entry), equal, *sizes, share])} |"


def main() -> None:
    """Write them, or check them."""
    pages = {ARCHITECTURE: with_file_list(ARCHITECTURE.read_text()), MODELS: models_page()}
    for path, text in pages.items():
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.name} is not what it is made of; run python docs/generate.py")


if __name__ == "__main__":
    main()
