"""What `--emit` writes: accepted by megatron, the same every time, never half of it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.errors import PlanError
from qwen35_mcore.parallel.stages import parse_pipeline_layout
from qwen35_mcore.planner.calibration.rows import default_calibration
from qwen35_mcore.planner.candidate import (
    CAPACITY_FACTOR,
    RECOMPUTE,
    Candidate,
    Job,
    recompute_modules,
)
from qwen35_mcore.planner.command import DEFAULT_HEADROOM_GIB
from qwen35_mcore.planner.emit import emit, files, flags, layout_args
from qwen35_mcore.planner.explain import parse_layout
from qwen35_mcore.planner.hardware import GIB, get_gpu
from qwen35_mcore.planner.prediction import Prediction, predict
from tests.helpers.flag_words import checking_parser, without_gpu_flags

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "launch" / "presets").iterdir())


def job_of(flavor: str, gpus: int, batch: int) -> Job:
    return Job(
        model_config=get_flavor(flavor),
        gpu=get_gpu("h100-80g"),
        gpus=gpus,
        seq_length=4096,
        global_batch_size=batch,
        calibration=default_calibration("h100-80g"),
        model_name=flavor,
        model_flags=("--flavor", flavor),
    )


def preset_prediction(folder: Path) -> Prediction:
    """The plan of a preset, predicted again."""
    asked = json.loads((folder / "plan.json").read_text())
    job = job_of(asked["model"], asked["gpus"], asked["global_batch_size"])
    assert asked["headroom_bytes"] == DEFAULT_HEADROOM_GIB * GIB
    job = replace(job, headroom_bytes=asked["headroom_bytes"])
    assert asked["calibration"] == job.calibration.source
    assert (asked["gpu"], asked["seq_length"]) == (job.gpu.name, job.seq_length)
    candidate, _ = parse_layout(asked["layout"])
    return predict(job, candidate)


@pytest.mark.parametrize("folder", PRESETS, ids=lambda folder: folder.name)
def test_presets_are_what_the_planner_writes(folder: Path) -> None:
    """To write them again: qwen35 plan ... --explain LAYOUT --emit FOLDER --overwrite, with the
    layout in plan.json; without --explain the layout is searched anew."""
    expected = files(preset_prediction(folder), folder)
    assert {file.name: file.read_text() for file in folder.iterdir()} == expected
    assert os.access(folder / "run.sh", os.X_OK)


def test_the_presets_are_those_that_are_promised() -> None:
    sizes = {
        (plan["model"], plan["gpus"])
        for folder in PRESETS
        for plan in [json.loads((folder / "plan.json").read_text())]
    }
    assert sizes == {("35b-a3b", 16), ("122b-a10b", 128), ("397b-a17b", 512)}


PLANS = [
    (job_of("35b-a3b", 16, 512), Candidate(pp=2, ep=8, recompute="selective")),
    (job_of("35b-a3b", 32, 512), Candidate(tp=2, pp=4, vpp=2, ep=8)),
    (job_of("9b", 16, 64), Candidate(tp=4, etp=4, recompute="selective")),
    (job_of("9b", 16, 64), Candidate(tp=4, etp=4, precision="fp8-blockwise")),
    (job_of("9b", 16, 64), Candidate(tp=4, etp=4, precision="fp8-tensorwise")),
    (job_of("2b", 8, 64), Candidate(pp=4, recompute="full")),
    (job_of("397b-a17b", 512, 1024), Candidate(tp=4, pp=16, ep=8, micro_batch_size=2)),
    (replace(job_of("35b-a3b", 16, 512), optimizer="muon"), Candidate(pp=2, ep=8, graphs="parts")),
    (
        replace(job_of("35b-a3b", 8, 64), optimizer="precision-aware"),
        Candidate(ep=8, dispatcher="ncclep", graphs="full"),
    ),
    (job_of("9b", 16, 64), Candidate(tp=4, etp=4, graphs="parts", recompute="selective")),
]

CHECK = """
import json, os, sys
os.environ.update(RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
from qwen35_mcore.mcore import cpu_mode
cpu_mode.enable_training()
from megatron.core.transformer.enums import LayerType
from megatron.training import global_vars
from qwen35_mcore.training.arguments import parse_arguments

run = "--mock-data --train-iters 10 --lr 1e-4 --tokenizer-type NullTokenizer --vocab-size 1000"
names = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
parsed = []
for gpus, words in json.load(sys.stdin):
    os.environ["WORLD_SIZE"] = str(gpus)
    args, _ = parse_arguments([*words, *run.split()])
    layout = args.pipeline_model_parallel_layout
    if isinstance(layout, str):
        from megatron.core.transformer.pipeline_parallel_layer_layout import (
            PipelineParallelLayerLayout,
        )
        layout = PipelineParallelLayerLayout.from_str(layout, args.pipeline_model_parallel_size)
    parsed.append(
        {
            "dp": args.data_parallel_size,
            "vpp": args.virtual_pipeline_model_parallel_size or 1,
            "ep": args.expert_model_parallel_size,
            "etp": args.expert_tensor_parallel_size,
            "optimizer": args.optimizer,
            "aware": args.use_precision_aware_optimizer,
            "stages": layout and [
                ["".join(names[one.name] for one in layout.layout[rank][stage])
                 for stage in range(len(layout.layout[rank]))]
                for rank in range(len(layout.layout))
            ],
        }
    )
    global_vars.unset_global_variables()
print("RESULT", json.dumps(parsed))
"""


def test_megatron_accepts_every_flag_and_reads_the_same_layout() -> None:
    """Its parser, its argument check at the plan's world size, its layout class."""
    predictions = [predict(job, candidate) for job, candidate in PLANS]
    predictions += [preset_prediction(folder) for folder in PRESETS]
    asked = [(one.job.gpus, flags(one)) for one in predictions]
    for _, words in asked:
        without_gpu_flags(words)
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        input=json.dumps(asked),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    for one, parsed in zip(predictions, json.loads(line.removeprefix("RESULT ")), strict=True):
        candidate, pp = one.candidate, one.candidate.pp
        assert parsed["dp"] == candidate.dp(one.job)
        assert parsed["vpp"] == candidate.vpp
        assert (parsed["ep"], parsed["etp"]) == (candidate.ep, candidate.etp)
        optimizer = one.job.optimizer
        assert parsed["optimizer"] == ("muon" if optimizer == "muon" else "adam")
        assert parsed["aware"] == (optimizer == "precision-aware")
        stages = parse_pipeline_layout(one.pipeline_layout)
        assert stages == one.stages
        if pp > 1:
            assert parsed["stages"] == [list(stages[rank::pp]) for rank in range(pp)]


def test_files_can_be_read_by_a_shell(tmp_path: Path) -> None:
    prediction = predict(*PLANS[0])
    emit(prediction, tmp_path / "plan")
    script = f"bash -n {tmp_path}/plan/run.sh && xargs -r printf '%s\\n' < /dev/stdin"
    words = [line for line in layout_args(prediction).splitlines() if not line.startswith("#")]
    done = subprocess.run(
        ["bash", "-c", script], input="\n".join(words), capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:-1] == flags(prediction)
    assert shlex.join(flags(prediction)).count("*") > 0


@pytest.mark.parametrize(
    ("gpus", "nodes", "each"), [(4, 0, 4), (8, 0, 8), (16, 2, 8), (12, 2, 6), (20, 4, 5)]
)
def test_the_command_starts_as_many_ranks_as_there_are_gpus(
    gpus: int, nodes: int, each: int
) -> None:
    job = job_of("2b", gpus, 240)
    text = files(predict(job, Candidate()), Path("plan"))["run.sh"]
    assert f"exec sbatch --nodes={nodes or 1} --gpus-per-node={each} " in text
    assert (f"NPROC=${{NPROC:-{each}}} exec" in text) == (nodes == 0)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("flavor", ["2b", "35b-a3b"])
def test_recomputation_flags(flavor: str, recompute: str) -> None:
    job = job_of(flavor, 32, 64)
    candidate = Candidate(pp=4, ep=8 if job.model_config.is_moe else 1, recompute=recompute)
    words = flags(predict(job, candidate))
    assert ("--recompute-granularity" in words) == (recompute != "none")
    if recompute == "selective":
        first = words.index("--recompute-modules") + 1
        modules = recompute_modules(job.model_config)
        assert tuple(words[first : first + len(modules)]) == modules


@pytest.mark.parametrize("graphs", ["parts", "full"])
def test_a_gpu_takes_nccl_ep_and_graphs(graphs: str) -> None:
    """The table of a run's flags, as on a GPU."""
    job = job_of("35b-a3b", 8, 64)
    words = flags(predict(job, Candidate(ep=8, dispatcher="ncclep", graphs=graphs)))
    parser = checking_parser(job.model_config, on_cpu=False)
    args = parser.parse_args(words[2:])  # without --flavor, which is not megatron's
    assert (args.moe_token_dispatcher_type, args.moe_flex_dispatcher_backend) == ("flex", "ncclep")
    assert args.moe_expert_rank_capacity_factor == CAPACITY_FACTOR
    assert args.cuda_graph_impl == {"parts": "transformer_engine"}.get(graphs, "full_iteration")


@pytest.mark.parametrize(
    ("graphs", "flavor", "expected"),
    [
        ("none", "35b-a3b", ["none"]),
        ("full", "2b", ["full_iteration"]),
        ("parts", "2b", ["transformer_engine", "--cuda-graph-modules", "attn", "mlp"]),
        (
            *("parts", "35b-a3b"),
            ["transformer_engine", "--cuda-graph-modules", "attn", "moe_router", "moe_preprocess"],
        ),
    ],
)
def test_graph_flags(graphs: str, flavor: str, expected: list[str]) -> None:
    job = job_of(flavor, 8, 64)
    ep = 8 if job.model_config.is_moe else 1
    words = flags(predict(job, Candidate(ep=ep, graphs=graphs)))
    first = words.index("--cuda-graph-impl") + 1
    assert words[first : first + len(expected)] == expected


def test_an_existing_folder_is_refused_and_its_other_files_stay(tmp_path: Path) -> None:
    prediction, folder = predict(*PLANS[3]), tmp_path / "plan"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(PlanError, match="exists already"):
        emit(prediction, folder)
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
    emit(prediction, folder, overwrite=True)
    assert {file.name for file in folder.iterdir()} == {"notes.txt", *files(prediction, folder)}
    assert (folder / "notes.txt").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["plan"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot write the plan"):
        emit(predict(*PLANS[3]), tmp_path / "file" / "plan")
