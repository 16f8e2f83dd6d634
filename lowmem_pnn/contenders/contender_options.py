"""The options of contenders: what was given, for each method as far as it reads it, and none that a few training steps have no use for."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lowmem_pnn.config.checks import contradictions
from lowmem_pnn.config.configure import given_options, unmet, with_defaults
from lowmem_pnn.config.faults import flag
from lowmem_pnn.config.fit_config import FitConfig, MethodName
from lowmem_pnn.errors import ConfigError

# What a contender's run is not for: epochs, commits, logs.
_SHORT: Mapping[str, Any] = {"epochs": (1,), "val_fraction": 0.0, "commit_every": 1e6, "log_every": 1_000_000}
LEFT_OUT = frozenset(
    {
        *_SHORT, "max_steps", "early_stop", "keep_weights", "keep_state", "monitor", "eval_every", "time_limit", "unfreeze_at",
        "val_data", "test_limit", "logger", "meta_epochs", "recovery_epochs", "recover", "sample", "sample_tokens",
    }
)  # fmt: skip
"""Options that contenders do without: they are about epochs, validation, or what a run says and leaves."""


def refuse_left_out(given: Collection[str]) -> None:
    """Refuse options that contenders do without.

    Args:
        given: names of the options that were given.

    Raises:
        ConfigError: one of them is there, or one that the bench has under another name.
    """
    for name, instead in (("max_gpu_mem", "budgets"), ("method", "methods")):
        if name in given:
            raise ConfigError(f"{flag(name)} is for one run, and bench measures several; give {flag(instead)}")
    if wrong := [flag(name) for name in given if name in LEFT_OUT]:
        has, it = ("has", "it") if len(wrong) == 1 else ("have", "them")
        raise ConfigError(
            f"{' and '.join(wrong)} {has} no effect here: bench has every contender take --steps training steps, and keeps none of the runs; "
            f"leave {it} out"
        )


def contender_configs(
    methods: Sequence[MethodName], budget_bytes: int, given: Mapping[str, Any]
) -> dict[MethodName, FitConfig | ConfigError]:
    """Make the configuration of each method from what was given for all of them; each option has to be read by one of them.

    Args:
        methods: the methods.
        budget_bytes: budget of all.
        given: other fields of `FitConfig`; None means not given.

    Returns:
        Its configuration by method, or why there is none.

    Raises:
        ConfigError: an option is wrong by itself, or none of the methods reads it, or all of them contradict what was given.
    """
    options = given_options({**given, **_SHORT, "max_gpu_mem": budget_bytes})
    found: dict[MethodName, FitConfig | ConfigError] = {}
    needs: dict[str, str] = {}
    read: set[str] = set()
    for method in dict.fromkeys(methods):
        own = {**options, "method": method}
        config = with_defaults(own)
        # Again: what is left out may be all that another one is read for.
        while wrong := dict(unmet(config, own)):
            needs |= wrong
            own = {name: value for name, value in own.items() if name not in wrong}
            config = with_defaults(own)
        read |= set(own)
        faults = contradictions(config)
        found[method] = ConfigError("; ".join(faults)) if faults else config
    if unread := [name for name in options if name not in read]:
        texts = (f"{flag(name)} has no effect here: it needs {needs[name].replace('--method ', '--methods ')}" for name in unread)
        raise ConfigError("; ".join(texts))
    if all(isinstance(config, ConfigError) for config in found.values()):
        raise next(error for error in found.values() if isinstance(error, ConfigError))
    return found
