"""Arguments of a model's factory, as a command line has them."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.settings.model_arguments import parse_model_arguments


def test_model_arguments_are_literals_or_text() -> None:
    pairs = [
        "a=1",
        "b=1e-3",
        "c=[1, 2]",
        "d=True",
        "e=false",
        "f=None",
        "g=gelu",
        "h='12'",
        "i=a=b",
        "j=",
        "k={'x': 1}",
        "l=-3",
        "m=1+",
    ]
    assert parse_model_arguments(pairs) == {
        "a": 1, "b": 1e-3, "c": [1, 2], "d": True, "e": False, "f": None, "g": "gelu", "h": "12", "i": "a=b", "j": "",
        "k": {"x": 1}, "l": -3, "m": "1+",
    }  # fmt: skip


@settings(max_examples=30)
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.integers() | st.booleans() | st.lists(st.integers())))
def test_model_arguments_come_back_as_they_were_written(values: dict[str, Any]) -> None:
    values = {name: value for name, value in values.items() if name.isidentifier()}
    assert parse_model_arguments([f"{name}={value!r}" for name, value in values.items()]) == values


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["depth"], r"model argument 'depth' is not NAME=VALUE; write, for example, --model-arg width=64"),
        (["2x=3"], r"model argument '2x=3' is not NAME=VALUE"),
        (["a=1", "a=2"], r"model argument 'a' is given twice \(1 and '2'\); give it once"),
    ],
)
def test_bad_model_arguments_are_refused(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_model_arguments(pairs)
