"""Every patch of megatron-core: its fault is there on the installed release, and it is applied."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore.patches import install as installation
from qwen35_mcore.mcore.patches import random_states
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
            file=patch.file,
            upstream=patch.upstream,
            verdict=named.get(patch.name, Verdict.NO_FAULT),
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


def test_a_patch_without_its_target_is_one_error() -> None:
    gone = dataclasses.replace(PATCHES[0], name="gone", target="megatron.training:no_such_name")
    with pytest.raises(ConfigError, match=r"patch 'gone' finds no megatron.training:no_such_name"):
        gone.apply()


UNTESTED_RELEASE = """
from qwen35_mcore.mcore import cpu_mode
cpu_mode.enable_training()
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore.patches.install import install
try:
    install(max)
except ConfigError as error:
    print(error)
install(max, accept_untested=True)
"""
TEXT_OF_ANOTHER_RELEASE = """
import inspect
getsource = inspect.getsource
inspect.getsource = lambda part: getsource(part).upper()
"""


def test_no_patch_is_silent_on_another_release(tmp_path: Path) -> None:
    """The installed release under another number, its text written otherwise: probes that read
    text cannot tell any more, the others find their faults."""
    (tmp_path / "megatron_core-0.19.3.dist-info").mkdir()
    (tmp_path / "megatron_core-0.19.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.19.3\n"
    )
    (tmp_path / "sitecustomize.py").write_text(TEXT_OF_ANOTHER_RELEASE)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", UNTESTED_RELEASE],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, _, notice = done.stdout.partition("megatron-core 0.19.3 was not tested")
    assert "got: megatron-core 0.19.3; cannot tell: " in error
    assert f"pass {installation.ACCEPT_FLAG}" in error
    reading = {patch.name for patch in PATCHES if "inspect" in patch.probe.__code__.co_names}
    unsure = error.partition("cannot tell: ")[2].partition("\n")[0]
    assert set(unsure.split(", ")) == reading
    applied = {name for line in notice.splitlines() for name in line.partition(": ")[2].split(", ")}
    assert applied >= {patch.name for patch in PATCHES}


@pytest.mark.parametrize("kind", ["torch_dist", "fsdp_dtensor", "plain"])
def test_random_generators_are_saved_as_tensors(kind: str) -> None:
    """As runs without graphs save them, so that either goes on with the other's."""
    state = torch.Generator().manual_seed(7)
    ranks: Any = [{random_states.STATES: {"model": state, "experts": state.get_state()}}]
    formats = {"torch_dist": Namespace(data=ranks), "fsdp_dtensor": {"(0, 0)": ranks}}
    random_states.PATCH.replace(lambda: formats.get(kind, ranks))()
    for saved in ranks[0][random_states.STATES].values():
        assert torch.equal(saved, state.get_state())
