"""Hypothesis strategies: random memory costs of layers, and profiles of chains."""

from dataclasses import replace

from hypothesis import strategies as st

from lowmem_pnn.profiling.costs import Affine, Envelope, LayerCost, MemoryProfile, Tie

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


def _with_tie(layer: LayerCost, tie: Tie) -> LayerCost:
    """Return a layer that holds a parameter more, which does not step before all of its layers have gone back."""
    return replace(
        layer,
        num_params=layer.num_params + tie.num_params,
        weight_bytes=layer.weight_bytes + tie.weight_bytes,
        gradient_bytes=layer.gradient_bytes + tie.gradient_bytes,
        optimizer_bytes=layer.optimizer_bytes + tie.optimizer_bytes,
        freed_gradient_bytes=0,
        ties=(*layer.ties, tie),
    )


@st.composite
def profiles(draw: st.DrawFn, max_layers: int = 8) -> MemoryProfile:
    """A chain of layers with some forbidden cuts."""
    num_layers = draw(st.integers(1, max_layers))
    layers = [draw(layer_costs(f"layer{number}")) for number in range(num_layers)]
    for tie in range(draw(st.integers(0, 2)) if num_layers > 1 else 0):
        users = sorted(draw(st.sets(st.integers(0, num_layers - 1), min_size=2, max_size=2)))
        sizes = [draw(_BYTES) for _ in range(4)]
        for user in users:
            layers[user] = _with_tie(layers[user], Tie(tie, user == users[0], user == users[-1], *sizes))
    return MemoryProfile(
        layers=tuple(layers),
        forbidden_cuts=tuple(sorted(draw(st.sets(st.integers(1, num_layers), max_size=2)) - {num_layers})),
        optimizer="sgd",
        smallest_micro_batch=draw(st.sampled_from((1, 1, 2))),
    )
