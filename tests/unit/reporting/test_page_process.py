"""The page process: what becomes of it is never more than the page; played by a package of the same name that does as it is told."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from lowmem_pnn.cli.supervisor import write_run_page
from lowmem_pnn.reporting import page_process
from lowmem_pnn.reporting.page_process import write_page_apart

WRITES = "import sys; from pathlib import Path; Path(sys.argv[-1], 'report.html').write_text(' '.join(sys.argv[1:]))"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, as far as a supervisor looks at it; the page process runs what is in `command`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "run"
    path.mkdir()
    (path / "journal.json").write_text(json.dumps({"body": {"stage": "done"}}))
    (path / "result.json").write_text("{}")
    (tmp_path / "lowmem_pnn").mkdir()
    play("raise SystemExit(0)")
    return path


def play(code: str) -> None:
    Path("lowmem_pnn/__main__.py").write_text(code)


def test_a_run_that_is_done_gets_its_page_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(WRITES)
    write_run_page(["fit"], run)
    assert capsys.readouterr().err == f"lowmem-pnn: the page of the run is in {run}/report.html\n"
    assert (run / "report.html").read_text() == f"report --quiet -- {run}"
    play("raise SystemExit('not again')")
    write_run_page(["fit"], run)
    assert capsys.readouterr().err == ""
    os.utime(run / "result.json")
    write_run_page(["fit", "--quiet"], run)  # trained further since, but nothing is to be told
    assert capsys.readouterr().err == ""
    write_run_page(["fit"], run)
    assert capsys.readouterr().err == "lowmem-pnn: no page of the run: not again\n"


def test_no_page_is_written_where_none_is_asked_for_or_the_run_is_not_done(run: Path) -> None:
    play(WRITES)
    write_run_page(["fit", "--no-report"], run)
    (run / "journal.json").write_text(json.dumps({"body": {"stage": "trained"}}))
    write_run_page(["fit"], run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import sys; print('a warning\\nlowmem-pnn: the page cannot be written', file=sys.stderr); sys.exit(5)", "the page cannot be written"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "it was ended by SIGKILL"),
        ("import time; time.sleep(60)", "it took more than 1 s"),
    ],
)  # fmt: skip
def test_faults_are_told_in_a_line(run: Path, monkeypatch: pytest.MonkeyPatch, code: str, fault: str) -> None:
    monkeypatch.setattr(page_process, "_MOST_SECONDS", 1.0)
    play(code)
    assert write_page_apart([run]) == fault


def test_a_signal_ends_the_page_and_nothing_else(run: Path) -> None:
    play("import time; time.sleep(60)")
    this = psutil.Process()

    def stop() -> None:
        deadline = time.monotonic() + 60
        while not any("report" in child.cmdline() for child in this.children()) and time.monotonic() < deadline:
            time.sleep(0.01)
        # To that thread alone: another one would not have the signal blocked until there is a handler.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=stop)
    sender.start()
    assert write_page_apart([run], stop_on=(signal.SIGTERM,)) == "it was stopped"
    sender.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not this.children()
