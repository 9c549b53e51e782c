"""Scripts of examples/: they train as the package does, and what is put into them trains."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.cli.test_pretrain_errors import ROOT, flags
from tests.helpers.pretrain_runs import script_server

STEPS = ["--flavor", "tiny-dense", "--global-batch-size", "2", "--train-iters", "2"]
STEPS += ["--log-interval", "1"]


def example() -> Any:
    path = ROOT / "examples" / "pretrain_qwen35.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def the_example(package: Any) -> None:
    package.main = example().main


def one_of_my_own(package: Any) -> None:
    """The example with another loss and other datasets."""
    module = example()
    package.main = module.main
    its_loss, its_datasets = module.loss_function, module.datasets

    def loss_function(loss_mask: Any, token_losses: Any) -> Any:
        loss, tokens, logged = its_loss(loss_mask, token_losses)
        half, count = logged["lm loss"].unbind()
        return loss / 2, tokens, {"my loss": (half / 2).new_tensor([half / 2, count])}

    def datasets(sample_counts: list[int], vp_stage: int | None = None) -> Any:
        print(f"my datasets of {sample_counts[0]} samples")
        return its_datasets(sample_counts, vp_stage)

    datasets.is_distributed = True  # type: ignore[attr-defined]
    module.loss_function, module.datasets = loss_function, datasets


def losses(before: Any = None, name: str = "lm loss") -> tuple[list[float], str]:
    run = script_server().start(flags(*STEPS), before=before)
    assert run.wait() == [0], run.output()
    found = re.findall(rf"\| {name}: (\S+)", run.output())
    assert len(found) == 2
    return [float(text) for text in found], run.output()


def test_it_trains_as_the_package_does() -> None:
    assert losses(the_example)[0] == losses()[0]


def test_a_loss_and_datasets_of_ones_own() -> None:
    mine, output = losses(one_of_my_own, "my loss")
    assert "my datasets of 4 samples" in output
    assert mine[0] == losses()[0][0] / 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("decoder", ["gpt", "hybrid"])
def test_every_layer_pattern_learns(decoder: str) -> None:
    """A uniform guess has a loss of 4.16; mixed layers are far below it at the end."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples/layer_pattern.py", "--decoder", decoder],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\S.*?) +(\d\.\d\d) +\d+$", done.stdout, flags=re.M)
    assert len(rows) == 4, done.stdout
    assert all(float(loss) < 4.1 for _, loss in rows)
    assert min(float(loss) for _, loss in rows) < 3.2
