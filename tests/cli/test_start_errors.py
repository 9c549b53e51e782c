"""What megatron or torch raise: one error until training is under way, a traceback afterwards."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35_mcore.mcore.checkpoint_files import damage
from qwen35_mcore.training import launch
from tests.cli.test_pretrain_errors import ROOT, flags
from tests.helpers.pretrain_runs import script_server

TINY = ["--flavor", "tiny-dense", "--global-batch-size", "1", "--micro-batch-size", "1"]


def no_model(script: Any) -> None:
    def provider(*args: Any, **kwargs: Any) -> Any:
        return {}["layer_of_nobody"]

    script.make_model_provider = lambda model, args: provider


def no_datasets(script: Any) -> None:
    from megatron.training import get_args

    def datasets(*args: Any) -> Any:
        args = get_args()
        assert args.seq_length % 7 == 0, "sequences are odd"

    datasets.is_distributed = True  # type: ignore[attr-defined]
    script.datasets = datasets


def failing(step: int, error: Exception) -> Callable[[Any], None]:
    def plant(script: Any) -> None:
        forward_step, calls = script.forward_step, iter(range(1, 100))

        def fail(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == step:
                raise error
            return forward_step(*args, **kwargs)

        script.forward_step = fail

    return plant


def first_step(script: Any) -> None:
    failing(1, NotImplementedError("no kernel for seq_length"))(script)


def third_step(script: Any) -> None:
    failing(3, ValueError("a bug"))(script)


def memory_of_second_step(script: Any) -> None:
    failing(2, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB"))(script)


def no_room(script: Any) -> None:
    """No file of a checkpoint fits; the log does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))


def saving(folder: Path) -> list[str]:
    return ["--save", str(folder), "--save-interval", "100"]


def output_of(before: Callable[[Any], None], *more: str, **env: str) -> str:
    run = script_server().start(flags(*TINY, *more), before=before, **env)
    assert run.wait() == [1], run.output()
    return run.output()


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (no_model, ["building the model failed: KeyError: 'layer_of_nobody'", "--seq-length 64"]),
        (
            no_datasets,
            ["building the datasets failed: AssertionError: sequences are odd", "seq_length=64"],
        ),
        (first_step, ["the first step failed: NotImplementedError: no kernel", "seq_length=64"]),
    ],
)
def test_before_training_is_under_way(
    fault: Callable[[Any], None], parts: list[str], tmp_path: Path
) -> None:
    """One error that names the phase, the words and the flags; its traceback is in a file."""
    output = output_of(fault, *saving(tmp_path))
    _, _, message = output.rpartition("error: ")
    assert "Traceback" not in output
    for part in parts:
        assert part in message
    assert message.splitlines()[-1].startswith("  fix: ")
    (file,) = tmp_path.glob("traceback-*")
    assert str(file) in message
    assert "Traceback (most recent call last)" in file.read_text()
    assert fault.__name__ == "first_step" or "test_start_errors.py" in file.read_text()


def test_the_traceback_can_be_printed(tmp_path: Path) -> None:
    output = output_of(no_model, *saving(tmp_path), QWEN35_TRACEBACK="1")
    before, _, _ = output.rpartition("error: ")
    assert re.search(r"KeyError: 'layer_of_nobody'", before)


def test_a_bug_later_keeps_its_traceback() -> None:
    output = output_of(third_step)
    assert "ValueError: a bug" in output
    assert "Traceback" in output
    assert "error: " not in output


def test_out_of_memory_gets_advice_at_any_step(tmp_path: Path) -> None:
    output = output_of(memory_of_second_step, *saving(tmp_path))
    _, _, message = output.rpartition("error: ")
    assert message.startswith("out of memory on rank 0: iteration 2: CUDA out of memory. Tried")
    assert "micro_batch_size=1" in message
    assert "--recompute-granularity full" in message
    assert "Traceback" not in output


def test_a_full_disk_gets_advice(tmp_path: Path) -> None:
    """What was complete before stays, and is what the error names."""
    every_step = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "1"]
    script_server().run(flags(*TINY, *every_step, "--exit-interval", "1"))
    output = output_of(no_room, *every_step)
    _, _, message = output.rpartition("error: ")
    assert message.startswith("the checkpoint of iteration 2 could not be saved")
    assert re.search(rf"got: --save {tmp_path}, where \d+\.\d+ GB are free", message)
    assert "complete in it is iter_0000001" in message
    assert "Traceback" not in output
    script_server().run(flags(*TINY, *every_step, "--exit-interval", "2"))
    assert damage(tmp_path / "iter_0000002") is None


REPORTS = """
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.training.job_errors import reported_once
with reported_once():
    raise ConfigError("a flag is wrong", fix="drop it")
"""
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
WAITS = """
import os, time
if os.environ["RANK"] == "1":
    print("ready", flush=True)
time.sleep(600)
"""


def launched(folder: Path, text: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(text)
    command = [
        sys.executable,
        "-m",
        "qwen35_mcore.training.launch",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.Popen(
        [*command, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell's background job, and so a test run in one, starts with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_the_launcher_hears_ctrl_c_while_it_imports() -> None:
    """So it imports nothing that takes a while before it listens."""
    code = "import sys, qwen35_mcore.training.launch; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_the_launcher_adds_nothing_to_an_error(tmp_path: Path) -> None:
    process = launched(tmp_path, REPORTS)
    assert process.communicate()[0] == "error: a flag is wrong\n  fix: drop it\n"
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("processes", "part"),
    [("many", "Unsupported nproc_per_node value: many"), ("0", "self.local_world_size > 0")],
)
def test_what_the_launcher_fails_at_is_one_error(
    processes: str, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--standalone", "--nproc-per-node", processes, "script.py"]
    monkeypatch.setattr(sys, "argv", ["launch", *flags])
    with pytest.raises(SystemExit) as left:
        launch.main()
    assert left.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: torchrun failed: ")
    assert part in message
    assert f"got: --standalone --nproc-per-node {processes}" in message
    assert "Traceback" not in message


def test_the_launcher_names_a_rank_that_was_killed(tmp_path: Path) -> None:
    process = launched(tmp_path, DIES)
    output = process.communicate()[0]
    assert re.match(r"error: rank [01] was killed by SIGKILL", output)
    assert output.count("\n") == 2
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_signals_are_one_line(tmp_path: Path, number: int, word: str) -> None:
    process = launched(tmp_path, WAITS)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output = process.communicate()[0].splitlines()
    assert [line for line in output if "Traceback" not in line][-1] == word
    assert process.returncode == 128 + number
