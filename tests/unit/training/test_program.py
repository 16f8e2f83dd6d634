"""A program, carried out: where it may stop while outputs are written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowmem_pnn.errors import Stopped
from lowmem_pnn.methods import Visit
from lowmem_pnn.training import program


@pytest.mark.parametrize("commits", [True, False])
def test_the_writing_of_outputs_stops_only_where_all_before_it_is_committed(
    commits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise Stopped("stopped")

    def write_outputs(*_: Any, on_micro_batch: Any, **options: Any) -> None:
        on_micro_batch()

    nothing = lambda *_: None  # noqa: E731
    run: Any = SimpleNamespace(
        workload=SimpleNamespace(config=SimpleNamespace(visits="interleaved", views=1, activation_dtype="float32")),
        state=SimpleNamespace(visit=1),
        commits=SimpleNamespace(activations=tmp_path, stop_if_asked=stop),
        partitions=SimpleNamespace(write_outputs=write_outputs),
        session=SimpleNamespace(display=SimpleNamespace(start_emit=nothing)),
        replace_store=nothing,
        metrics=SimpleNamespace(log_emit=nothing),
    )
    monkeypatch.setattr(program, "_training_samples", lambda *_: SimpleNamespace(num_samples=8))
    visit = Visit("emit", 0, "train", macro_batch=(0, 8), commits=commits)
    active: Any = SimpleNamespace(title="partition 1")
    if commits:
        with pytest.raises(Stopped):
            program._emit(run, visit, active)
    else:
        program._emit(run, visit, active)
