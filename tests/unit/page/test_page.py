"""Pages of runs: what is on them, of one run and of several, and what is refused."""

import dataclasses
import html
import os
import re
import shutil
from pathlib import Path

import pytest

from helpers.commands import lowmem_pnn, write_data
from lowmem_pnn.page import figures
from lowmem_pnn.page.page import page_of, write_page
from lowmem_pnn.page.run_log import RunLog
from lowmem_pnn.page.tables import drive_line

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
    assert lowmem_pnn(f"report {runs[0]} {runs[1]} --out {out} --quiet").out == ""
    assert lowmem_pnn(f"report {runs[0]} {runs[1]} --out {out} --json").out == f'{{"report": "{out}"}}\n'
    page = out.read_text()
    assert "2 runs side by side" in page
    assert page.count("<td>exact</td>") == 2  # run and method
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.html"]


def test_what_is_no_finished_run_is_refused(runs: list[Path], tmp_path: Path) -> None:
    outcome = lowmem_pnn(f"report {tmp_path}")
    assert outcome.code in (3, 6)
    assert str(tmp_path) in outcome.fault
    outcome = lowmem_pnn(f"report {tmp_path} --out {tmp_path}")
    assert (outcome.code, outcome.fault) == (5, f"the page {tmp_path} cannot be written: it is a folder; give --out FILE")
    assert lowmem_pnn(f"report {runs[0]} --out . --json").code == 5
    outcome = lowmem_pnn(f"report {runs[0]} --out {tmp_path}/none/page.html")
    assert outcome.code == 5
    assert (
        outcome.fault
        == f"the page {tmp_path}/none/page.html cannot be written: No such file or directory; give --out FILE elsewhere"
    )


def test_runs_of_one_name_are_told_apart_and_say_where_they_lie_now(runs: list[Path], tmp_path: Path) -> None:
    odd = '_"x" <$a$ \\q'
    copies = [shutil.copytree(run, tmp_path / place / odd) for place, run in zip("ab", runs, strict=True)]
    out = tmp_path / "both.html"
    write_page(copies, out)
    page = out.read_text(encoding="utf-8")
    for place, copy in zip("ab", copies, strict=True):
        name = html.escape(f"{place}/{odd}")
        assert f"<td>{name}</td>" in page
        assert page.count(f"{html.escape(f'{place}/{odd}', quote=False)}</text>") == 3, "at the peaks, and in two legends"
        assert f"<p>weights: {html.escape(str(copy))}/model.safetensors</p>" in page
    (tmp_path / "a" / odd).rename(last := tmp_path / os.fsdecode(b"caf\xe9"))
    write_page([last], out)
    page = out.read_text(encoding="utf-8")
    assert 'aria-label="plan of caf\\udce9"' in page


def test_a_figure_of_many_points_keeps_the_highest_and_the_last() -> None:
    memory = [(0.1 * number, number % 3, 9000 if number == 4321 else 100 + number % 7) for number in range(12_345)]
    shown = figures.fewer(memory)
    assert len(shown) <= figures.MOST_POINTS
    assert max(shown, key=lambda point: point[2])[1:] == [4321 % 3, 9000]
    assert shown[-1][0] == memory[-1][0]
    assert figures.fewer(memory[:2]) == [list(point) for point in memory[:2]]


def test_what_the_page_says_of_the_drive_and_of_objects_from_python(runs: list[Path]) -> None:
    run = RunLog.read(runs[0])
    assert "% of the 600 TB that a common drive of 1 TB is rated to take" in drive_line(run)
    rated = dataclasses.replace(run, result=dataclasses.replace(run.result, bytes_written=3 * 10**12, drive_tbw=150))
    assert drive_line(rated).endswith("3.00 TB written; that is 2 % of the 150 TB that the drive is rated to take")
    given = dataclasses.replace(run, config=dataclasses.replace(run.config, val_data="python:tuple"))
    assert "<p>The command that repeats it:</p><pre>lowmem-pnn fit --max-gpu-mem 100MB" in page_of([run])
    assert "<p>It was started from Python, with python:tuple; its options:</p><pre>--max-gpu-mem 100MB" in page_of([given])
