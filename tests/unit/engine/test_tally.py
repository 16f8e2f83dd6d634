"""The tally of an epoch: batches weigh by what their mean losses are over."""

from lowmem_pnn.engine.tally import Tally


def test_a_tally_weighs_batches_by_what_counts_in_them() -> None:
    tally = Tally()
    tally.add(1.0, 10, 30)
    tally.add(2.0, 10, 10)
    assert (tally.loss, tally.accuracy, tally.num_samples) == (1.25, None, 20)
    tally.merge(Tally(0.0, 24, 0, 40.0, 40))
    assert (tally.loss, tally.accuracy, tally.num_samples, tally.count) == (0.625, 0.6, 20, 80)
    assert (Tally().loss, Tally().accuracy, Tally(num_correct=0).accuracy) == (None, None, None)
