"""What may change where a run goes on: it works, with the right numbers, or is refused at the start
with advice that works."""

from __future__ import annotations

import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35_mcore.errors import CheckpointError
from qwen35_mcore.mcore import cpu_mode
from qwen35_mcore.training.checks.checkpoint import Start
from qwen35_mcore.training.checks.random_states import check_device_of_states
from qwen35_mcore.training.checks.resume import CHANGES
from tests.helpers.kinds import kinds
from tests.helpers.pretrain_runs import Run, script_server, small_dataset
from tests.helpers.run_results import (
    checkpoint_common,
    checkpoint_tensors,
    logged_scalars,
)

DISTRIBUTED = "--use-distributed-optimizer"
OVERRIDE, CHECKPOINTS = (
    f"--{which}-opt-param-scheduler" for which in ("override", "use-checkpoint")
)
BATCH = 2


def flags(*more: str) -> list[str]:
    return [
        *("--flavor", "tiny-dense", "--data-path", small_dataset(), "--split", "80,10,10"),
        *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", str(BATCH)),
        *("--lr", "1e-3", "--eval-iters", "0", "--log-interval", "1", "--num-workers", "0"),
        *("--save-interval", "2"),
        *more,
    ]


def run(folder: Path, *more: str) -> Run:
    return script_server().run(flags(*in_folder(folder), *more))


def error_of(folder: Path, *more: str) -> str:
    failed = script_server().start(flags(*in_folder(folder), *more))
    assert failed.wait() == [2], failed.output()
    assert "Traceback" not in failed.output()
    assert "initializing torch distributed" not in failed.output()
    return failed.output().rpartition("\nerror: ")[2]


def in_folder(folder: Path) -> list[str]:
    return ["--save", str(folder), "--load", str(folder), "--tensorboard-dir", str(folder / "log")]


def rates(folder: Path) -> dict[int, float]:
    logged = logged_scalars(folder / "log")["learning-rate"]
    return {step: values[-1] for step, values in logged.items()}


def losses(folder: Path) -> dict[int, float]:
    return {step: values[-1] for step, values in logged_scalars(folder / "log")["lm loss"].items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps at a constant rate, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("straight")
    run(folder, DISTRIBUTED, "--train-iters", "4", "--lr-decay-style", "constant")
    return folder


@pytest.fixture
def half(straight: Path, tmp_path: Path) -> Path:
    """A run of two steps at a constant rate."""
    folder = tmp_path / "half"
    shutil.copytree(straight / "iter_0000002", folder / "iter_0000002")
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


CONSTANT = (DISTRIBUTED, "--lr-decay-style", "constant")


def test_longer_at_a_constant_rate_needs_no_flag(straight: Path, tmp_path: Path) -> None:
    """Losses are those of a run that was as long from the beginning; its warm-up is over, too."""
    more = [*CONSTANT, "--lr-warmup-iters", "1"]
    run(tmp_path, *more, "--train-iters", "2")
    longer = run(tmp_path, *more, "--train-iters", "4", "--min-lr", "1e-5")
    assert "nothing to train" not in longer.output()
    whole = tmp_path / "whole"
    run(whole, *more, "--train-iters", "4")
    assert losses(tmp_path) == losses(whole)
    assert rates(tmp_path)[4] == pytest.approx(1e-3)


def test_another_mean_of_the_loss_is_said(half: Path) -> None:
    output = run(half, *CONSTANT, "--train-iters", "3", "--loss-per-microbatch").output()
    assert "> loss: --calculate-per-token-loss False (the checkpoint's: True)" in output


def test_another_learning_rate(half: Path) -> None:
    """Refused without a word about which counts; each way that the error offers works."""
    other = [*CONSTANT, "--train-iters", "4", "--lr", "5e-4"]
    message = error_of(half, *other)
    assert "max_lr 0.0005 (the checkpoint's: 0.001)" in message
    assert f"{OVERRIDE} to go on with the flags' schedule (learning rate 0.0005" in message
    assert f"{CHECKPOINTS} to go on with the checkpoint's (learning rate 0.001" in message
    kept = half.with_name("kept")
    shutil.copytree(half, kept)
    run(half, *other, OVERRIDE)
    assert [rates(half)[step] for step in (3, 4)] == pytest.approx([5e-4, 5e-4])
    run(kept, *other, CHECKPOINTS)
    assert [rates(kept)[step] for step in (3, 4)] == pytest.approx([1e-3, 1e-3])
    assert "drop one of them" in error_of(half, *other, OVERRIDE, CHECKPOINTS)
    again = run(half, *CONSTANT, "--train-iters", "6", "--lr", "5e-4")  # and stays what it is
    assert "iteration        6/" in again.output()


def test_hyperparameters_of_adam_are_those_of_the_flags(half: Path) -> None:
    run(half, *CONSTANT, "--train-iters", "4", "--adam-beta2", "0.9", "--adam-eps", "1e-6")
    (group, *_) = checkpoint_common(half / "iter_0000004")["optimizer"]["optimizer"]["param_groups"]
    assert group["betas"] == (0.9, 0.9)
    assert group["eps"] == 1e-6
    assert group["step"] == 4


def test_rates_of_the_embedding_alone(half: Path) -> None:
    """Another number of parameter groups than in the checkpoint."""
    run(half, *CONSTANT, "--train-iters", "4", "--decoupled-lr", "1e-4")
    groups = checkpoint_common(half / "iter_0000004")["optimizer"]["optimizer"]["param_groups"]
    assert {group["lr"] for group in groups} == {1e-3, 1e-4}
    assert {group["step"] for group in groups} == {4}


def test_precision(half: Path, straight: Path) -> None:
    """To bfloat16 and back without a step: main parameters and moments stay as they are."""
    before = checkpoint_tensors(half / "iter_0000002")
    folders = [half, half.with_name("bf16"), half.with_name("back")]
    for source, target, precision in zip(folders, folders[1:], (["--bf16"], []), strict=False):
        there = ["--load", str(source), "--save", str(target), "--save-interval", "1000"]
        done = script_server().run(flags(*CONSTANT, *there, *precision, "--train-iters", "2"))
        assert "> precision: --bf16" in done.output()
    after = checkpoint_tensors(folders[2] / "iter_0000002")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_optimizer(half: Path) -> None:
    """The schedule goes on where it was, with fresh moments."""
    more = [*CONSTANT[1:], "--train-iters", "4"]
    message = error_of(half, *CONSTANT, "--train-iters", "4", "--optimizer", "sgd")
    assert "fix: drop --use-distributed-optimizer, or pass --optimizer adam" in message
    message = error_of(half, *more, "--optimizer", "sgd")
    assert "--optimizer sgd (the checkpoint's: adam)" in message
    assert "pass --no-load-optim" in message
    warm = ["--lr-warmup-iters", "3"]
    run(half, *more, *warm, "--optimizer", "sgd", "--no-load-optim")
    assert rates(half) == {3: pytest.approx(1e-3), 4: pytest.approx(1e-3)}


def test_sgd_resumes_exactly(tmp_path: Path) -> None:
    more = ["--optimizer", "sgd", "--train-iters", "4"]
    run(tmp_path, *more, "--exit-interval", "2")
    run(tmp_path, *more)
    whole = tmp_path / "whole"
    run(whole, *more)
    assert losses(tmp_path) == losses(whole)
    a, b = (checkpoint_tensors(f / "iter_0000004") for f in (tmp_path, whole))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(key.startswith("optimizer.state.momentum_buffer") for key in a)
    message = error_of(tmp_path, *more[:2], "--train-iters", "6", "--sgd-momentum", "0", OVERRIDE)
    assert "holds a momentum" in message


def test_the_sharding_of_the_optimizer(half: Path, tmp_path: Path) -> None:
    message = error_of(half, *CONSTANT[1:], "--train-iters", "4")
    assert "pass --use-distributed-optimizer, or pass --no-load-optim" in message
    run(half, *CONSTANT[1:], "--train-iters", "4", "--no-load-optim")
    message = error_of(half, *CONSTANT[1:], "--train-iters", "6", DISTRIBUTED)
    assert "fix: drop --use-distributed-optimizer, or pass --no-load-optim" in message
    message = error_of(half, *CONSTANT[1:], "--train-iters", "6", DISTRIBUTED, "--bf16")
    assert "fix: pass --no-load-optim" in message  # a bf16 run cannot drop the other
    message = error_of(half, *CONSTANT[1:], "--train-iters", "6", "--decoupled-lr", "1e-4")
    assert "--decoupled-lr cannot be added or dropped" in message
    assert "drop --decoupled-lr" in message


@pytest.mark.parametrize(
    "more",
    kinds(
        [[], [DISTRIBUTED, "--bf16"]], ["plain"], lambda more: "distributed" if more else "plain"
    ),
)
def test_muon_resumes_exactly(tmp_path: Path, more: list[str]) -> None:
    muon = ["--optimizer", "muon", "--train-iters", "4", *more]
    run(tmp_path, *muon, "--exit-interval", "2")
    run(tmp_path, *muon)
    whole = tmp_path / "whole"
    run(whole, *muon)
    assert losses(tmp_path) == losses(whole)


def test_batch_and_length_in_samples(tmp_path: Path) -> None:
    """The steps that are left follow from the samples that are left, at the batch of this run."""
    samples = ["--train-samples", "16", DISTRIBUTED]
    run(tmp_path, *samples, "--exit-interval", "4")
    larger = run(tmp_path, *samples, "--global-batch-size", "4")
    assert "--global-batch-size 4 (the checkpoint's: 2): the run goes on" in larger.output()
    assert re.search(r"iteration +6/ +6 \| consumed samples: +16 ", larger.output())
    assert rates(tmp_path)[6] == 0.0
    done = run(tmp_path, *samples, "--global-batch-size", "4")
    assert "nothing to train" in done.output()
    assert "the run ends at --train-samples 16" in done.output()
    iterations = [DISTRIBUTED, "--train-iters", "8"]
    message = error_of(tmp_path, *iterations, "--lr-decay-style", "constant")
    assert "lr_decay_style constant (the checkpoint's: linear)" in message
    message = error_of(tmp_path, *iterations, OVERRIDE, "--override-ckpt-iteration", "2")
    assert "fix: pass --global-batch-size 4, or drop --override-ckpt-iteration" in message
    run(tmp_path, *iterations, "--lr-decay-style", "constant", OVERRIDE)
    assert rates(tmp_path)[8] == pytest.approx(1e-3)


def test_data_and_order(half: Path) -> None:
    """Another seed, length of sequences, split and evaluation: said, and trained."""
    changed = ["--seed", "5", "--seq-length", "32", "--split", "90,5,5", "--eval-interval", "3"]
    changed += ["--mtp-loss-scaling-factor", "0.3", "--eod-mask-loss"]
    done = run(half, *CONSTANT, "--train-iters", "4", *changed)
    for part in (
        "--mtp-loss-scaling-factor 0.3 (the checkpoint's: 0.1): from here on the run minimises",
        "--eod-mask-loss True (the checkpoint's: False): from here on other tokens count",
    ):
        assert part in done.output()
    said = re.search(r"> data: (.*)", done.output())
    assert said is not None
    for part in ("--seed 5 (the checkpoint's: 1234)", "--seq-length 32", "--split 90,5,5"):
        assert part in said[1]
    assert "iteration        4/" in done.output()


def test_random_states(half: Path) -> None:
    added = ["--train-iters", "4", "--data-parallel-random-init"]
    assert "fix: drop --data-parallel-random-init" in error_of(half, *CONSTANT, *added)


class GeneratorOfAGPU:
    """In a file it is a generator, which only a machine with a GPU can read."""

    def __reduce__(self) -> Any:
        return torch.Generator, (torch.device("cuda"),)


def states_of_a_gpu(script: Any, tracked: Any = None) -> None:
    """The run saves 16 bytes for each random state, as a GPU has them: seed and offset."""
    from megatron.training import checkpointing

    generate = checkpointing.generate_state_dict
    state = torch.zeros(16, dtype=torch.uint8)

    def generate_state_dict(*args: Any, **kwargs: Any) -> Any:
        saved = generate(*args, **kwargs)
        for states in saved["rng_state"].data:
            trackers = dict.fromkeys(states["rng_tracker_states"], tracked or state)
            states |= {"cuda_rng_state": state, "rng_tracker_states": trackers}
        return saved

    checkpointing.generate_state_dict = generate_state_dict


def generators_of_a_gpu(script: Any) -> None:
    states_of_a_gpu(script, GeneratorOfAGPU())


@pytest.mark.parametrize(
    ("before", "what"),
    [
        (states_of_a_gpu, "holds the random states of a GPU, and this run is on a CPU"),
        pytest.param(
            generators_of_a_gpu,
            "the random states of the checkpoint cannot be read",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_checkpoint_of_a_gpu(
    straight: Path, tmp_path: Path, before: Callable[[Any], None], what: str
) -> None:
    """Refused before the model is built; as the error says, all but random states goes on."""
    half = flags(*in_folder(tmp_path), *CONSTANT, "--train-iters", "2")
    assert script_server().start(half, before=before).wait() == [0]
    message = error_of(tmp_path, *CONSTANT, "--train-iters", "4")
    assert what in message
    assert "fix: pass --no-load-rng to start from the states of --seed" in message
    run(tmp_path, *CONSTANT, "--train-iters", "4", "--no-load-rng")
    assert losses(tmp_path) == losses(straight)


def test_a_checkpoint_of_a_cpu_on_a_gpu(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run does not load is not asked for: with the flag, and at another layout."""
    folder = straight / "iter_0000002"
    start = Start(folder, checkpoint_common(folder), 2, loads_optimizer=True)
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    args = Namespace(no_load_rng=False, **layout)
    check_device_of_states(args, start)
    monkeypatch.setattr(cpu_mode, "is_needed", lambda: False)
    with pytest.raises(
        CheckpointError, match=r"states of a CPU, and this run is on a GPU"
    ) as found:
        check_device_of_states(args, start)
    assert "pass --no-load-rng" in str(found.value)
    for other in ({"no_load_rng": True}, {"tensor_model_parallel_size": 2}):
        check_device_of_states(Namespace(**vars(args) | other), start)


def test_every_flag_of_the_table_is_in_a_checkpoint(straight: Path) -> None:
    saved = checkpoint_common(straight / "iter_0000004")["args"]
    names = [flag for change in CHANGES for flag in change.flags]
    assert [name for name in names if not hasattr(saved, name)] == []
    assert len(names) == len(set(names))
