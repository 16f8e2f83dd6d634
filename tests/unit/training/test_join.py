"""Joined ranks: their folders go with the run that they are of, and no other folder."""

from pathlib import Path

from helpers.journals import body
from lowmem_pnn.run.state import State
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.training.join import forget


def test_only_the_runs_own_ranks_are_forgotten(tmp_path: Path) -> None:
    for number, config in ((1, "{}"), (2, '{"seed": 1}'), (4, "{}")):
        rank = 1 if number == 4 else number
        RunDirectory.create(tmp_path / f"run.rank{number}", config, body(rank=rank, ranks=6)).__exit__()
        (tmp_path / f"run.rank{number}" / "weights").mkdir()
    (tmp_path / "run.rank3").mkdir()
    (tmp_path / "run.rank3" / "thesis.txt").write_text("mine")
    RunDirectory.create(tmp_path / "run.rank5", "{}", body(rank=5, ranks=6)).__exit__()
    (tmp_path / "run.rank5" / "notes.txt").write_text("mine")
    before = {
        path: path.read_bytes()
        for name in ("run.rank2", "run.rank3", "run.rank4")
        for path in (tmp_path / name).iterdir()
        if path.is_file()
    }
    with RunDirectory.create(tmp_path / "run", "{}", body(stage="done", ranks=6)) as run:
        forget(run, State.from_journal(run.journal()))
        # Once more, and of a rank that is not the first.
        forget(run, State.from_journal(body(rank=2, ranks=6)))
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "run.rank1").exists()
    assert [path.name for path in (tmp_path / "run.rank5").iterdir()] == ["notes.txt"]
