"""What a training run left behind: logged numbers with all their digits, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.mcore_io import MegatronCheckpoint
from checkpoint_tools.transforms import Box

LOGGED = ("lm loss", "mtp_1 loss", "grad-norm", "learning-rate", "lm loss validation")


def logged_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Value by step of everything in `LOGGED` that a run wrote for TensorBoard, in float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in LOGGED if tag in events.Tags()["scalars"]]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every global tensor of a checkpoint folder: parameters and optimizer state."""
    checkpoint = MegatronCheckpoint(folder)
    return {
        key: checkpoint.read(key, Box((0,) * len(tensor.shape), tensor.shape)).clone()
        for key, tensor in checkpoint.tensors.items()
    }


def checkpoint_common(folder: Path) -> dict[str, Any]:
    """The common state: iteration, arguments, parameter groups, schedule."""
    return MegatronCheckpoint(folder).common


def checkpoint_random_states(folder: Path) -> dict[str, Any]:
    """Stored random states by key."""
    checkpoint = MegatronCheckpoint(folder)
    keys = [key for key in checkpoint.objects if key.startswith("rng_state")]
    return {key: checkpoint.object(key) for key in keys}


def assert_same_tensors(a: Path, b: Path) -> None:
    """Two checkpoints hold the same tensors, bit for bit, moments and main parameters included."""
    tensors_a, tensors_b = checkpoint_tensors(a), checkpoint_tensors(b)
    assert tensors_a.keys() == tensors_b.keys()
    moments = [key for key in tensors_a if key.startswith("optimizer.state.exp_avg")]
    parameters = [key for key in tensors_a if not key.startswith("optimizer.")]
    assert len(moments) == 2 * len(parameters) > 0
    assert any(tensors_a[key].any() for key in moments)
    different = [key for key in tensors_a if not torch.equal(tensors_a[key], tensors_b[key])]
    assert not different, different
