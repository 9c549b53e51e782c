"""Every patch of megatron-core: its fault is there on the installed release, and it is applied."""

from __future__ import annotations

import functools

import pytest

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore.patches import install as installation
from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.probes import Probed, probe_all
from qwen35_mcore.mcore.patches.table import PATCHES
from qwen35_mcore.mcore.patches.verdict import Verdict


@functools.cache
def probed() -> dict[str, Probed]:
    return {one.name: one for one in probe_all()}


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_the_fault_is_there(patch: Patch) -> None:
    """A fault that megatron-core mended fails here by name: take the patch out then."""
    assert probed()[patch.name].verdict is Verdict.FAULT


def step_flops(tokens: float, squares: float) -> float:
    return tokens + squares


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the patches that are applied, instead of applying them."""
    names: list[str] = []
    monkeypatch.setattr(Patch, "apply", lambda patch: names.append(patch.name))
    return names


def untested(monkeypatch: pytest.MonkeyPatch, **verdicts: Verdict) -> None:
    """Another release, in which every fault is mended but for those that are named."""
    named = {name.replace("_", " "): verdict for name, verdict in verdicts.items()}
    assert named.keys() <= {patch.name for patch in PATCHES}
    every = [
        Probed(
            name=patch.name,
            target=patch.target,
            why=patch.why,
            upstream=patch.upstream,
            verdict=named.get(patch.name, Verdict.MENDED),
        )
        for patch in PATCHES
    ]
    monkeypatch.setattr(installation, "installed_megatron_core", lambda: "0.19.9")
    monkeypatch.setattr(installation, "probe_all", lambda: every)


def test_a_tested_release_gets_all_of_them(applied: list[str]) -> None:
    installation.install(step_flops)
    assert applied == [patch.name for patch in PATCHES]


def test_another_release_gets_what_its_probes_show(
    applied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    untested(monkeypatch, bucket_padding=Verdict.FAULT)
    installation.install(step_flops)
    assert applied == ["bucket padding"]


def test_what_no_probe_can_judge_stops_the_run(
    applied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    untested(monkeypatch, bucket_padding=Verdict.FAULT, seed_of_data_loaders=Verdict.UNKNOWN)
    with pytest.raises(ConfigError, match="cannot tell: seed of data loaders") as error:
        installation.install(step_flops)
    assert installation.ACCEPT_FLAG in str(error.value)
    assert not applied
    installation.install(step_flops, accept_untested=True)
    assert applied == ["bucket padding", "seed of data loaders"]
