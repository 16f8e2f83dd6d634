"""The tally of an epoch: batches weigh by their samples."""

from lowmem_pnn.engine.tally import Tally


def test_a_tally_weighs_batches_by_their_samples() -> None:
    tally = Tally()
    tally.add(1.0, 30, 15)
    tally.add(2.0, 10, 9)
    assert (tally.loss, tally.accuracy, tally.num_samples) == (1.25, 0.6, 40)
    assert (Tally().loss, Tally().accuracy) == (0.0, None)
