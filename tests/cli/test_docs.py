"""Every command of the READMEs works: flags that exist, a layout that is allowed, folders that are
there; plans are made as in a fresh clone."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from qwen35_mcore import data
from qwen35_mcore.config.flavors import FLAVORS
from tests.helpers.flag_words import without_gpu_flags

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "examples/README.md", "launch/README.md")
TRAINING = ("qwen35_mcore.training.pretrain", "examples/pretrain_qwen35.py")
NOT_OURS = ("pip", "tensorboard", "...")
PARSE = """
import json, os, sys
from qwen35_mcore.mcore import cpu_mode
if cpu_mode.is_needed():
    cpu_mode.enable_training()
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.training.global_vars import destroy_global_vars
from qwen35_mcore.training.arguments import parse_arguments
for world, argv in json.load(sys.stdin):
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    parse_arguments(argv)
    destroy_global_vars()
    destroy_num_microbatches_calculator()
"""


def commands(*documents: str) -> list[list[str]]:
    """The words of every command in a ```bash block, without the variables that are set for it."""
    found = []
    for document in documents or DOCUMENTS:
        text = (ROOT / document).read_text()
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    del words[0]
                found += [words] if words else []
    return found


def parse_click(command: Any, words: list[str]) -> None:
    """Parse without running; raises a usage error where the command would not run."""
    context = command.make_context(words[0], words[1:])
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def training_run(words: list[str]) -> tuple[int, list[str]] | None:
    """World size and flags of a command that trains."""
    if words[:2] == ["bash", "examples/02_train.sh"]:
        script = (ROOT / words[1]).read_text().replace("\\\n", " ").replace("$run", "runs/demo")
        line = next(line for line in script.splitlines() if line.startswith("exec python"))
        flags = shlex.split(line)[8:-1]  # without the launcher and "$@"
        return 2, [*flags, *words[2:]]
    if words[0] != "torchrun":
        return None
    script_at = next(at for at, word in enumerate(words) if word in TRAINING)
    launched = [word for word in words[1:script_at] if word != "-m"]
    launcher = dict(zip(launched[::2], launched[1::2], strict=True))
    nodes, processes = launcher.get("--nnodes", "1"), launcher["--nproc-per-node"]
    return int(nodes) * int(processes), words[script_at + 1 :]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with the files that the documents' commands name."""
    (tmp_path / "notes.jsonl").write_text('{"text": "a few words"}\n' * 400)
    for prefix in ("data/corpus", "runs/demo/data/stdlib"):
        data.tokenize(
            inputs=[str(tmp_path / "notes.jsonl")],
            output_prefix=tmp_path / prefix,
            tokenizer="byte",
            workers=1,
            quiet=True,
        )
    published = tmp_path / "Qwen3.5-35B-A3B"
    published.mkdir()
    (published / "config.json").write_text(json.dumps(FLAVORS["35b-a3b"].to_hf()))
    return tmp_path


def test_command_lines_parse() -> None:
    from checkpoint_tools.cli import app as checkpoint_app
    from qwen35_mcore.cli import app

    known = {"qwen35": app, "qwen35-ckpt": checkpoint_app}
    ours = [words for words in commands() if words[0] in known]
    assert {words[0] for words in ours} == set(known)
    for words in ours:
        parse_click(typer.main.get_command(known[words[0]]), words)


def test_a_flag_that_does_not_exist_is_found() -> None:
    from qwen35_mcore.cli import app

    with pytest.raises(Exception, match="no-such-flag"):
        parse_click(typer.main.get_command(app), ["qwen35", "flavors", "--no-such-flag"])


@pytest.mark.slow
def test_training_commands_parse(workspace: Path) -> None:
    runs = [run for words in commands() if (run := training_run(words))]
    assert len(runs) >= 6
    for _, flags in runs:
        if "--pretrained-checkpoint" in flags:  # its file would have to be there
            at = flags.index("--pretrained-checkpoint")
            del flags[at : at + 2]
            if not {"--flavor", "--hf-config"} & set(flags):  # that file is the model, too
                flags += ["--flavor", "35b-a3b"]
    parse_training(runs, workspace)


def parse_training(runs: list[tuple[int, list[str]]], workspace: Path) -> None:
    """Megatron's parser and checks take every run's flags, with its number of ranks."""
    for _, flags in runs:
        without_gpu_flags(flags)
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(runs),
        cwd=workspace,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_plans_are_made_and_started_as_written(workspace: Path) -> None:
    """In order, in a folder that holds nothing of this repository; then every command that starts
    a plan finds one for its number of GPUs, and Megatron takes the flags."""
    start = [sys.executable, "-m", "qwen35_mcore.cli"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "DATA": "data/corpus", "SAVE": "run"}
    for words in commands():
        if words[:2] == ["qwen35", "plan"]:
            done = subprocess.run(
                [*start, *words[1:]], cwd=workspace, env=env, capture_output=True, text=True
            )
            # --explain ends with 1 where the layout cannot run
            assert done.returncode in ((0, 1) if "--explain" in words else (0,)), done.stderr
            assert done.stderr == ""
    runs = []
    for words in commands():
        if words[:2] == ["bash", "launch/train.sh"]:
            runs.append(started_here(words, workspace, env))
        elif words[0] == "sbatch":
            runs.append(submitted(words[1:], workspace))
        elif words[0].endswith("/run.sh"):
            runs.append(submitted(run_sh(words, workspace, env), workspace))
    assert len(runs) >= 6
    for _, flags in runs:
        flags += ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]
    parse_training(runs, workspace)


def started_here(words: list[str], folder: Path, env: dict[str, str]) -> tuple[int, list[str]]:
    """What train.sh gives to torchrun on a node with the plan's GPUs."""
    gpus = json.loads((folder / words[2] / "plan.json").read_text())["gpus"]
    visible = ",".join(map(str, range(gpus)))
    done = subprocess.run(
        ["bash", ROOT / words[1], *words[2:]],
        cwd=folder,
        env=env | {"PYTHON": "echo", "CUDA_VISIBLE_DEVICES": visible},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    given = shlex.split(done.stdout)
    flags = given[given.index("qwen35_mcore.training.pretrain") + 1 :]
    at = flags.index("--data-path")
    return gpus, flags[:at] + flags[at + 2 :]


def run_sh(words: list[str], folder: Path, env: dict[str, str]) -> list[str]:
    """What a plan's run.sh gives to sbatch, from another folder."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    (bin_folder / "sbatch").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    (bin_folder / "sbatch").chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / words[0], *words[1:]],
        cwd=folder,
        env=env | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def submitted(words: list[str], folder: Path) -> tuple[int, list[str]]:
    """Ranks and flags of a job of slurm.sbatch, whose preset has to be made for so many."""
    script_at = next(at for at, word in enumerate(words) if word.endswith("launch/slurm.sbatch"))
    options = dict(word.split("=", 1) for word in words[:script_at])
    gpus = int(options["--nodes"]) * int(options["--gpus-per-node"])
    preset = ROOT / words[script_at + 1]
    assert json.loads((preset / "plan.json").read_text())["gpus"] == gpus
    layout = shlex.split((preset / "layout.args").read_text(), comments=True)
    return gpus, [*layout, *words[script_at + 2 :]]


def test_the_demo_prints_a_documented_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import demo

    printed = demo.GPU_COMMANDS[demo.GPU_COMMANDS.index("torchrun") :]
    assert printed in (ROOT / "examples/README.md").read_text()


def test_every_command_is_checked_or_known() -> None:
    for words in commands():
        if words[0] in ("bash", "python"):
            if words[1] == "-m":
                assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists()
            else:
                assert (ROOT / words[1]).exists(), words
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
        elif words[0] == "sbatch" or words[0].endswith("/run.sh"):
            assert any((ROOT / word).exists() for word in words), words
        elif words[0] == "source":  # made by make
            assert words == ["source", ".venv/bin/activate"]
        else:
            assert words[0] in ("qwen35", "qwen35-ckpt", "torchrun", *NOT_OURS), words
