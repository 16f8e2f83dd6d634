"""Plain-text tables."""

import builtins

import pytest

from lowmem_pnn.reporting.tables import text_table


def test_a_table_aligns_its_columns_and_cuts_nothing_off() -> None:
    long = "layer." * 40
    lines = text_table(("name", "what", "bytes"), [("1", long, "12"), ("2", "b", "3,456")]).splitlines()
    assert lines[0].split() == ["name", "what", "bytes"]
    assert lines[2].split() == ["1", long, "12"]
    assert len(lines[2]) == len(lines[3])
    assert lines[2].endswith(" 12")


def test_a_table_leaves_out_what_can_be_spared_until_it_fits() -> None:
    heads, rows = ("name", "what", "bytes", "seconds"), [("1", "a", "12", "3"), ("2", "b", "3,456", "4")]
    assert text_table(heads, rows, 60, spare=("bytes",)).splitlines()[0].split() == ["name", "what", "bytes", "seconds"]
    for width, left in ((24, ["name", "what", "seconds"]), (5, ["name", "what"])):
        assert text_table(heads, rows, width, spare=("bytes", "seconds")).splitlines()[0].split() == left


def test_cells_are_shown_as_they_are_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = text_table(("layer", "of"), [("[bold]", ":key:")]).splitlines()
    assert [line.split() for line in (lines[0], lines[2])] == [["layer", "of"], ["[bold]", ":key:"]]
