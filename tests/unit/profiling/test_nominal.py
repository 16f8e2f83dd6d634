"""Nominal timings: sums of counts."""

from lowmem_pnn.profiling.costs import Affine, LayerCost, MemoryProfile, Product
from lowmem_pnn.profiling.nominal import MachineSpeed, keeping_rule, nominal_timings
from lowmem_pnn.profiling.timings import Seconds


def test_nominal_timings_are_sums_of_counts() -> None:
    speed = MachineSpeed(
        mac=1.0, forward_weight=1e3, backward_weight=1e4, call=1e6, memory_byte=1e9, step=2.0, read_byte=3.0, written_byte=4.0
    )
    nothing = Affine(0, 0)
    layer = LayerCost("a", 7, 28, 0, 28, 56, 0, nothing, Affine(5, 3), nothing, nothing, nothing, nothing, forward_macs=11)
    timings = nominal_timings(MemoryProfile((layer,)), speed)
    assert (timings.step_per_parameter, timings.read_per_byte, timings.write_per_byte, timings.memory_per_byte) == (
        2.0,
        3.0,
        4.0,
        1e9,
    )
    (seconds,) = timings.layers
    assert seconds.forward == seconds.emit == Seconds(1e6 + 7e3, 11 + 3e9)
    assert seconds.backward == Seconds(2e6 + 7e4, 22 + 6e9)
    assert seconds.backward_to_weights == Seconds(2e6 + 7e4, 11 + 6e9)


def test_products_are_kept_where_moving_their_outputs_takes_less_time_than_computing_them() -> None:
    wide, narrow = Product(macs=768, nbytes=4), Product(macs=144, nbytes=4)
    rules = {name: keeping_rule(name, shares_host=True) for name in ("auto", "always", "never")}
    assert {name: (rule(wide), rule(narrow)) for name, rule in rules.items()} == {
        "auto": (True, False),
        "always": (False, False),
        "never": (True, True),
    }
    # A GPU computes faster than its host's drive reads and writes.
    assert not keeping_rule("auto", shares_host=False)(wide)
