"""Layer patterns: any sequence of kinds, and Megatron's one value for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35_mcore.config.layer_pattern import (
    LayerKind,
    interval_of,
    linear_attention_freq,
    mtp_pattern,
    pattern_from_interval,
    pattern_from_names,
)
from qwen35_mcore.errors import ConfigError

G, A = LayerKind.GDN, LayerKind.ATTENTION
patterns = st.lists(st.sampled_from(LayerKind), min_size=1, max_size=24).map(tuple)


def megatron_reads(freq: int | list[int], num_layers: int) -> list[int]:
    """What megatron-core makes of ``linear_attention_freq``: 1 is linear attention."""
    if isinstance(freq, int):
        return [0 if (i + 1) % freq == 0 else 1 for i in range(num_layers)]
    return freq


def test_every_fourth_layer_is_attention() -> None:
    assert pattern_from_interval(8, 4) == (G, G, G, A, G, G, G, A)


def test_a_depth_that_is_no_multiple_of_the_interval() -> None:
    assert pattern_from_interval(6, 4) == (G, G, G, A, G, G)


@pytest.mark.parametrize(
    ("pattern", "freq"),
    [
        ((G, G, G, A), 4),
        ((G, A, G, A, G), 2),
        ((A, A), 1),
        ((A, G, G), [0, 1, 1]),
        ((G, A, A, G), [1, 0, 0, 1]),
        ((G, G), [1, 1]),
    ],
)
def test_megatron_value(pattern: tuple[LayerKind, ...], freq: int | list[int]) -> None:
    assert linear_attention_freq(pattern) == freq


@given(patterns)
def test_megatron_reads_the_same_pattern_back(pattern: tuple[LayerKind, ...]) -> None:
    read = megatron_reads(linear_attention_freq(pattern), len(pattern))
    assert read == [int(kind is G) for kind in pattern]


@given(st.integers(1, 40), st.integers(1, 12))
def test_an_interval_is_found_again(num_layers: int, interval: int) -> None:
    found = interval_of(pattern_from_interval(num_layers, interval))
    assert found == (interval if interval <= num_layers else None)


@given(patterns)
def test_names_and_kinds_are_the_same(pattern: tuple[LayerKind, ...]) -> None:
    assert pattern_from_names([kind.value for kind in pattern]) == pattern


def test_an_unknown_kind_is_named_with_its_position() -> None:
    with pytest.raises(ConfigError, match=r"layer_types\[1\].*\n.*full_atention.*\n.*\n.*full_att"):
        pattern_from_names(["linear_attention", "full_atention"])


@pytest.mark.parametrize("names", ["full_attention", 3, None])
def test_layer_types_must_be_a_list(names: object) -> None:
    with pytest.raises(ConfigError, match="must be a list"):
        pattern_from_names(names)  # type: ignore[arg-type]


@pytest.mark.parametrize("interval", [0, -1, 2.0, True, "4"])
def test_the_interval_must_be_a_positive_integer(interval: int) -> None:
    with pytest.raises(ConfigError, match="full_attention_interval must be a positive integer"):
        pattern_from_interval(4, interval)


def test_mtp_is_full_attention() -> None:
    assert mtp_pattern(1) == (A,)
    assert mtp_pattern(0) == ()
