"""One of every kind and short fuzzing in `make test`, everything in `make test-all`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
from hypothesis import settings

PROFILES = {"quick": 20, "exhaustive": 100}
"""Examples of a property that asks for no other number, by hypothesis profile."""


def kinds(
    cases: Iterable[Any], kept: Collection[str], name: Callable[[Any], str] = str
) -> list[Any]:
    """Parameters of a test, each with its name as id; without those in ``kept``, exhaustive."""
    parameters = [
        pytest.param(
            case,
            id=name(case),
            marks=() if name(case) in kept else pytest.mark.exhaustive,
        )
        for case in cases
    ]
    assert set(kept) <= {parameter.id for parameter in parameters}
    return parameters


def examples(count: int, **options: Any) -> settings:
    """Settings of a property with ``count`` examples in `make test-all`, and its share of them in
    `make test`."""
    share = settings().max_examples / PROFILES["exhaustive"]
    return settings(max_examples=max(1, round(count * share)), **options)
