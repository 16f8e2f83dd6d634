"""The planner against brute force; its guarantees and its error messages."""

import itertools
import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.strategies import profiles
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning import planner
from lowmem_pnn.planning.constraints import Constraints
from lowmem_pnn.planning.planner import partition_peak
from lowmem_pnn.profiling.costs import Affine, LayerCost, MemoryProfile, ties_counted_once
from lowmem_pnn.profiling.peaks import largest_micro_batch

MB = 1_000_000


def plan(profile, *, budget_bytes, **constraints):
    return planner.plan(Constraints(profile, **constraints), budget_bytes)


def smallest_budget(profile, **constraints):
    return planner.smallest_budget(Constraints(profile, **constraints))


def layer(name="layer", weights=0, kept=0, output=1, inputs=1, **changes):
    """A layer with gradients as large as its weights, and no optimizer state."""
    values = {
        "name": name,
        "num_params": weights // 4,
        "weight_bytes": weights,
        "buffer_bytes": 0,
        "gradient_bytes": weights,
        "optimizer_bytes": 0,
        "step_bytes": 0,
        "forward_peak": Affine(0, kept),
        "kept": Affine(0, kept),
        "backward_peak": Affine(weights, 0),
        "emit_peak": Affine(0, output),
        "input_bytes": Affine(0, inputs),
        "output_bytes": Affine(0, output),
        "forward_macs": weights // 4,
        **changes,
    }
    return LayerCost(**values)


def equal_layers(count, **values):
    return MemoryProfile(layers=tuple(layer(f"fc{number}", **values) for number in range(count)))


def reference_peak(profile, start, stop, micro_batch, batch, objective):
    """The table in the docstring of `lowmem_pnn.profiling.peaks`, term by term."""
    size = largest_micro_batch(batch, micro_batch, profile.smallest_micro_batch)
    layers = profile.layers[start:stop]
    accumulates = size < batch
    waiting = [one.gradient_bytes - (0 if accumulates else one.freed_gradient_bytes) for one in layers]
    held = [{tie.number: tie for tie in one.ties} for one in layers]
    again = [[tie for key, tie in own.items() if any(key in before for before in held[:index])] for index, own in enumerate(held)]
    repeated = [sum(tie.gradient_bytes for tie in ties) for ties in again]
    gradients = sum(waiting) - sum(repeated)
    during = gradients if accumulates else 0
    base = sum(one.weight_bytes + 2 * one.buffer_bytes + one.optimizer_bytes for one in layers) + objective.fixed
    base -= sum(tie.weight_bytes + tie.optimizer_bytes for ties in again for tie in ties)
    ends = {tie.number for own in held for tie in own.values() if tie.is_last}
    from_later = sum(tie.gradient_bytes for own in held for tie in own.values() if tie.is_first and tie.number not in ends)
    from_later *= accumulates
    base += layers[0].input_bytes.at(size)
    moments = [base + gradients + max(one.step_bytes + one.streamed_state_bytes for one in layers)]
    for index, one in enumerate(layers):
        before = sum(other.kept.at(size) for other in layers[:index])
        after = before + one.kept.at(size)
        later = gradients + sum(repeated[index + 1 :]) if accumulates else sum(waiting[index + 1 :])
        moments.append(base + during + before + one.forward_peak.at(size))
        moments.append(base + during + (one.input_bytes.at(size) if index else 0) + one.emit_peak.at(size))
        moments.append(base + later + after + one.output_bytes.at(size) + one.backward_peak.at(size))
        if one.freed_gradient_bytes:
            step = one.complete.at(size) + one.step_bytes + one.streamed_state_bytes
            moments.append(base + later + after + one.output_bytes.at(size) + step)
    at_objective = base + during + sum(one.kept.at(size) for one in layers) + objective.per_sample * size
    return max(max(moments) + from_later, at_objective)


def brute_force(profile, room, batches, cuts, num_partitions, cap, beside, ending):
    """(bounds, micro-batches) by trying everything, or None."""
    end, smallest = len(profile.layers), profile.smallest_micro_batch
    allowed = [cut for cut in range(1, end) if cut not in profile.forbidden_cuts]
    ways = [tuple(cuts)] if cuts is not None else [way for size in range(end) for way in itertools.combinations(allowed, size)]
    ways = [way for way in ways if num_partitions in (None, len(way) + 1)]
    for least_micro_batch in (32, 16, 8, 4, 2, 1):
        if least_micro_batch < smallest:
            break
        fitting_ways = []
        for way in ways:
            bounds = [0, *way, end]
            sizes = []
            for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
                batch = batches[number] if len(batches) > 1 else batches[0]
                most = min(batch, cap or batch)
                objective = Affine(ending[stop - 1], 3 * profile.layers[stop - 1].output_bytes.per_sample)
                fitting = [
                    size
                    for size in range(max(smallest, min(least_micro_batch, most)), most + 1)
                    if reference_peak(profile, start, stop, size, batch, objective) + beside[start] <= room
                ]
                sizes.append(max(fitting, default=0))
            if all(sizes):
                traffic = sum(profile.layers[cut].input_bytes.per_sample for cut in way)
                state = max(sum(one.state_bytes for one in profile.layers[a:b]) for a, b in itertools.pairwise(bounds))
                fitting_ways.append((len(way), traffic, state, way, sizes))
        if fitting_ways:
            *_, way, sizes = min(fitting_ways)
            return [0, *way, end], sizes
    return None


@given(profiles(), st.data())
@settings(max_examples=60, deadline=None)
def test_plans_are_those_of_brute_force(profile, data):
    starts = [cut for cut in range(1, len(profile.layers)) if cut not in profile.forbidden_cuts]
    smallest = profile.smallest_micro_batch
    cuts = num_partitions = None
    kind = data.draw(st.sampled_from(("free", "number", "cuts")))
    if kind == "number":
        num_partitions = data.draw(st.integers(1, len(starts) + 1))
    elif kind == "cuts":
        cuts = sorted(data.draw(st.sets(st.sampled_from(starts)))) if starts else []
    count = num_partitions or (None if cuts is None else len(cuts) + 1)
    sizes = st.sampled_from((2, 3, 5, 7, 12, 20, 33, 64))
    batches = (
        data.draw(st.lists(sizes, min_size=count, max_size=count)) if count and data.draw(st.booleans()) else [data.draw(sizes)]
    )
    cap = data.draw(st.none() | st.integers(smallest, 40))
    constraints = {
        "batch_sizes": batches if len(batches) > 1 else batches[0],
        "cuts": cuts,
        "num_partitions": num_partitions,
        "micro_batch": cap,
    }
    overhead = data.draw(st.integers(0, 20))
    beside = data.draw(st.lists(st.integers(0, 30), min_size=len(profile.layers), max_size=len(profile.layers)))
    ending = data.draw(st.lists(st.integers(0, 30), min_size=len(profile.layers), max_size=len(profile.layers)))
    constraints |= {"beside_bytes": lambda budget: beside, "ending_bytes": lambda budget: ending}
    least = smallest_budget(profile, overhead_bytes=overhead, **constraints)
    budget = max(1, least + data.draw(st.integers(-10, 400)))

    expected = brute_force(profile, budget - overhead, batches, cuts, num_partitions, cap, beside, ending)
    if expected is None:
        assert budget < least
        with pytest.raises(BudgetError):
            plan(profile, budget_bytes=budget, overhead_bytes=overhead, **constraints)
        return
    assert budget >= least
    best = plan(profile, budget_bytes=budget, overhead_bytes=overhead, **constraints)
    assert ([0, *best.cuts, len(profile.layers)], [part.micro_batch for part in best.partitions]) == expected


@given(profiles(), st.sampled_from((4, 13, 64)), st.integers(0, 300))
@settings(deadline=None)
def test_a_plan_covers_every_layer_once_within_the_budget_and_adds_up(profile, batch, more):
    budget = smallest_budget(profile, overhead_bytes=7, batch_sizes=batch) + more
    best = plan(profile, budget_bytes=budget, overhead_bytes=7, batch_sizes=batch)
    assert [number for part in best.partitions for number in range(part.start, part.stop)] == list(range(len(profile.layers)))
    assert not set(best.cuts) & set(profile.forbidden_cuts)
    assert best.predicted_peak_bytes == max(part.predicted_peak_bytes for part in best.partitions) <= budget
    for part in best.partitions:
        layers = ties_counted_once(profile.layers[part.start : part.stop])
        assert part.state_bytes == sum(one.state_bytes for one in layers)
        assert part.num_params == sum(one.num_params for one in layers)
    assert sum(part.forward_macs for part in best.partitions) == sum(one.forward_macs for one in profile.layers)
    for part in best.partitions:
        assert part.batch == batch
        assert profile.smallest_micro_batch <= part.micro_batch <= batch
        peak = partition_peak(profile, part.start, part.stop, part.micro_batch, batch, None, 7)
        assert part.predicted_peak_bytes == peak
        assert part.input_bytes_per_sample == profile.layers[part.start].input_bytes.per_sample
        assert part.output_bytes_per_sample == profile.layers[part.stop - 1].output_bytes.per_sample


@given(profiles(), st.sampled_from((4, 64)), st.integers(0, 300), st.integers(1, 300))
@settings(deadline=None)
def test_more_budget_is_never_worse(profile, batch, more, yet_more):
    budget = smallest_budget(profile, batch_sizes=batch) + more
    small = plan(profile, budget_bytes=budget, batch_sizes=batch)
    large = plan(profile, budget_bytes=budget + yet_more, batch_sizes=batch)
    least_sizes = [min(32, min(part.micro_batch for part in plan_.partitions)).bit_length() for plan_ in (small, large)]
    assert least_sizes[1] >= least_sizes[0]
    if least_sizes[0] == least_sizes[1]:
        assert len(large.partitions) <= len(small.partitions)


@given(profiles(), st.integers(1, 70))
@settings(deadline=None)
def test_one_byte_less_than_the_smallest_budget_is_too_little(profile, batch):
    assume(batch >= profile.smallest_micro_batch)
    least = smallest_budget(profile, batch_sizes=batch)
    assert plan(profile, budget_bytes=least, batch_sizes=batch).predicted_peak_bytes == least
    with pytest.raises(BudgetError):
        plan(profile, budget_bytes=least - 1, batch_sizes=batch)


@given(profiles(), st.integers(8, 64))
@settings(deadline=None)
def test_an_overhead_that_grows_with_the_budget_is_in_the_smallest(profile, share):
    def overhead(budget):
        return max(4, budget // share)

    least = smallest_budget(profile, overhead_bytes=overhead, batch_sizes=8)
    for budget in (least, least + 1, least + 1000):
        best = plan(profile, budget_bytes=budget, overhead_bytes=overhead, batch_sizes=8)
        assert best.overhead_bytes == overhead(budget)
        assert best.predicted_peak_bytes <= budget
    with pytest.raises(BudgetError):
        plan(profile, budget_bytes=least - 1, overhead_bytes=overhead, batch_sizes=8)


@given(profiles(), st.integers(0, 500))
@settings(deadline=None)
def test_the_cuts_of_a_plan_give_the_plan_again(profile, more):
    budget = smallest_budget(profile, batch_sizes=64) + more
    free = plan(profile, budget_bytes=budget, batch_sizes=64)
    assert plan(profile, budget_bytes=budget, batch_sizes=64, cuts=free.cuts).cuts == free.cuts
    assert plan(profile, budget_bytes=budget, batch_sizes=64, num_partitions=len(free.partitions)).cuts == free.cuts


def test_a_plan_survives_json():
    best = plan(equal_layers(5, weights=100, kept=1), budget_bytes=700, overhead_bytes=3, batch_sizes=4)
    assert len(best.partitions) > 1
    assert Plan.from_json(best.to_json()) == best
    assert Plan.from_json(json.loads(best.to_json())) == best


def test_no_cut_parts_layers_that_share_a_weight():
    profile = equal_layers(6, weights=100)
    tied = MemoryProfile(layers=profile.layers, forbidden_cuts=(2, 3))
    budget = smallest_budget(tied, batch_sizes=1)
    assert plan(tied, budget_bytes=budget, batch_sizes=1).cuts == (1, 4)
    assert smallest_budget(profile, batch_sizes=1) < budget


def test_no_cuts_at_all_is_one_partition():
    best = plan(equal_layers(4, weights=100), budget_bytes=10_000, batch_sizes=8, cuts=[])
    assert [(part.start, part.stop) for part in best.partitions] == [(0, 4)]


def test_each_partition_has_its_own_batch():
    best = plan(equal_layers(4, weights=100), budget_bytes=10_000, batch_sizes=[8, 16], cuts=[2])
    assert [(part.batch, part.micro_batch) for part in best.partitions] == [(8, 8), (16, 16)]


def test_the_objective_is_asked_for_by_the_layer_after_the_last():
    profile = equal_layers(3, weights=100)
    asked = []

    def objective(stop):
        asked.append(stop)
        return Affine(5000 if stop == 2 else 0, 0)

    best = plan(profile, budget_bytes=1000, batch_sizes=1, num_partitions=2, objective=objective)
    assert best.cuts == (1,)  # a cut at layer 2 would need the 5,000 bytes
    assert set(asked) == {1, 2, 3}


def test_a_whole_batch_can_fit_where_half_of_it_does_not():
    # Accumulating keeps all gradients during the forward.
    profile = equal_layers(2, weights=1000, kept=1)
    peaks = [partition_peak(profile, 0, 2, size, 8) for size in (4, 8)]
    assert peaks[1] < peaks[0]
    best = plan(profile, budget_bytes=peaks[1], batch_sizes=8)
    assert [part.micro_batch for part in best.partitions] == [8]


def test_a_remainder_too_small_for_the_modules_counts_with_the_micro_batch_before_it():
    profile = MemoryProfile(layers=(layer(kept=1000),), smallest_micro_batch=2)
    assert partition_peak(profile, 0, 1, 4, 9) == partition_peak(profile, 0, 1, 5, 9)
    best = plan(profile, budget_bytes=partition_peak(profile, 0, 1, 5, 9) - 1, batch_sizes=9)
    assert best.partitions[0].micro_batch == 3


def test_hundreds_of_layers_are_no_trouble():
    layers = tuple(layer(f"fc{n}", weights=1000 + n % 7 * 100, kept=10 + n % 5, inputs=n % 11) for n in range(300))
    profile = MemoryProfile(layers=layers)
    best = plan(profile, budget_bytes=20 * smallest_budget(profile, batch_sizes=64), batch_sizes=64)
    assert best.partitions[-1].stop == 300


def message(profile, kind=BudgetError, **constraints):
    with pytest.raises(kind) as caught:
        plan(profile, **constraints)
    return str(caught.value)


def test_the_layer_that_does_not_fit_is_named_with_a_budget_that_works():
    profile = MemoryProfile(layers=(layer("conv1", weights=100 * MB), layer("features.3", weights=305 * MB + 7)))
    text = message(profile, budget_bytes=512 * MB, overhead_bytes=MB, batch_sizes=1)
    assert text == "layer 'features.3' alone needs 611.0 MB, above the budget of 512.0 MB; give --max-gpu-mem 612MB"
    assert len(plan(profile, budget_bytes=612 * MB, overhead_bytes=MB, batch_sizes=1).partitions) == 2


def test_layers_that_share_a_weight_are_named_together():
    profile = MemoryProfile(layers=tuple(layer(name, weights=100 * MB) for name in "abc"), forbidden_cuts=(1, 2))
    text = message(profile, budget_bytes=512 * MB, batch_sizes=1)
    assert text == "layers 'a' to 'c' share a weight and need 600.0 MB, above the budget of 512.0 MB; give --max-gpu-mem 601MB"


def test_a_smaller_batch_is_suggested_where_it_helps():
    # At batch 1 nothing accumulates, and the 300 MB of gradients are not there twice.
    profile = MemoryProfile(layers=(layer("fc", weights=300 * MB),))
    text = message(profile, budget_bytes=700 * MB, batch_sizes=64, micro_batch=8)
    assert text == ("layer 'fc' alone needs 900.0 MB, above the budget of 700.0 MB; give --max-gpu-mem 901MB, or --batch-size 8")
    assert plan(profile, budget_bytes=700 * MB, batch_sizes=8, micro_batch=8).partitions


def test_with_cuts_the_partition_is_named_and_more_cuts_where_they_help():
    profile = equal_layers(6, weights=100 * MB)
    text = message(profile, budget_bytes=512 * MB, batch_sizes=1, cuts=[2])
    assert text == (
        "partition 2 of 2 (layers 'fc2' to 'fc5') needs 800.0 MB, above the budget of 512.0 MB; give --max-gpu-mem 801MB, "
        "or more --cuts in it"
    )
    text = message(profile, budget_bytes=12 * MB, batch_sizes=1, cuts=[2])
    assert text.endswith("above the budget of 12.0 MB; give --max-gpu-mem 801MB")
    text = message(profile, budget_bytes=700 * MB, batch_sizes=1, cuts=[])
    assert text.startswith(
        "the whole model as one partition (layers 'fc0' to 'fc5') needs 1.20 GB, above the budget of 700.0 MB; "
    )


def test_with_a_number_of_partitions_the_number_that_fits_is_named():
    profile = equal_layers(6, weights=100 * MB)
    text = message(profile, budget_bytes=512 * MB, batch_sizes=1, num_partitions=2)
    assert text == (
        "the largest of 2 partitions needs 600.0 MB, above the budget of 512.0 MB; give --max-gpu-mem 601MB, or --partitions 3"
    )
    assert plan(profile, budget_bytes=512 * MB, batch_sizes=1, num_partitions=3).partitions


def test_sizes_that_would_look_the_same_are_given_to_the_byte():
    profile = MemoryProfile(layers=(layer("fc", weights=100 * MB),))
    least = smallest_budget(profile, batch_sizes=1)
    text = message(profile, budget_bytes=least - 1, batch_sizes=1)
    assert text == f"layer 'fc' alone needs {least} B, above the budget of {least - 1} B; give --max-gpu-mem 201MB"


@pytest.mark.parametrize(
    ("constraints", "text"),
    [
        ({"cuts": [2, 2]}, "--cuts at layers 2, 2: the cuts of a model of 4 layers must be ascending and between 1 and 3"),
        ({"cuts": [0]}, "--cuts at layers 0: the cuts of a model of 4 layers must be ascending and between 1 and 3"),
        ({"cuts": [4]}, "--cuts at layers 4: the cuts of a model of 4 layers must be ascending and between 1 and 3"),
        (
            {"cuts": [2]},
            "--cuts: layer 2 ('fc2') cannot start a partition, because a weight is shared across that cut; cut elsewhere, "
            "the nearest is 'fc1'",
        ),
        (
            {"num_partitions": 4},
            "--partitions 4: this model of 4 layers can be cut into at most 3 partitions; give a number from 1 to 3",
        ),
        ({"num_partitions": 2, "cuts": [1, 3]}, "--partitions 2 and 2 cuts in --cuts contradict each other; give one"),
        (
            {"batch_sizes": [8, 8]},
            "--batch-size has 2 values for a number of partitions that is left open; give one value, or as many --partitions "
            "or --cuts",
        ),
        (
            {"batch_sizes": [8, 8], "cuts": [1, 3]},
            "--batch-size has 2 values for 3 partitions; give one value, or as many --partitions or --cuts",
        ),
        (
            {"batch_sizes": 1},
            "--batch-size 1: in train mode the model takes at least 2 samples at once (BatchNorm over single values needs "
            "them); give --batch-size 2 or more",
        ),
        (
            {"micro_batch": 1},
            "--micro-batch 1: in train mode the model takes at least 2 samples at once (BatchNorm over single values needs "
            "them); give --micro-batch 2 or more",
        ),
    ],
)
def test_impossible_constraints_are_refused_by_name(constraints, text):
    profile = MemoryProfile(layers=equal_layers(4, weights=100).layers, forbidden_cuts=(2,), smallest_micro_batch=2)
    assert message(profile, ConfigError, **{"budget_bytes": 10**6, "batch_sizes": 8, **constraints}) == text


def test_a_model_in_one_piece_says_so():
    profile = MemoryProfile(layers=equal_layers(2).layers, forbidden_cuts=(1,))
    text = message(profile, ConfigError, budget_bytes=10**6, batch_sizes=8, cuts=[1])
    assert text.endswith("because a weight is shared across that cut; this model can only be one partition")


@given(profiles(), st.integers(2, 40), st.integers(0, 600))
@settings(max_examples=100, deadline=None)
def test_a_uniform_micro_batch_fits_everywhere(profile, batch, budget_bytes):
    assume(batch >= profile.smallest_micro_batch)
    try:
        best = plan(profile, budget_bytes=budget_bytes, batch_sizes=batch, uniform=True)
    except BudgetError as error:
        # The budget that the message names does.
        enough = int(re.findall(r"--max-gpu-mem (\d+)MB", str(error))[0]) * 1_000_000
        assert plan(profile, budget_bytes=enough, batch_sizes=batch, uniform=True).predicted_peak_bytes <= enough
        return
    assert len({partition.micro_batch for partition in best.partitions}) == 1
    for partition in best.partitions:
        peak = partition_peak(profile, partition.start, partition.stop, partition.micro_batch, batch)
        assert peak == partition.predicted_peak_bytes <= budget_bytes


def test_a_layer_that_does_not_fit_says_why_it_is_whole():
    whole = "whole: its forward draws random numbers that tracing would freeze; 63% of the weights"
    profile = MemoryProfile(layers=(layer("encoder", weights=100, whole=whole), layer("fc", weights=10)))
    with pytest.raises(BudgetError, match=re.escape(f"layer 'encoder' ({whole}) alone needs ")):
        plan(profile, budget_bytes=50, overhead_bytes=0, batch_sizes=4)
