"""The state of a run in its journal."""

from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.run.state import State


def test_a_journal_of_a_time_without_scales_is_read() -> None:
    state = State(plan={}, micro_batches=[4, 8], loss_scales=[LossScale.initial("fp16")] * 2)
    body = state.to_journal()
    assert State.from_journal(body) == state
    del body["loss_scales"]
    assert State.from_journal(body).loss_scales == [LossScale(), LossScale()]
