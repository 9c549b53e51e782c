"""The folder of compiled kernels, and the cut run that fills it."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.process.kernel_cache import FOLDERS, VARIABLE, use_shared_folder
from qwen35_mcore.training.arguments import choose_model, read_flags
from qwen35_mcore.training.warm import cut_run, read_words
from tests.helpers.ckpt_cli import qwen35, refused
from tests.helpers.pretrain_runs import script_server
from tests.helpers.run_results import printed_losses

PRESETS = Path(__file__).parents[2] / "launch" / "presets"


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (VARIABLE, *FOLDERS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_one_folder_for_all(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the user set stays."""
    clean.setenv(VARIABLE, str(tmp_path))
    clean.setenv("TRITON_CACHE_DIR", "mine")
    use_shared_folder()
    found = {name: os.environ[name] for name in FOLDERS}
    others = {name: str(tmp_path / folder) for name, folder in FOLDERS.items()}
    assert found == others | {"TRITON_CACHE_DIR": "mine"}


def test_a_folder_that_cannot_be_made(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    clean.setenv(VARIABLE, str(tmp_path / "file" / "folder"))
    with pytest.raises(ConfigError, match=rf"{VARIABLE} names cannot be made"):
        use_shared_folder()
    assert not FOLDERS.keys() & os.environ.keys()


@pytest.mark.exhaustive
def test_the_launcher_reports_such_a_folder_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qwen35_mcore.training.launch", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "qwen35_mcore.training.pretrain"]
    (tmp_path / "file").touch()
    changed = {VARIABLE: str(tmp_path / "file" / "folder"), "PYTHONPATH": str(PRESETS.parents[1])}
    done = subprocess.run(command, env=os.environ | changed, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the folder that {VARIABLE} names cannot be made")
    assert len(done.stderr.splitlines()) == 3


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_folder_nothing_is_set(clean: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        clean.setenv(VARIABLE, value)
    use_shared_folder()
    assert not FOLDERS.keys() & os.environ.keys()


@pytest.mark.parametrize(
    ("preset", "gpus", "ranks", "experts"),
    [
        ("35b-a3b-16xh100", 8, 8, 32),  # 32 of 256 experts on a GPU
        ("35b-a3b-16xh100", 2, 2, 32),
        ("35b-a3b-16xh100", 1, 1, 32),
        ("122b-a10b-128xh100", 8, 8, 32),
        ("397b-a17b-512xh100", 8, 8, 64),
    ],
)
def test_a_preset_is_cut_to_one_node(preset: str, gpus: int, ranks: int, experts: int) -> None:
    """A rank has the local experts of the plan; every flag is one that training takes."""
    words = read_words(PRESETS / preset, [])
    size = {"35b": "35b-a3b", "122": "122b-a10b", "397": "397b-a17b"}[preset[:3]]
    model_config = get_flavor(size)
    found, flags = cut_run(words, model_config, gpus)
    overrides = [v for word, v in itertools.pairwise(flags) if word == "--override"]
    args = read_flags(flags, choose_model(size, None, overrides), on_cpu=False)
    plan = read_flags(words, model_config, on_cpu=False)
    assert found == ranks
    assert args.num_layers == 4
    assert args.pipeline_model_parallel_size == 1
    assert args.pipeline_model_parallel_layout is None
    assert args.num_experts // args.expert_model_parallel_size == experts
    assert model_config.num_experts // plan.expert_model_parallel_size == experts
    for name in ("seq_length", "micro_batch_size", "recompute_granularity", "bf16", "fp8"):
        assert getattr(args, name) == getattr(plan, name), name


def test_what_a_run_keeps_or_reads_is_left_out() -> None:
    words = ["--flavor", "tiny-dense", "--data-path", "0.3", "a", "0.7", "b", "--save=x", "--bf16"]
    _, flags = cut_run([*words, "--lr", "3e-4"], get_flavor("tiny-dense"), 1)
    assert not {"--data-path", "a", "0.3", "--save=x"} & set(flags)
    assert "--bf16" in flags
    assert "--mock-data" in flags


@pytest.mark.parametrize(("gpus", "dispatcher"), [(2, "flex"), (1, "auto")])
def test_one_rank_exchanges_no_rows(gpus: int, dispatcher: str) -> None:
    words = shlex.split("""
        --flavor tiny-moe --expert-model-parallel-size 2 --seq-length 64 --micro-batch-size 1
        --bf16 --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep
        --moe-expert-rank-capacity-factor 2 --vision --freeze vision merger --image-data folder
    """)
    model_config = get_flavor("tiny-moe")
    ranks, flags = cut_run(words, model_config, gpus)
    args = read_flags(flags, model_config, on_cpu=False)
    assert (ranks, args.moe_token_dispatcher_type) == (gpus, dispatcher)
    assert (args.qwen35_vision, args.image_data) == (False, None)


def test_every_flag_of_a_run_may_be_given() -> None:
    """What needs --save, event files, another schedule or more stages goes with it."""
    run = shlex.split("""
        --flavor tiny-moe --decoder hybrid --hybrid-layer-pattern 'GEGEG|E*E/*E'
        --pipeline-model-parallel-size 2 --seq-length 64 --micro-batch-size 1 --bf16
        --use-distributed-optimizer --optimizer muon --train-data-path a --valid-data-path b
        --train-samples 100 --lr-decay-style WSD --lr-wsd-decay-samples 10 --lr 1e-3
        --save x --save-interval 2 --save-retain-interval 4 --async-save --log-progress
        --tensorboard-dir x --log-timers-to-tensorboard --load x --no-load-optim --finetune
        --override-ckpt-iteration 2 --step-batch-size-schedule 0:2 --null-tokenizer-eod-id 3
        --persistent-save-interval 2 --microbatch-group-size-per-virtual-pipeline-stage 2
    """)
    model_config = get_flavor("tiny-moe")
    _, flags = cut_run(run, model_config, 1)
    args = read_flags(flags, model_config, on_cpu=True)
    assert (args.optimizer, args.decoder, args.bf16) == ("muon", "hybrid", True)
    assert (args.save, args.load, args.tensorboard_dir) == (None, None, None)
    assert (args.train_iters, args.train_samples, args.lr_decay_style) == (6, None, "constant")


def test_a_layout_that_an_editor_on_windows_saved(tmp_path: Path) -> None:
    (tmp_path / "layout.args").write_bytes(b"\xef\xbb\xbf--bf16\r\n# a\r\n--lr 1\r\n")
    assert read_words(tmp_path, []) == ["--bf16", "--lr", "1"]


@pytest.mark.exhaustive
def test_the_cut_run_trains() -> None:
    """Here on a CPU: six steps on random tokens."""
    words = ["--flavor", "tiny-moe", "--expert-model-parallel-size", "4", "--lr", "3e-4"]
    words += ["--seq-length", "64", "--micro-batch-size", "1", "--num-workers", "0"]
    words += ["--pipeline-model-parallel-size", "2"]
    ranks, flags = cut_run(words, get_flavor("tiny-moe"), 2)
    run = script_server().run([*flags, "--log-interval", "1"], ranks)
    assert set(printed_losses(run.output())) == {1, 2, 3, 4, 5, 6}


def test_too_few_gpus() -> None:
    words = ["--tensor-model-parallel-size", "4", "--context-parallel-size=2"]
    with pytest.raises(ConfigError, match="8 or more"):
        cut_run(words, get_flavor("tiny-moe"), 4)


def test_refusals(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preset = PRESETS / "35b-a3b-16xh100"
    refused(qwen35("warm", preset), f"{VARIABLE} is not set", "qwen35 warm")
    clean.setenv(VARIABLE, str(tmp_path))
    refused(qwen35("warm", tmp_path), "has no layout.args", "qwen35 plan")
    refused(qwen35("warm", preset, "--seq-length", "8192"), "this machine has none")
