"""Hypothesis strategies: random memory costs of layers, and profiles of chains."""

from hypothesis import strategies as st

from lowmem_pnn.profiling.costs import Affine, Envelope, LayerCost, MemoryProfile

_BYTES = st.integers(0, 60)


def affines() -> st.SearchStrategy[Affine]:
    """Bytes as a function of the number of samples, small enough for ties to be common."""
    return st.builds(Affine, st.integers(0, 30), st.integers(0, 6))


@st.composite
def layer_costs(draw: st.DrawFn, name: str = "layer") -> LayerCost:
    """A possible layer: no memory falls as samples are added."""
    kept = draw(affines())
    # A backward may free more than it makes, but not more than there is.
    falling = st.builds(Affine, st.integers(0, 60), st.integers(-kept.per_sample, 6))
    gradients = draw(_BYTES)
    return LayerCost(
        name=name,
        num_params=draw(_BYTES),
        weight_bytes=draw(_BYTES),
        buffer_bytes=draw(st.integers(0, 4)),
        gradient_bytes=gradients,
        optimizer_bytes=draw(_BYTES),
        step_bytes=draw(_BYTES),
        forward_peak=draw(affines()),
        kept=kept,
        backward_peak=Envelope.over(draw(st.lists(falling, max_size=3))),
        emit_peak=draw(affines()),
        input_bytes=Affine(0, draw(st.integers(0, 5))),
        output_bytes=Affine(0, draw(st.integers(0, 8))),
        forward_macs=draw(_BYTES),
        freed_gradient_bytes=draw(st.sampled_from((0, gradients))),
        complete=draw(falling),
        streamed_state_bytes=draw(_BYTES),
    )


@st.composite
def profiles(draw: st.DrawFn, max_layers: int = 8) -> MemoryProfile:
    """A chain of layers with some forbidden cuts."""
    num_layers = draw(st.integers(1, max_layers))
    return MemoryProfile(
        layers=tuple(draw(layer_costs(f"layer{number}")) for number in range(num_layers)),
        forbidden_cuts=tuple(sorted(draw(st.sets(st.integers(1, num_layers), max_size=2)) - {num_layers})),
        optimizer="sgd",
        smallest_micro_batch=draw(st.sampled_from((1, 1, 2))),
    )
