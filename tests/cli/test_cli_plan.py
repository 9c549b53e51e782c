"""`qwen35 plan` as a user runs it: a process, its output, its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwen35_mcore.cli import app
from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner import command
from qwen35_mcore.planner.calibration.rows import default_calibration, read_calibration

ROOT = Path(__file__).parents[2]
GIB = 2**30
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
        timeout=600,
        check=False,
    )


def test_512_gpus() -> None:
    done = run(*LARGE, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["plans"]) == 5
    best = result["plans"][0]
    assert best["tp"] * best["pp"] * best["cp"] * best["dp"] == 512
    assert max(rank["total"] for rank in best["memory"]) <= 81_559 * 2**20
    assert result["calibration"] == default_calibration("h100-80g").source


def test_qwen3_next_is_planned() -> None:
    model = ("--flavor", "80b-a3b", "--gpus", "32", "--global-batch-size", "512")
    done = run(*model, "--explain", "pp=4,ep=8,recompute=full", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert (plan["dp"], plan["pipeline_layout"][-2:]) == (8, "mL")


def test_tables_say_what_they_rest_on() -> None:
    done = run(*PINNED)
    assert done.returncode == 0, done.stderr
    assert "pp=2 ep=8" in done.stdout
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


def test_table_and_picture_tell_one_story(tmp_path: Path) -> None:
    """The step and the memory of every rank, printed twice from one prediction."""
    picture = tmp_path / "not there yet" / "plan.svg"
    done = run(*PINNED, "--json", "--picture", str(picture))
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)["plans"][0]
    drawn, table = picture.read_text(), run(*PINNED).stdout
    for text in (f"step {best['step_s']:.2f} s", f"bubble {best['bubble']:.2f}"):
        assert text in drawn
        assert text.split()[1] in table
    for rank in best["memory"]:
        total = f"{rank['total'] / GIB:.1f}"
        assert f">{total}<" in drawn
        assert total in table


def test_two_gib_stay_free_unless_another_headroom_is_asked_for(tmp_path: Path) -> None:
    """In a search, in what it emits, and in --explain, which refuses what a search would."""
    card = 81_559 * 2**20
    fullest = {}
    for given in ((), ("--headroom", "0"), ("--headroom", "12.5")):
        found = json.loads(run(*SMALL, "--tp", "1", "--vpp", "1", *given, "--json").stdout)
        left = found["headroom_bytes"]
        assert left == (float(given[1]) if given else 2) * GIB
        for one in found["plans"]:
            assert max(rank["total"] for rank in one["memory"]) <= card - left
        fullest[left] = found["plans"][0]
    full = fullest[0]
    layout = f"pp={full['pp']},ep={full['ep']},mbs={full['micro_batch_size']}"
    layout += f",recompute={full['recompute']},graphs={full['graphs']}"
    layout += f",layout={full['pipeline_layout']}"
    used = max(rank["total"] for rank in full["memory"])
    free = (card - used) / GIB
    good = run(*SMALL, "--explain", layout, "--headroom", f"{free - 0.01:.2f}")
    assert good.returncode == 0, good.stdout
    too_much = f"{free + 0.1:.1f}"
    bad = run(*SMALL, "--explain", layout, "--headroom", too_much)
    assert bad.returncode == 1
    assert f"{too_much} stay free (--headroom)" in bad.stdout


def test_a_job_that_fits_without_headroom_is_told_so() -> None:
    """What the error advises works."""
    asked = ("--flavor", "35b-a3b", "--gpus", "8", "--global-batch-size", "64", "--gpu", "h200")
    done = run(*asked, "--headroom", "60")
    assert done.returncode == 2, done.stdout
    assert "--headroom 0" in done.stderr
    assert run(*asked, "--headroom", "0").returncode == 0


@pytest.mark.parametrize(
    ("gpus", "given", "nodes", "each"),
    [
        (20, (), 4, 5),
        (20, ("--gpus-per-node", "4"), 5, 4),
        (20, ("--gpus-per-node", "10"), 2, 10),
        (8, ("--gpus-per-node", "4"), 2, 4),
        (4, ("--gpus-per-node", "8"), 1, 4),
        (16, ("--gpu", "gb200"), 4, 4),
        (16, ("--gpu", "a100"), 2, 8),
    ],
)
def test_nodes_are_those_that_were_asked_for_and_said(
    gpus: int, given: tuple[str, ...], nodes: int, each: int, tmp_path: Path
) -> None:
    plan = tmp_path / "plan"
    asked = ("--flavor", "2b", "--gpus", str(gpus), "--global-batch-size", "240", "--pp", "1")
    done = run(*asked, *given, "--tp", "1", "--emit", str(plan))
    assert done.returncode == 0, done.stderr
    assert nodes == 1 or f"{nodes} nodes of {each} GPUs" in done.stdout
    assert f"--nodes={nodes} --gpus-per-node={each} " in (plan / "run.sh").read_text()
    written = json.loads((plan / "plan.json").read_text())
    assert (written["nodes"], written["gpus_per_node"]) == (nodes, each)


def test_a_gpu_that_nobody_measured_is_scaled_and_says_so() -> None:
    for gpu, precisions in (("a100", {"bf16"}), ("gb200", {"bf16", "fp8-blockwise"})):
        asked = ("--flavor", "9b", "--gpus", "8", "--global-batch-size", "64", "--gpu", gpu)
        done = run(*asked, "--precision", "all", "--tp", "1", "--json", "--top", "40")
        assert {one["precision"] for one in json.loads(done.stdout)["plans"]} >= precisions
        if gpu == "a100":
            assert "fp8" not in done.stdout
        assert "Measured on h100-80g, carried over to" in run(*asked, "--tp", "1").stdout
        assert gpu in run("--help").stdout
    bad = run(*SMALL, "--gpu", "a100", "--explain", "pp=4,ep=4,precision=fp8-tensorwise")
    assert bad.returncode == 1
    assert "a100-80g has no FP8" in bad.stdout


def test_an_error_leaves_standard_output_to_json_alone() -> None:
    for wrong in (("--gpu", "h10"), ("--tp", "3"), ("--picture", "plan")):
        done = run(*SMALL, "--json", *wrong)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")


def test_a_dry_run_names_everything_that_it_does_not_write(tmp_path: Path) -> None:
    plan, picture = tmp_path / "a plan", tmp_path / "plan.svg"
    done = run(*PINNED, "--emit", str(plan), "--picture", str(picture), "--dry-run")
    assert f"{picture}: the picture, not drawn" in done.stdout
    assert not list(tmp_path.iterdir())


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
    assert run(*PINNED, "--emit", str(folder), "--overwrite").returncode == 0


def test_an_existing_folder_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "search", lambda *_, **__: pytest.fail("it searched"))
    with pytest.raises(PlanError, match="exists already"):
        CliRunner().invoke(app, ["plan", *PINNED, "--emit", str(tmp_path)], catch_exceptions=False)


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
        ((*SMALL, "--picture", "plan"), ["no known format", "fix: name it plan.svg"]),
        ((*LARGE, "--picture", "README.md/plan.svg"), ["README.md is no folder", "fix: "]),
        ((*LARGE, "--emit", "README.md/plan"), ["README.md is no folder", "fix: "]),
        ((*SMALL, "--headroom", "90"), ["--headroom", "90 GiB of the 79.6", "fix: "]),
        ((*SMALL, "--headroom", "-1"), ["--headroom", "fix: "]),
        ((*SMALL, "--headroom", "nan"), ["--headroom", "fix: "]),
        (
            (*SMALL, "--gpus", "20", "--gpus-per-node", "8"),
            ["do not fill whole nodes", "--gpus 16 or 24", "1, 2, 4, 5"],
        ),
        (
            (*SMALL, "--gpu", "a100", "--precision", "fp8-tensorwise"),
            ["no such --precision of a100-80g", "allowed: bf16, all", "fix: "],
        ),
        ((*SMALL, "--optimizer", "sgd"), ["no such --optimizer", "precision-aware, muon"]),
        ((*SMALL, "--graphs", "half"), ["no such --graphs", "none, parts, full, all"]),
        (
            (*LARGE, "--flavor", "9b", "--dispatcher", "ncclep"),
            ["spreads experts in a node", "take dispatcher=alltoall"],
        ),
        ((*SMALL, "--explain", "tp=2,layout="), ["layout is empty", "fix: "]),
        ((*SMALL, "--explain", "tp"), ["got: tp", "tp=N"]),
        ((*SMALL, "--explain", "tp=99999999999999999999999999"), ["got: tp=9999"]),
        ((*SMALL, "--explain", "=4"), ["cannot read the layout", "NAME=VALUE"]),
        ((*SMALL, "--emit", "pyproject.toml", "--overwrite"), ["is a file"]),
    ],
)
def test_bad_input_is_one_clear_error(arguments: tuple[str, ...], words: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("name", ["gpus", "global-batch-size"])
def test_sizes_that_no_search_ends_for_are_refused(name: str) -> None:
    done = CliRunner().invoke(app, ["plan", *SMALL, f"--{name}", "1000000000"])
    assert done.exit_code == 2
    assert f"--{name}" in done.output


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
LAUNCHES = {"part": "gdn", "precision": "bf16", "forward_ms": 1.0, "backward_ms": 2.0}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        {"schema": 2},
        {"schema": 1},
        {"schema": 1, "layers": []},
        {"schema": 1, "layers": 5},
        {"schema": 1, "layers": None},
        {"schema": 1, "layers": [LAYER], "gpu": "v100"},
        {"schema": 1, "layers": [LAYER | {"precision": "fp8-tensorwise"}], "gpu": "a100"},
        {"schema": 1, "layers": [{"part": "gdn"}]},
        {"schema": 1, "layers": [LAYER], "newton_schulz_tflops": "fast"},
        {"schema": 1, "layers": [LAYER], "newton_schulz_tflops": -1.0},
        {"schema": 1, "layers": [LAYER], "launches": {}},
        {"schema": 1, "layers": [LAYER], "launches": [5]},
        *(
            {"schema": 1, "layers": [LAYER], "launches": [LAUNCHES | wrong]}
            for wrong in (
                {"part": "head"},
                {"part": ["gdn"]},
                {"precision": "fp4"},
                {"forward_ms": 0},
                {"backward_ms": float("nan")},
            )
        ),
        *(
            {"schema": 1, "layers": [LAYER | wrong]}
            for wrong in (
                {"forward_ms": float("nan")},
                {"backward_ms": float("inf")},
                {"forward_ms": 0},
                {"backward_ms": -1.0},
                {"graphed_forward_ms": 1.0},
                {"graphed_forward_ms": 1.0, "graphed_backward_ms": 0.0},
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


def test_the_optimizer_and_graphs_of_a_plan_are_in_its_command() -> None:
    ways = ("--optimizer", "precision-aware", "--graphs", "full", "--dispatcher", "ncclep")
    asked = ("--flavor", "35b-a3b", "--gpus", "8", "--global-batch-size", "64", "--gpu", "h200")
    done = run(*asked, *ways, "--emit", "plans/unwritten", "--dry-run")
    assert done.returncode == 0, done.stderr
    for line in (
        *("--use-precision-aware-optimizer", "--exp-avg-sq-dtype bf16"),
        *("--moe-flex-dispatcher-backend ncclep", "--cuda-graph-impl full_iteration"),
    ):
        assert f"\n{line}\n" in done.stdout
    assert '"optimizer": "precision-aware"' in done.stdout
    assert "dispatcher=ncclep,graphs=full" in done.stdout


def test_a_calibration_changes_the_prediction(tmp_path: Path) -> None:
    """Every part and its launches twice as fast as the built-in figures: a faster step."""
    row = {"flavor": "35b-a3b", "seq_length": 4096, "micro_batch_size": 1, "precision": "bf16"}
    parts = {"gdn": (0.7, 1.3), "attention": (0.8, 1.5), "moe": (1.3, 2.2)}
    layers = [
        {**row, "part": part, "forward_ms": forward, "backward_ms": backward}
        | ({"local_experts": 32} if part == "moe" else {})
        for part, (forward, backward) in parts.items()
    ]
    file = tmp_path / "calibration.json"
    launches = [
        {"part": part, "precision": "bf16", "forward_ms": forward, "backward_ms": backward}
        for part, (forward, backward) in parts.items()
    ]
    content = {"schema": 1, "gpu": "h100-80g", "layers": layers, "launches": launches}
    file.write_text(json.dumps(content))
    layout = ("--explain", "pp=2,ep=8,recompute=full", "--json")
    slow = json.loads(run(*SMALL, *layout).stdout)
    fast = json.loads(run(*SMALL, *layout, "--calibration", str(file)).stdout)
    assert fast["calibration"] == str(file)
    assert fast["not_measured"] == ["mtp", "output", "embedding"]
    assert fast["plan"]["step_s"] < 0.75 * slow["plan"]["step_s"]


def test_a_model_from_a_config_file(tmp_path: Path) -> None:
    from qwen35_mcore.config.flavors import get_flavor

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
