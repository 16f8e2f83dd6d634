"""Pages of runs: what is on them, of one run and of several, and what is refused."""

import re
from pathlib import Path

import pytest

from helpers.commands import lowmem_pnn, write_data

FIT = "fit --max-gpu-mem 100MB --device cpu --model mlp:20-16-3 --epochs 2 --cuts 1 --no-compare --quiet"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished runs, by two methods."""
    place = tmp_path_factory.mktemp("runs")
    write_data(place / "data.npz")
    for method in ("pnn", "exact"):
        assert lowmem_pnn(f"{FIT} --data npz:{place}/data.npz --method {method} --workdir {place / method}").code == 0
    return [place / "pnn", place / "exact"]


def test_a_page_shows_memory_plan_learning_and_time_and_loads_nothing(runs: list[Path]) -> None:
    outcome = lowmem_pnn(f"report {runs[0]}")
    assert (outcome.code, outcome.out) == (0, f"the page is in {runs[0] / 'report.html'}\n")
    page = (runs[0] / "report.html").read_text()
    for heading in ("Memory over time", "Plan", "Learning", "Where the seconds went", "The run"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg ") == 5
    assert "var(--budget)" in page
    assert "plain PyTorch needs" in page
    # Names of namespaces are no addresses that are loaded.
    assert not re.findall(r'(?:src|href)="https?:', page)
    assert not re.findall(r"#0[1-5]050\d|#0[1-4]0[1-4]0[1-4]", page), "every colour is the page's"
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names)), "names are the figure's own"
    assert "lowmem-pnn fit --max-gpu-mem 100MB --model mlp:20-16-3" in page
    assert len(page) < 3e6


def test_several_runs_are_set_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    assert lowmem_pnn(f"report {runs[0]} {runs[1]} --out {out} --json").out == f'{{"report": "{out}"}}\n'
    page = out.read_text()
    assert "2 runs side by side" in page
    assert page.count("<td>exact</td>") == 2  # run and method
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.html"]


def test_what_is_no_finished_run_is_refused(runs: list[Path], tmp_path: Path) -> None:
    outcome = lowmem_pnn(f"report {tmp_path}")
    assert outcome.code in (3, 6)
    assert str(tmp_path) in outcome.fault
    outcome = lowmem_pnn(f"report {runs[0]} --out {tmp_path}/none/page.html")
    assert outcome.code == 5
    assert (
        outcome.fault
        == f"the page {tmp_path}/none/page.html cannot be written: No such file or directory; give --out FILE elsewhere"
    )
