"""`qwen35 flags`: the classes of megatron's flags, counted and one by one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from qwen35_mcore.cli import app
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.training.flags import GROUPS, TABLE, counts


def output(*flags: str) -> str:
    done = CliRunner().invoke(app, ["flags", *flags], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_the_overview_counts_every_flag() -> None:
    header, *rows = output().splitlines()
    assert "decided by the model" in header
    assert len(rows) == len(GROUPS) + 1
    cells = [[int(cell) for cell in row.split()[-4:]] for row in rows]
    assert cells[-1] == list(counts().values())
    assert [sum(column) for column in zip(*cells[:-1], strict=True)] == cells[-1]
    assert sum(cells[-1]) == len(TABLE)


def test_one_flag_in_any_spelling() -> None:
    wanted = "moe_layer_freq (experts)\n  decided by the model: Qwen3.5 has no such thing"
    for spelling in ("--moe-layer-freq", "moe_layer_freq", "moe-layer-freq"):
        assert output(spelling).startswith(wanted)
    assert output("--no-bias-swiglu-fusion").startswith("bias_swiglu_fusion (kernels)\n  free: ")


def test_what_single_values_need() -> None:
    lines = output("optimizer", "--rampup-batch-size").splitlines()
    assert lines[0] == "optimizer (optimizer)"
    assert any(line.startswith("  muon or ") and "package:emerging" in line for line in lines)
    assert "--step-batch-size-schedule" in lines[-1]


def test_a_flag_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="did you mean moe_layer_freq"):
        output("--moe-layer-frq")


def test_it_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'megatron'}"
    code = f"import sys, qwen35_mcore.training.flags.show; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
