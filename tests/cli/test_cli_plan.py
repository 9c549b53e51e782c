"""`qwen35 plan` as a user runs it: a process, its output, its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import pytest
from typer.testing import CliRunner

from qwen35_mcore.cli import app
from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.calibration import default_calibration, read_calibration

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "megatron", "transformers", "numpy", "pyarrow", "matplotlib")
SMALL = ("--flavor", "35b-a3b", "--gpus", "16", "--global-batch-size", "512")
LARGE = ("--flavor", "397b-a17b", "--gpus", "512", "--global-batch-size", "1024")
PINNED = (*SMALL, "--tp", "1", "--pp", "2", "--ep", "8", "--vpp", "1")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwen35_mcore.cli", "plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_512_gpus_in_under_ten_seconds() -> None:
    """Of processor time, because tests run beside each other."""
    before = getrusage(RUSAGE_CHILDREN).ru_utime
    done = run(*LARGE, "--json")
    assert getrusage(RUSAGE_CHILDREN).ru_utime - before < 10
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["plans"]) == 5
    best = result["plans"][0]
    assert best["tp"] * best["pp"] * best["cp"] * best["dp"] == 512
    assert max(rank["total"] for rank in best["memory"]) <= 81_559 * 2**20
    assert result["calibration"] == default_calibration("h100-80g").source


def test_tables_say_what_they_rest_on() -> None:
    done = run(*PINNED)
    assert done.returncode == 0, done.stderr
    assert "pp2 ep8" in done.stdout
    assert "pipeline layout  E" in done.stdout
    assert default_calibration("h100-80g").source in done.stdout.replace("\n", "")
    assert "GiB for CUDA, NCCL and fragmentation" in done.stdout


def test_explaining_ends_with_1_where_the_layout_cannot_run() -> None:
    good = run(*SMALL, "--explain", "pp=2,ep=8,recompute=full", "--json")
    assert good.returncode == 0
    assert json.loads(good.stdout)["plan"]["pipeline_layout"].endswith("mL")
    bad = run(*SMALL, "--explain", "tp=3")
    assert bad.returncode == 1
    assert "tp divides num_attention_heads" in bad.stdout


def test_emit_and_its_dry_run(tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    dry = run(*PINNED, "--emit", str(folder), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not folder.exists()
    assert "--pipeline-model-parallel-layout" in dry.stdout
    done = run(*PINNED, "--emit", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plans"]
    assert {file.name for file in folder.iterdir()} == {"layout.args", "plan.json", "run.sh"}
    begin = time.monotonic()
    # said before the search of 512 GPUs, not after it
    again = run(*LARGE, "--emit", str(folder))
    assert time.monotonic() - begin < 5
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert run(*PINNED, "--emit", str(folder), "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*SMALL, "--gpu", "h10"), ["no such GPU", "h100-80g"]),
        (("--gpus", "16", "--global-batch-size", "512"), ["exactly one model"]),
        ((*SMALL, "--flavor", "35b"), ["no such flavor", "35b-a3b"]),
        (("--flavor", "35b-a3b", "--gpus", "7", "--global-batch-size", "7"), ["--gpus 16"]),
        ((*SMALL, "--precision", "fp4"), ["fp8-blockwise", "fp8-tensorwise, all"]),
        ((*SMALL, "--recompute", "some"), ["selective"]),
        (
            (*SMALL, "--calibration", "missing.json"),
            ["cannot read the calibration file", "got: missing.json: No such file or", "fix: "],
        ),
        ((*SMALL, "--explain", "tpp=1"), ["did you mean tp"]),
        ((*SMALL, "--tp", "1", "--pp", "2", "--global-batch-size", "509"), ["504 or 512"]),
        (
            (*SMALL, "--tp", "3"),
            ["obeys the rules", "tp divides num_attention_heads", "allowed: ", "fix: "],
        ),
        (
            ("--flavor", "9b", "--gpus", "8", "--global-batch-size", "64", "--ep", "2"),
            ["obeys the rules", "ep"],
        ),
        ((*SMALL, "--explain", "pp=2,ep=8", "--tp", "2", "--ep", "8"), ["--tp --ep", "mbs=1"]),
        ((*SMALL, "--explain", "pp=2", "--precision", "bf16"), ["--precision"]),
        ((*SMALL, "--dry-run"), ["add --emit DIR"]),
        ((*SMALL, "--overwrite"), ["add --emit DIR"]),
        ((*SMALL, "--picture", "plan.jpg"), ["no known format", "*.svg"]),
        (
            (*LARGE, "--picture", "nowhere/plan.svg"),
            ["nowhere/plan.svg: there is no folder nowhere", "make the folder first"],
        ),
        ((*SMALL, "--emit", "pyproject.toml", "--overwrite"), ["is a file"]),
    ],
)
def test_bad_input_is_one_clear_error(arguments: tuple[str, ...], words: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_sizes_below_one_are_refused() -> None:
    """Where the command line is read: in one process, because there are ten."""
    sizes = ("gpus", "global-batch-size", "seq-length", "tp", "pp", "vpp", "cp", "ep", "etp")
    for name in (*sizes, "micro-batch-size"):
        done = CliRunner().invoke(app, ["plan", *SMALL, f"--{name}", "0"])
        assert done.exit_code == 2, name
        assert f"--{name}" in done.output


LAYER = {
    "part": "gdn",
    "flavor": "35b-a3b",
    "seq_length": 4096,
    "micro_batch_size": 1,
    "precision": "bf16",
    "forward_ms": 1.0,
    "backward_ms": 2.0,
}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        {"schema": 2},
        {"schema": 1},
        {"schema": 1, "layers": []},
        {"schema": 1, "layers": 5},
        {"schema": 1, "layers": None},
        {"schema": 1, "layers": [LAYER], "runs": {}},
        {"schema": 1, "layers": [LAYER], "gpu": "a100"},
        {"schema": 1, "layers": [{"part": "gdn"}]},
        *(
            {"schema": 1, "layers": [LAYER | wrong]}
            for wrong in (
                {"forward_ms": float("nan")},
                {"backward_ms": float("inf")},
                {"forward_ms": 0},
                {"backward_ms": -1.0},
                {"seq_length": 0},
                {"seq_length": float("inf")},
                {"seq_length": 10**400},
                {"micro_batch_size": 0},
                {"precision": "fp4"},
                {"precision": None},
            )
        ),
    ],
    ids=lambda content: str(content)[:60],
)
def test_a_calibration_that_cannot_be_read(content: object, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(PlanError) as caught:
        read_calibration(file)
    assert str(file) in str(caught.value)


def test_a_broken_calibration_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text('{"schema": 1, "layers": null}')
    done = run(*SMALL, "--calibration", str(file))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_calibration_changes_the_prediction(tmp_path: Path) -> None:
    """Every measured part twice as fast as the built-in figures: a faster step."""
    row = {"flavor": "35b-a3b", "seq_length": 4096, "micro_batch_size": 1, "precision": "bf16"}
    parts = {"gdn": (0.7, 1.3), "attention": (0.8, 1.5), "moe": (1.3, 2.2)}
    layers = [
        {**row, "part": part, "forward_ms": forward, "backward_ms": backward}
        | ({"local_experts": 32} if part == "moe" else {})
        for part, (forward, backward) in parts.items()
    ]
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"schema": 1, "gpu": "h100-80g", "layers": layers, "runs": []}))
    layout = ("--explain", "pp=2,ep=8,recompute=full", "--json")
    slow = json.loads(run(*SMALL, *layout).stdout)
    fast = json.loads(run(*SMALL, *layout, "--calibration", str(file)).stdout)
    assert fast["calibration"] == str(file)
    assert fast["not_measured"] == ["mtp", "output", "embedding"]
    assert fast["plan"]["step_s"] < 0.75 * slow["plan"]["step_s"]


def test_a_model_from_a_config_file(tmp_path: Path) -> None:
    from qwen35_mcore.flavors import get_flavor

    (tmp_path / "config.json").write_text(json.dumps(get_flavor("2b").to_hf()))
    asked = ("--hf-config", str(tmp_path), "--gpus", "8", "--global-batch-size", "64")
    done = run(*asked, "--emit", str(tmp_path / "plan"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"--hf-config {tmp_path}" in done.stdout


def test_planning_imports_nothing_heavy() -> None:
    code = (
        f"import sys; sys.argv = ['qwen35', 'plan', *{PINNED!r}]\n"
        "from qwen35_mcore.cli import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code, end\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
