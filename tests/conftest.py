"""Fixtures of all tests, and what the tests' three tiers are for.

`tests/unit` mirrors the package's folders: one file of tests for one module, most of a fraction of a second, all of six core minutes.
`tests/runs` holds whole runs in this process, on small networks: what a run computes is compared with plain PyTorch, with itself stopped and
resumed, and with its plan. `tests/system` holds what needs processes, signals, kills, a file system or a terminal of its own, or a GPU (mark
`gpu`). What several files share stands in `tests/helpers`; `tests/trials` holds the scripts of the reliability trials, which tests in
`tests/system` run in a short form, and whole with `--long` (docs/reliability.md). Without `--all` some cases are left out, whose tests have
others that walk the same code: `helpers/short_form.py` lists them. They take some eight core minutes.

A new test goes to the lowest tier that can show the behaviour. A run that several tests only read is trained once, by a fixture of their module.
"""

import gc
import locale
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers share the cores: each has one thread, and so have the processes that it starts. Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from helpers.commands import write_data
from helpers.short_form import LONG, is_left_out, is_named
from lowmem_pnn.stores import run_creation

# Machines that do several things at once are slow now and then: that is no failure.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

collect_ignore = ["helpers", "trials"]  # neither tests nor doctests


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--all`, for some minutes more, and `--long`, for hours."""
    parser.addoption("--all", action="store_true", help="also the cases that helpers/short_form.py leaves out")
    parser.addoption(
        "--long", action="store_true", help="all cases, and reliability trials in full numbers (docs/reliability.md)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the short form does; a test that is named on the command line (`FILE::TEST`) runs all the same."""
    if config.getoption("--long") or config.getoption("--all"):
        return
    named = [_name(f"{Path(path).resolve()}::{rest}") for path, _, rest in (one.partition("::") for one in config.args) if rest]
    names = {_name(item.nodeid) for item in items}
    files = {name.partition("::")[0] for name in names}
    gone = [name for name in LONG if name.partition("::")[0] in files and name not in names | files]
    if gone and not named:  # of a file of which a test is named the others are not collected
        raise pytest.UsageError(f"helpers/short_form.py names {gone[0]!r}, which is no test any more")
    left_out = [item for item in items if is_left_out(item.nodeid) and not is_named(_name(item.nodeid), named)]
    config.hook.pytest_deselected(items=left_out)
    is_out = set(left_out)
    items[:] = [item for item in items if item not in is_out]


def _name(nodeid: str) -> str:
    """A test as the short form's list names it, from pytest's name or from the whole path."""
    return nodeid.removeprefix(f"{Path(__file__).parent}/").removeprefix("tests/")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether trials are to be run in full numbers."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def all_cases(request: pytest.FixtureRequest, long: bool) -> bool:
    """Whether cases are to be run too that the short form leaves out."""
    return long or bool(request.config.getoption("--all"))


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """Every run collects garbage before it takes its floor; looking through all that is there already would take a third of many runs."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _fake_operations_are_remembered() -> Iterator[None]:
    """What operations do to fake tensors is the same for every test: a profile forgets it to hold some megabytes less."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTensorMode, "cache_clear", lambda: None)
        yield


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """One thread for what goes on beside the test's own."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with data.npz; a run directory that is in use is not waited for long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_creation, "_LOCK_PATIENCE_SECONDS", 0.2)
    write_data(tmp_path / "data.npz")
    return tmp_path


@pytest.fixture
def ascii_locale() -> Iterator[None]:
    """A locale whose encoding knows no letter beyond ASCII, which Python reads and writes texts in unless it is told another."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)
