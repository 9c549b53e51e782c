"""Why plans cut between layers: cuts inside them gain little."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.compare_cuts import PRESETS, compare


@pytest.mark.parametrize("folder", sorted(PRESETS.iterdir()), ids=lambda folder: folder.name)
def test_a_step_of_a_preset_gets_at_most_one_per_cent_shorter(folder: Path) -> None:
    layers, halves = compare(json.loads((folder / "plan.json").read_text()))
    assert 0.99 * layers <= halves <= layers
