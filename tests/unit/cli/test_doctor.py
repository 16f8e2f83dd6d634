"""The doctor: what it finds, and what it says is wrong."""

import json
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.commands import lowmem_pnn
from lowmem_pnn.cli import doctor
from lowmem_pnn.cli.doctor import Findings, examine, mismatches


def test_it_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_DRIVE_BYTES", 1_000_000)
    body = json.loads(lowmem_pnn("doctor --json").out)
    assert body["schema_version"] == 1
    assert {"system", "packages", "extras", "cpu", "memory", "budget", "drive", "limits"} <= set(body["facts"])
    assert "torch 2." in body["facts"]["packages"]
    assert "/s read" in body["facts"]["drive"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_a_problem(tmp_path: Path) -> None:
    found = examine(tmp_path / "nowhere")
    assert any("nowhere cannot be written to" in problem for problem in found.problems)


def test_limits_that_are_set_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64_000_000, 512))
    found = Findings()
    doctor._limits(found)
    assert "only 512 files may be open" in found.problems[0]
    assert "private memory is limited to 64.0 MB by ulimit" in found.problems[1]


def test_versions_that_do_not_belong_together_are_named() -> None:
    assert mismatches("2.14.1+cu130", "0.29.1", None) == []
    assert mismatches(None, None, None) == []
    (wrong,) = mismatches("2.14.1", "0.21.0", None)
    assert wrong.endswith("pip install 'torchvision==0.29.*'")
    assert "pip uninstall pynvml" in mismatches("2.6.0", "0.21.0", "11.5.0")[0]


def test_the_block_ends_with_what_is_wrong() -> None:
    assert Findings({"cpu": "one", "memory": "8 GB"}, []).describe() == "cpu     one\nmemory  8 GB\n\nnothing is wrong"
    assert Findings({"cpu": "one"}, ["a", "b"]).describe().endswith("\n\n! a\n! b")


def test_a_full_drive_is_a_problem_and_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    found = Findings()
    doctor._drive(found, tmp_path)
    assert found.facts["drive"] == f"{tmp_path}: 0 B free; its rates were not measured, since nothing could be written"
    assert "has 0 B left" in found.problems[0]
