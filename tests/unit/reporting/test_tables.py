"""Plain-text tables."""

from lowmem_pnn.reporting.tables import text_table


def test_a_table_aligns_its_columns_and_cuts_nothing_off() -> None:
    long = "layer." * 40
    lines = text_table(("name", "what", "bytes"), [("1", long, "12"), ("2", "b", "3,456")]).splitlines()
    assert lines[0].split() == ["name", "what", "bytes"]
    assert lines[2].split() == ["1", long, "12"]
    assert len(lines[2]) == len(lines[3])
    assert lines[2].endswith(" 12")
