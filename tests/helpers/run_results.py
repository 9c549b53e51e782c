"""What a training run left behind: logged numbers with all their digits, and checkpoints."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint_tools.mcore.read import MegatronCheckpoint
from checkpoint_tools.table.transforms import Box

LOGGED = ("lm loss", "mtp_1 loss", "grad-norm", "learning-rate", "lm loss validation")
MAIN_PARAMETER = re.compile(r"^optimizer\.state\.(?:fp32_)?param\.")


def logged_scalars(
    folder: Path, names: tuple[str, ...] = LOGGED
) -> dict[str, dict[int, list[float]]]:
    """Everything in ``names`` that a run wrote for TensorBoard, in float32, by step. The last step
    has several validation losses: of the interval, of the end, and of the test set."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in names if tag in events.Tags()["scalars"]]
    values: dict[str, dict[int, list[float]]] = {tag: {} for tag in tags}
    for tag in tags:
        for event in events.Scalars(tag):
            values[tag].setdefault(event.step, []).append(event.value)
    return values


def printed_losses(output: str) -> dict[int, str]:
    """The language model's loss in each of megatron's log lines, as it is written there."""
    lines = re.findall(r"iteration +(\d+)/ *\d+ \|.* lm loss: (\S+) \|", output)
    return {int(step): loss for step, loss in lines}


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every global tensor of a checkpoint folder: parameters and optimizer state.

    Asserts that the optimizer's main parameters are those of the model, so state that was saved
    under another parameter's name or position is not mistaken for a good checkpoint.
    """
    checkpoint = MegatronCheckpoint(folder)
    tensors = {
        key: checkpoint.read(key, Box.whole(tensor.shape)).clone()
        for key, tensor in checkpoint.tensors.items()
    }
    for key, main in tensors.items():
        name = MAIN_PARAMETER.sub("", key)
        if name != key:
            # rounded, ties to even or away from zero, or from more digits than a float16 copy has
            narrow = tensors[name].dtype == torch.bfloat16
            near = {"rtol": 2**-7, "atol": 1e-9} if narrow else {"rtol": 0.0, "atol": 0.0}
            assert torch.allclose(main, tensors[name].float(), **near), key
    return tensors


def checkpoint_common(folder: Path) -> dict[str, Any]:
    """The common state: iteration, arguments, parameter groups, schedule."""
    return MegatronCheckpoint(folder).common


def checkpoint_random_states(folder: Path) -> dict[str, Any]:
    """Stored random states by key, as lists of numbers."""
    checkpoint = MegatronCheckpoint(folder)
    states = {}
    for key, stored in checkpoint.objects.items():
        if key.startswith("rng_state"):
            content = checkpoint.files[stored.file].bytes(stored.offset, stored.length)
            states[key] = _numbers(torch.load(io.BytesIO(bytes(content)), weights_only=False))
    return states


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value


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
