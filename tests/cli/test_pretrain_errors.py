"""Bad input to the training script: one message, exit status 2, before any process group forms."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.data import tokenize
from qwen35_mcore.mcore import cpu_mode
from tests.helpers.pretrain_runs import script_server, small_dataset

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 300.0
"""Below gloo's time-out: a rank alone that waits for the others fails the test."""


def flags(*more: str) -> list[str]:
    """A run that would start if it had its other ranks."""
    return [
        *("--flavor", "tiny-moe", "--data-path", small_dataset(), "--split", "80,10,10"),
        *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "12"),
        *("--train-iters", "10", "--lr", "1e-3", "--num-workers", "0", "--eval-iters", "0"),
        *more,
    ]


def error_of(arguments: list[str], world_size: int = 1, **environment: str) -> str:
    """The one message of rank 0, from a job whose other ranks never come."""
    run = script_server().start(arguments, world_size, ranks=[0], **environment)
    assert run.wait(START_TIMEOUT_S) == [2], run.output()
    before, found, message = run.output().rpartition("error: ")
    assert found
    assert "error: " not in before
    assert "Traceback" not in before + message
    assert "usage:" not in before + message
    return message


TP, PP, EP = (f"--{name}-model-parallel-size" for name in ("tensor", "pipeline", "expert"))
CP, LAYOUT = "--context-parallel-size", "--pipeline-model-parallel-layout"
OVERRIDE = "--override"


@pytest.mark.parametrize(
    ("more", "world_size", "parts"),
    [
        (
            [TP, "2", OVERRIDE, "num_attention_heads=5", OVERRIDE, "num_key_value_heads=5"],
            2,
            ["tp 2, num_attention_heads 5", "allowed: tp 1, 5", "set tp to 1"],
        ),
        (
            [TP, "2", OVERRIDE, "vocab_size=513"],
            2,
            ["tp 2, vocab_size 513", "never padded", "set tp to 1"],
        ),
        ([EP, "3"], 3, ["ep 3, num_experts 8", "allowed: ep 1, 2, 4, 8"]),
        (
            [PP, "2", LAYOUT, "Ett|ttL"],
            2,
            ["Ett|ttL", "it has 0 m, the model has 1", "allowed: E, 4 t, 1 m, L"],
        ),
        ([PP, "2", LAYOUT, "Ettm|ttL"], 2, ["m (MTP) must be in the last virtual stage"]),
        (
            [PP, "2", LAYOUT, "Ett|ttt"],
            2,
            ["it has 5 t, the model has 4", "correct it, or take the string that"],
        ),
        ([PP, "2", LAYOUT, "Ett|xtmL"], 2, ["cannot be read from 'xtmL' on"]),
        ([PP, "2", LAYOUT, "Et|t|ttmL"], 2, ["it has 3 stages, pp 2 * vpp 1 need 2"]),
        (
            [CP, "2", "--seq-length", "66"],
            2,
            ["sequence length 66, cp 2", "allowed: a multiple of 4", "use a sequence length of"],
        ),
        (
            [TP, "2", PP, "2"],
            6,
            ["tp * pp * cp = 4, world size 6", "a world size that is a multiple of 4"],
        ),
        ([PP, "3"], 3, ["pp 3 * vpp 1, num_hidden_layers 4", "allowed: pp * vpp 1, 2, 4"]),
        (
            ["--global-batch-size", "3", "--micro-batch-size", "2"],
            1,
            ["global batch 3, micro batch 2, dp 1", "allowed: a multiple of 2"],
        ),
    ],
)
def test_layouts(more: list[str], world_size: int, parts: list[str]) -> None:
    message = error_of(flags(*more), world_size)
    assert message.startswith("the parallel layout cannot run this model")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--flavor", "tiny-mo"], ["got: tiny-mo", "did you mean tiny-moe or tiny-dense?"]),
        ([], ["a run needs exactly one model", "`qwen35 flavors`"]),
        (["--flavor", "tiny-moe"], ["flags are missing", "--micro-batch-size", "--lr"]),
        ([OVERRIDE, "num_expert=4"], ["got: num_expert=4", "KEY one of", "num_experts"]),
    ],
)
def test_model_choice(arguments: list[str], parts: list[str]) -> None:
    message = error_of(arguments if "--flavor" in arguments or not arguments else flags(*arguments))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--train-iter", "10"], ["got: --train-iter 10", "did you mean --train-iters"]),
        (["--micro-batch-size", "many"], ["--micro-batch-size: invalid int value: 'many'"]),
        (["--linear-attention-freq", "[1"], ["--linear-attention-freq: invalid value: '[1'"]),
        (["--cuda-graph-modules", "x"], ["--cuda-graph-modules: invalid value: 'x'", "--help"]),
        (
            ["--optimizer", "sgd", "--bf16", "--save", "x", "--save-interval", "1"],
            ["drop --bf16, or pass --optimizer adam --use-distributed-optimizer"],
        ),
        (
            ["--weight-decay-incr-style=linear", "--start-weight-decay=1", "--end-weight-decay=.1"],
            ["no schedule", "allowed: --end-weight-decay >= --start-weight-decay"],
        ),
        (["--gdn-kernel", "cuda"], ["'cuda' (choose from 'auto', 'fla', 'torch')"]),
        (["--hidden-size", "64"], ["--hidden-size contradicts", "got: 64", "allowed: 128"]),
        (["--fp16"], ["--fp16 is not supported", "bf16 or float32", "fix: pass --bf16"]),
        (["--use-precision-aware-optimizer"], ["needs --use-distributed-optimizer"]),
        (["--ckpt-format", "torch"], ["got: --ckpt-format torch", "allowed: torch_dist"]),
        # megatron acts on these two while it parses and checks its flags
        (["--enable-msc"], ["--enable-msc is not supported", "fix: drop the flag"]),
        (["--checkpoint-activations"], ["fix: pass --recompute-activations"]),
        (["--moe-router-topk-scaling-factor", "2.5"], ["contradicts the model", "got: 2.5"]),
        (["--min-lr", "1"], ["args.min_lr <= args.lr", "min_lr=1.0, lr=0.001"]),
        (["--recompute-granularity", "full"], ["recompute_method must be"]),
        (["--bf16", "--save", "x", "--save-interval", "1"], ["pass --use-distributed-optimizer"]),
        (["--save", "x"], ["--save-interval"]),
        (["--load-main-params-from-ckpt"], ["is not supported", "--float32-main-params"]),
        (["--float32-main-params"], ["is for bf16 runs", "pass --bf16"]),
        (["--float32-main-params", "--bf16"], ["needs megatron's distributed optimizer"]),
    ],
)
def test_flags(more: list[str], parts: list[str]) -> None:
    message = error_of(flags(*more))
    for part in parts:
        assert part in message


GRAPH = "--cuda-graph-impl"


@pytest.mark.skipif(not cpu_mode.is_needed(), reason="a GPU can do this")
@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (
            [GRAPH, "transformer_engine", "--cuda-graph-modules", "attn"],
            ["need a CUDA device", f"got: {GRAPH} transformer_engine\n", "fix: drop"],
        ),
        ([GRAPH, "full_iteration"], ["need a CUDA device", f"got: {GRAPH} full_iteration\n"]),
        (["--enable-cuda-graph"], ["need a CUDA device", "got: --enable-cuda-graph\n"]),
        (["--moe-experts", "te"], ["te experts cannot run here", "fix: drop --moe-experts"]),
        (["--bf16", "--moe-experts", "grouped_mm"], ["cannot run here", "bfloat16 on cpu"]),
        (["--fp8-format", "hybrid"], ["got: --fp8-format hybrid on the CPU", "pip install"]),
        # what only the model's layers find out
        (["--flavor", "tiny-dense", "--fp8-format", "hybrid"], ["need a GPU", "drop the flag"]),
        (["--gdn-kernel", "fla"], ["fix: run on a CUDA device, or pass --gdn-kernel torch\n"]),
    ],
)
def test_what_a_cpu_cannot_do_is_never_left_out(more: list[str], parts: list[str]) -> None:
    message = error_of(flags(*more))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"hidden_size": None}, "hidden_size"),
        ({"sliding_window_size": 4096}, "sliding_window_size"),
    ],
    ids=["another-model-type", "missing-key", "unknown-key"],
)
def test_hugging_face_configs(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    content = get_flavor("tiny-moe").to_hf() | change
    content = {key: value for key, value in content.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    arguments = flags()[2:]
    assert part in error_of(["--hf-config", str(tmp_path), *arguments])


def test_a_missing_dataset() -> None:
    prefix = small_dataset()
    message = error_of(flags("--data-path", f"{prefix}s"))
    assert f"no dataset at prefix '{prefix}s'" in message
    assert f"prefixes in {Path(prefix).parent}: {prefix}" in message


def test_a_missing_dataset_in_a_blend() -> None:
    prefix = small_dataset()
    message = error_of(flags("--data-path", "0.5", prefix, "0.5", f"{prefix}s"))
    assert f"no dataset at prefix '{prefix}s'" in message


def test_a_split_without_documents(tmp_path: Path) -> None:
    """Megatron would loop for ever over no documents."""
    text = tmp_path / "one.txt"
    text.write_text("one document " * 1000)
    data = tmp_path / "data"
    tokenize(inputs=[text], output_prefix=data, tokenizer="byte", workers=1, quiet=True)
    message = error_of(flags("--data-path", str(data), "--split", "98,1,1"))
    assert "--split 98,1,1 leaves no document for validation" in message
    assert re.search(f"got: 1 documents with .* tokens in {data}", message)


def test_a_tokenizer_larger_than_the_vocabulary() -> None:
    message = error_of(flags(OVERRIDE, "vocab_size=256"))
    assert "got: tokenizer 'byte' with 257 ids" in message
    assert "at most 256" in message
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size"]
    message = error_of(flags(*null, "600"))
    assert "the tokenizer is larger than the model's vocabulary" in message
    assert "with 600 ids" in message
    assert "256 in the data, 299 in training" in error_of(flags(*null, "300"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of one step of tiny-dense."""
    folder = tmp_path_factory.mktemp("checkpoint")
    script_server().run(
        flags(
            *("--flavor", "tiny-dense", "--train-iters", "1", "--global-batch-size", "1"),
            *("--use-distributed-optimizer", "--save", str(folder), "--save-interval", "1"),
        )
    )
    return folder


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Callable[[], Path]:
    return lambda: Path(shutil.copytree(checkpoint, tmp_path / "copy"))


DENSE = ["--flavor", "tiny-dense", "--use-distributed-optimizer"]


def test_a_checkpoint_of_another_model(checkpoint: Path) -> None:
    message = error_of(flags("--use-distributed-optimizer", "--load", str(checkpoint)))
    assert f"the checkpoint in {checkpoint / 'iter_0000001'} is of a different model" in message
    assert re.search(r"got: .*num_experts 0", message)
    assert re.search(r"allowed: .*num_experts 8", message)
    message = error_of(
        flags(*DENSE, OVERRIDE, "hidden_size=64", "--pretrained-checkpoint", str(checkpoint))
    )
    assert "got: hidden_size 128\n  allowed: hidden_size 64" in message


def test_a_checkpoint_of_the_other_optimizer(checkpoint: Path) -> None:
    message = error_of(flags("--flavor", "tiny-dense", "--load", str(checkpoint)))
    assert "pass --use-distributed-optimizer, or pass --no-load-optim" in message


def test_a_checkpoint_without_optimizer(checkpoint: Path, tmp_path: Path) -> None:
    another_step = [*DENSE, "--global-batch-size", "1", "--exit-interval", "1"]
    saved = ["--save", str(tmp_path), "--save-interval", "1", "--no-save-optim"]
    more = ["--load", str(checkpoint), "--override-opt-param-scheduler"]
    script_server().run(flags(*another_step, *saved, *more))
    message = error_of(flags(*another_step, "--load", str(tmp_path)))
    assert "pass --no-load-optim to go on with fresh moments" in message
    script_server().run(flags(*another_step, "--load", str(tmp_path), "--no-load-optim"))


def test_nothing_to_load(tmp_path: Path) -> None:
    message = error_of(flags("--load", str(tmp_path)))
    assert f"got: {tmp_path} (no tracker file latest_checkpointed_iteration.txt)" in message
    assert "drop --load to start from random weights" in message
    missing = tmp_path / "missing"
    assert f"{missing} (does not exist)" in error_of(flags("--load", str(missing)))
    message = error_of(flags("--pretrained-checkpoint", str(missing)))
    assert "--pretrained-checkpoint names a folder without a checkpoint" in message


def test_checkpoints_without_a_tracker(copied: Callable[[], Path]) -> None:
    """Starting from scratch in a folder with checkpoints would bury them."""
    folder = copied()
    (folder / "latest_checkpointed_iteration.txt").unlink()
    resume = ["--load", str(folder), "--save", str(folder), "--save-interval", "1"]
    message = error_of(flags(*DENSE, *resume))
    assert "does not say which checkpoint" in message
    assert "iter_0000001" in message
    (folder / "latest_checkpointed_iteration.txt").write_text("")
    assert "latest_checkpointed_iteration.txt: unreadable" in error_of(flags(*DENSE, *resume))


def test_an_incomplete_checkpoint(copied: Callable[[], Path]) -> None:
    folder = copied() / "iter_0000001"
    data = max(folder.glob("*.distcp"), key=lambda f: f.stat().st_size)
    data.write_bytes(data.read_bytes()[:-100])
    message = error_of(flags(*DENSE, "--load", str(folder.parent)))
    assert re.search(rf"got: {data} has \d+ of \d+ bytes", message)
    (folder / "metadata.json").unlink()
    message = error_of(flags(*DENSE, "--load", str(folder.parent)))
    assert f"{folder / 'metadata.json'} is missing" in message
    message = error_of(flags(*DENSE, "--load", str(folder.parent), "--ckpt-step", "7"))
    assert "iter_0000007/.metadata is missing" in message


def test_another_schedule_than_the_checkpoints(checkpoint: Path) -> None:
    run = script_server().start(flags(*DENSE, "--load", str(checkpoint)))
    assert run.wait() == [2]
    assert "pass --override-opt-param-scheduler to go on with the flags" in run.output()


def test_other_ranks_are_silent() -> None:
    run = script_server().start(["--flavor", "tiny-mo"], 2, ranks=[1])
    assert run.wait(START_TIMEOUT_S) == [2]
    assert run.output() == ""


def test_under_torchrun() -> None:
    """One message for two ranks, and it is the end of torchrun's own report."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2"]
    script = [str(ROOT / "examples" / "pretrain_qwen35.py"), *flags(EP, "3")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *script], env=environment, capture_output=True, text=True, timeout=600
    )
    output = done.stdout + done.stderr
    assert len(re.findall(r"^error: ", output, re.MULTILINE)) == 1
    assert "ep 3, num_experts 8" in output
    assert re.search(r"exitcode +: 2 ", output)
    *_, last, line = output.strip().splitlines()
    assert set(line) == {"="}
    assert last.strip().startswith("fix: ")
    assert output.count("Traceback") == 1  # torchrun's


def test_a_warmup_that_never_ends() -> None:
    message = error_of(flags("--lr-warmup-iters", "10"))
    assert "--lr-warmup-iters 10 of 10" in message
    assert "allowed: less than 10" in message


@pytest.mark.parametrize("level", ["", "info", "1.5"])
def test_a_log_level_that_is_no_number(level: str) -> None:
    message = error_of(flags(), MEGATRON_LOGGING_LEVEL=level)
    assert message.startswith("the variable MEGATRON_LOGGING_LEVEL is a number")
    assert "20 (info)" in message


def test_help_is_printed_although_one_of_megatrons_texts_is_malformed() -> None:
    run = script_server().start(["--help"], 1, ranks=[0])
    assert run.wait(START_TIMEOUT_S) == [0], run.output()
    assert "--gdn-kernel" in run.output()
