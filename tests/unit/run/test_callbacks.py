"""Callbacks: what is taken for one, and what each is told."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lowmem_pnn
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.run.callbacks import Callback, Callbacks, checked_callbacks

TAKES = "callbacks takes a list of lowmem_pnn.Callback objects, and "


class Mine(Callback):
    pass


class Another:
    """As other libraries have them."""


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (Mine(), "got a single Mine; give callbacks=[...]"),
        (Mine, "got a single type; give callbacks=[...]"),
        ([Mine], "one is the class Mine; give Mine()"),
        ([Mine(), Another()], "one is of Another; derive it from lowmem_pnn.Callback"),
    ],
)
def test_what_is_no_list_of_callbacks_is_refused_before_there_is_a_run(given: Any, fault: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        lowmem_pnn.fit("mlp:64-10", "digits", max_gpu_mem="100MB", workdir=tmp_path / "run", callbacks=given)
    assert str(caught.value) == TAKES + fault
    assert not (tmp_path / "run").exists()


def test_none_is_no_callback_and_any_number_is_taken() -> None:
    assert checked_callbacks(None) == checked_callbacks([]) == ()
    mine = Mine()
    assert checked_callbacks(one for one in (mine,)) == (mine,)


def test_what_one_changes_the_next_one_and_the_run_do_not_see() -> None:
    seen: list[Any] = []

    class Takes(Callback):
        def on_epoch_end(self, info: Mapping[str, Any]) -> None:
            assert isinstance(info, dict)
            seen.append(info.pop("loss"))

    line = {"loss": 0.5}
    Callbacks((Takes(), Takes())).tell("on_epoch_end", line)
    assert (seen, line) == ([0.5, 0.5], {"loss": 0.5})
