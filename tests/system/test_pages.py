"""Pages of runs: written at the end of a command, or from Python, in a process of their own; opened in a browser."""

import re
import sys
from pathlib import Path

import pytest

import lowmem_pnn as package
from helpers.browser import show
from helpers.commands import lowmem_pnn, write_data
from helpers.processes import run

FIT = "fit --max-gpu-mem 100MB --device cpu --model mlp:20-16-3 --data npz:data.npz --epochs 2 --cuts 1 --no-compare --workdir"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, int]:
    """Pages, of one run by the command, one from Python, and both, with the number of their figures."""
    place = tmp_path_factory.mktemp("pages")
    data = f"npz:{write_data(place / 'data.npz')}"
    code, out, err = run(place, f"{FIT} pnn")
    assert code == 0, err
    assert err.splitlines()[-1] == "lowmem-pnn: the page of the run is in pnn/report.html"
    assert "report.html" not in out
    result = package.fit(
        "mlp:20-16-3", data, max_gpu_mem="100MB", device="cpu", epochs=2, method="neuroflux", workdir=place / "local"
    )
    assert not (place / "local" / "report.html").exists()
    drawing = "matplotlib" in sys.modules
    assert result.report() == place / "local" / "report.html"
    assert ("matplotlib" in sys.modules) == drawing, "what draws is in no floor of a later run"
    assert lowmem_pnn("report", place / "pnn", place / "local", "--out", place / "both.html").code == 0
    return {place / "pnn" / "report.html": 5, place / "local" / "report.html": 6, place / "both.html": 3}


@pytest.mark.parametrize("page", [0, 1, 2])
def test_a_browser_shows_every_figure_and_complains_of_nothing(pages: dict[Path, int], page: int) -> None:
    path, figures = list(pages.items())[page]
    shown = show(path, width=390 if page == 1 else 1200)
    assert shown.console == []
    drawn = re.findall(r"<svg .*?</svg>", shown.document, re.DOTALL)
    assert len(drawn) == figures
    assert all(len(re.findall(r"<(?:path|use|text)\b", figure)) > 10 for figure in drawn)
