"""The whole way on a CPU: tokenize, train, stop, resume, draw the loss curve.

    python examples/demo.py          (or `make demo`, which installs first)

Runs the numbered scripts of this folder on tiny-moe and shows their losses as they come; everything
they print is in demo.log. It starts afresh each time: what an earlier demo wrote to its own folder
is removed.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qwen35_mcore.config.counts import count_parameters
from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.data.sidecar import read_sidecar

HERE = Path(__file__).resolve().parent
WRITTEN = (
    *("data", "checkpoints", "tensorboard", "demo.log", "loss.png"),
    *("model", "exported"),  # of demo_vision.py
)
ITERATION = re.compile(
    r"iteration +(\d+)/ *\d+ \|.*elapsed time per iteration \(ms\): ([\d.]+) \|"
    r".*\blm loss: (\S+) \|(?:.*mtp_1 loss: (\S+) \|)?"
)
LOADED = re.compile(r"successfully loaded checkpoint .*at iteration (\d+)")
VALIDATION = re.compile(
    r"validation loss at iteration \d+ on validation set \| lm loss value: (\S+)"
)
CAUSE = re.compile(r"(?:\[rank\d+\]: ?)?((?:[\w.]+(?:Error|Exception)|error): .+)")

GPU_COMMANDS = """\
qwen35 data tokenize corpus/ --tokenizer Qwen/Qwen3.5-35B-A3B \\
    --output-prefix data/corpus --workers 16
torchrun --nproc-per-node 8 examples/pretrain_qwen35.py \\
    --flavor 35b-a3b --expert-model-parallel-size 8 --bf16 \\
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \\
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \\
    --data-path data/corpus --split 98,1,1 \\
    --seq-length 4096 --micro-batch-size 1 --global-batch-size 256 --train-iters 10000 \\
    --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 200 --weight-decay 0.1 \\
    --save runs/35b/checkpoints --load runs/35b/checkpoints --save-interval 500 \\
    --tensorboard-dir runs/35b/tensorboard"""

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """A step that did not do what it should; the message says what to look at."""


def main() -> int:
    args = parse_arguments()
    started = time.monotonic()
    try:
        prepare(args.output)
        tokenize(args.output)
        stop_at = args.stop_at or max(1, args.iters * 5 // 8)
        loss = train_twice(args.output, args.iters, stop_at, args.decoder)
        draw_curve(args.output)
    except DemoError as error:
        console.print(f"[bold red]error:[/] {error}")
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the next demo starts afresh")
        return 130
    report(args.output, loss, time.monotonic() - started)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write to")
    parser.add_argument("--iters", type=int, default=160, help="iterations in all, at least 2")
    parser.add_argument("--decoder", choices=("gpt", "hybrid"), default="gpt", help="see README.md")
    parser.add_argument("--stop-at", type=int, help="iteration to stop at; default: 5/8 of --iters")
    args = parser.parse_args()
    if args.iters < 2 or not 0 < (args.stop_at or 1) < args.iters:
        parser.error("--iters must be at least 2, and --stop-at between 1 and --iters - 1")
    args.output = args.output.resolve()
    return args


def prepare(output: Path) -> None:
    """An empty folder to work in; only what a demo wrote is removed."""
    if output.exists() and any(output.iterdir()) and not (output / "demo.log").exists():
        raise DemoError(
            f"{output} holds files that no demo wrote; name another folder with --output"
        )
    for name in WRITTEN:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)


def tokenize(output: Path) -> None:
    headline("1", "tokenize the source files of Python's standard library")
    seconds = run_script(output, "01_data.sh", "--quiet")
    dataset = read_sidecar(output / "data" / "stdlib")
    if dataset is None:
        raise DemoError(f"tokenizing left no dataset in {output / 'data'}")
    console.print(
        f"  {dataset.tokens:,} tokens (bytes) from {dataset.documents:,} files in {seconds:.0f} s"
    )


def train_twice(output: Path, iters: int, stop_at: int, decoder: str) -> float:
    """Train up to ``stop_at``, and from its checkpoint to ``iters``; the final validation loss."""
    flags = ("--train-iters", iters, "--log-interval", max(1, iters // 16), "--decoder", decoder)
    headline("2", f"train tiny-moe with two processes and stop at iteration {stop_at} of {iters}")
    first = TrainingOutput(iters)
    run_script(output, "02_train.sh", *flags, "--exit-interval", stop_at, on_line=first)
    headline("3", "run it again: it continues from the checkpoint")
    second = TrainingOutput(iters, start=stop_at)
    run_script(output, "02_train.sh", *flags, on_line=second)
    if second.resumed_at != stop_at:
        raise DemoError(
            f"the second run should have continued at iteration {stop_at}, but it began at "
            f"{second.resumed_at}; see {output / 'demo.log'}"
        )
    if second.validation is None or not second.validation < first.losses[0]:
        raise DemoError(
            f"the model did not learn: validation loss {second.validation} after a training loss "
            f"of {first.losses[0]} at the start; see {output / 'demo.log'}"
        )
    return second.validation


class TrainingOutput:
    """Turns megatron's log lines into one short line each, and keeps what the demo checks."""

    def __init__(self, iters: int, start: int = 0) -> None:
        self.losses: list[float] = []
        self.resumed_at: int | None = None
        self.validation: float | None = None
        self.progress = Progress(
            TextColumn("  "),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=iters, completed=start)

    def __enter__(self) -> None:
        self.progress.start()

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def __call__(self, line: str) -> None:
        if match := ITERATION.search(line):
            iteration, ms, lm_loss = (float(text) for text in match.groups()[:3])
            mtp = f"   mtp loss {float(match[4]):6.4f}" if match[4] else ""
            self.losses.append(lm_loss)
            self.progress.update(self.task, completed=int(iteration))
            console.print(
                f"  iteration {iteration:4.0f}   lm loss {lm_loss:6.4f}{mtp}   {ms / 1000:.2f} s"
            )
        elif match := LOADED.search(line):
            self.resumed_at = int(match.group(1))
        elif match := VALIDATION.search(line):
            self.validation = float(match.group(1))


def draw_curve(output: Path) -> None:
    headline("4", "draw the loss curve from the TensorBoard files")
    from loss_curve import draw, read_history  # the drawing libraries take seconds to import

    config = get_flavor("tiny-moe")
    parameters = count_parameters(config).total
    draw(
        read_history(output / "tensorboard"),
        output / "loss.png",
        "tiny-moe learns Python's standard library, byte by byte",
        f"{parameters / 1e6:.1f} M parameters, {config.num_experts} experts divided between two "
        "processes on a CPU; 4,096 tokens an iteration",
    )


def report(output: Path, loss: float, seconds: float) -> None:
    console.print(
        f"\n[bold green]done in {seconds:.0f} s[/]\n"
        f"  final validation loss  [bold]{loss:.4f}[/] ({loss / math.log(2):.2f} bits a byte)\n"
        f"  loss curve             {shown(output / 'loss.png')}\n"
        f"  checkpoints            {shown(output / 'checkpoints')}\n"
        f"  everything printed     {shown(output / 'demo.log')}\n\n"
        "Next, on a node with eight GPUs of 141 GB (tokenize your own text first):\n"
    )
    console.print(GPU_COMMANDS, markup=False)


def headline(number: str, text: str) -> None:
    console.print(f"[bold]\\[{number}/4] {text}[/]")


def shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def run_script(
    output: Path, script: str, *flags: object, on_line: TrainingOutput | None = None
) -> float:
    """Run a script of this folder, its output into demo.log; the seconds it took.

    Raises:
        DemoError: it failed; the message has the cause as far as the output tells it.
    """
    command = ["bash", str(HERE / script), *map(str, flags)]
    console.print(f"  $ bash {shown(HERE / script)} {' '.join(command[2:])}", markup=False)
    started = time.monotonic()
    if on_line is None:
        status, cause = run_logged(command, output, lambda line: None)
    else:
        with on_line:
            status, cause = run_logged(command, output, on_line)
    if status:
        raise DemoError(
            f"{script} ended with exit status {status}: {cause}\n"
            f"  everything it printed: {shown(output / 'demo.log')}"
        )
    return time.monotonic() - started


def run_logged(command: list[str], output: Path, on_line: Callable[[str], None]) -> tuple[int, str]:
    """Exit status of the command, and the first line that names an error (else the last one)."""
    scripts = Path(sys.executable).parent  # where pip put qwen35
    environment = os.environ | {
        "QWEN35_RUN_DIR": str(output),
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    cause, last = "", "it printed nothing"
    with (
        open(output / "demo.log", "a") as log,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
        ) as process,
    ):
        log.write(f"$ {' '.join(command)}\n")
        try:
            for line in process.stdout or ():
                log.write(line)
                on_line(line)
                last = line.strip() or last
                if not cause and (match := CAUSE.match(line)):
                    cause = match[1]
        except BaseException:
            process.terminate()
            raise
    return process.returncode, cause or last


if __name__ == "__main__":
    sys.exit(main())
