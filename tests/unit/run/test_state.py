"""The state of a run in its journal: what was written is read, and nothing else."""

import json
import math
from typing import Any

import pytest

from helpers.journals import PLAN, WEIGHTS, body, state
from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.run.state import State, states_of


def test_a_journal_is_read_to_the_state_that_it_was_written_from() -> None:
    assert State.from_journal(body()) == state()
    born = state(stage="born", weights={}, activations={})
    assert State.from_journal(json.loads(json.dumps(born.to_journal()))) == born


def test_a_journal_of_a_time_without_scales_is_read() -> None:
    old = body()
    del old["loss_scales"]
    assert State.from_journal(old).loss_scales == [LossScale(), LossScale()]


def _plan(**changes: Any) -> dict[str, Any]:
    return {"plan": {**PLAN, **changes}}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"records": []}, "0 records for 2 partitions"),
        ({"records": [{"seconds": "x"}, {}]}, "records.0.seconds input should be a valid number"),
        ({"micro_batches": [0, 0, 0]}, r"micro_batches \[0, 0, 0\]"),
        ({"micro_batches": [4, 0]}, r"micro_batches \[4, 0\]"),
        ({"micro_batches": [4.0, 4]}, "micro_batches.0 input should be a valid integer"),
        ({"micro_batches": None}, "micro_batches input should be a valid"),
        ({"loss_scales": [{}]}, "1 loss_scales for 2 partitions"),
        ({"loss_scales": [{"value": 0.0}, {}]}, "a loss scale of 0"),
        ({"epoch_tallies": [{}]}, "1 epoch_tallies for 2 partitions"),
        ({"visit": -1}, "the number -1"),
        ({"visit": True}, "visit input should be a valid integer"),
        ({"number": 10**30}, "the number 10000"),
        ({"seconds": math.nan}, "the number nan"),
        ({"progress": {"epoch": -3}}, "the number -3"),
        ({"progress": {"tally": {"loss_sum": math.inf}}}, "the number inf"),
        ({"progress": []}, "progress input should be"),
        ({"stage": "finished"}, "stage input should be 'born'"),
        ({"rank": 2, "ranks": 2}, "rank 2 of 2"),
        ({"data": 7}, "data input should be a valid string"),
        ({"activations": {"x": "../../../victim"}}, "a name of activations that is none of ours"),
        ({"activations": {"train": "../../../victim"}}, "a name of activations that is none of ours"),
        ({"activations": {"train": "/victim"}}, "a name of activations that is none of ours"),
        ({"activations": {"train": ".."}}, "a name of activations that is none of ours"),
        ({"activations": {"train": "b01-train/../../x"}}, "a name of activations that is none of ours"),
        ({"files": {"../x": {}}}, "a name of a file that is none of ours"),
        ({"files": {"model.safetensors": {"sha256": 1}}}, "the journal's entry of model.safetensors is none"),
        ({"weights": {}}, "says nothing of the weights"),
        ({"weights": {**WEIGHTS, "partitions": WEIGHTS["partitions"][:1]}}, "no weights of 2 partitions"),  # type: ignore[index]
        ({"weights": {**WEIGHTS, "partitions": [None, None]}}, "partition 0 in 'weights' was never committed"),
        (
            {"weights": {**WEIGHTS, "partitions": [{**WEIGHTS["partitions"][0], "file": "../victim"}] * 2}},  # type: ignore[index]
            "the journal names '../victim' for partition 0",
        ),
        ({"weights": {**WEIGHTS, "format": 2}}, "have format 2, this version reads 1"),
        ({"weights": {**WEIGHTS, "partitions": 3}}, "says nothing of the weights"),
        ({"unheard": 1}, "unknown 'unheard'"),
        (_plan(partitions=[]), "no partitions"),
        (_plan(partitions=[PLAN["partitions"][0]] * 2), "partitions that do not follow each other"),  # type: ignore[index]
        (_plan(smallest_micro_batch=0), "a batch below 1"),
        (_plan(loss_chunk=0), "a batch below 1"),
        (_plan(budget_bytes="9"), "budget_bytes input should be a valid integer"),
        (_plan(budget_bytes=-9), "the number -9"),
        ({"plan": {}}, "partitions field required"),
        ({"plan": None}, "plan input should be"),
    ],
)
def test_what_no_run_says_of_itself_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as error:
        State.from_journal(body(**changes))
    assert "\n" not in str(error.value)
    assert states_of([body(number=1), body(**changes)]) == [state(number=1)]
