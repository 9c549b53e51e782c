"""Every command and Python block of every markdown file works in a fresh clone.

What needs a cluster or minutes is parsed by the parser that would run it; `make demo` and the
walk-through of examples/ have tests of their own, which run them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from qwen35_mcore import data
from qwen35_mcore.config.flavors import FLAVORS
from qwen35_mcore.data.images.convert import convert
from tests.helpers import documents
from tests.helpers.click_words import click_command, parse_click
from tests.helpers.conversations import PATCH, SPECIAL, make_processor, write_digits
from tests.helpers.documents import ROOT, commands, fragments
from tests.helpers.flag_words import GPU_FLAGS, without_gpu_flags
from tests.helpers.image_rows import write_config

LANGUAGES = (*documents.SHELL, "python", "json", "")
TRAINS = ("examples/pretrain_qwen35.py", "qwen35_mcore.training.pretrain")
PARSE_RUNS = """
import json, os, sys
from qwen35_mcore.mcore import cpu_mode
if cpu_mode.is_needed():
    cpu_mode.enable_training()
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.training.global_vars import destroy_global_vars
from qwen35_mcore.training.arguments import choose_model, parse_arguments, read_flags
for world, model, as_written, on_cpu in json.load(sys.stdin):
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    if model is not None:
        read_flags(as_written, choose_model(*model, []), on_cpu=False)
    parse_arguments(on_cpu)
    destroy_global_vars()
    destroy_num_microbatches_calculator()
"""
PARSE_SCRIPTS = """
import argparse, json, runpy, sys
from qwen35_mcore.mcore import cpu_mode
if cpu_mode.is_needed():
    cpu_mode.enable_training()
class Parsed(Exception): pass
def parse_args(parser, args=None, namespace=None):
    if whole:
        parse(parser, args, namespace)
    else:
        unknown = {word for word in flags if word not in parser._option_string_actions}
        assert not unknown, unknown
    raise Parsed
parse, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, parse_args
for where, whole, words in json.load(sys.stdin):
    flags = [word for word in words if word.startswith("--")]
    is_module = words[0] == "-m"
    sys.argv = words[1:] if is_module else words
    try:
        (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")
    except Parsed:
        continue
    except (SystemExit, Exception) as error:
        sys.exit(f"{where}: {' '.join(words)}: {error!r}")
    sys.exit(f"{where}: {' '.join(words)}: it parsed nothing")
"""


def run_python(code: str, folder: Path, given: object = None) -> None:
    """Run code on the CPU, in a folder that holds nothing of this repository."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(given),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


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


# commands of this package, parsed by click


def test_command_lines_parse() -> None:
    ours = commands("qwen35", "qwen35-ckpt")
    assert {command.program for command in ours} == {"qwen35", "qwen35-ckpt"}
    for command in ours:
        parse_click(click_command(command.program), command.words)


def test_a_flag_that_does_not_exist_is_found() -> None:
    with pytest.raises(Exception, match="no-such-flag"):
        parse_click(click_command("qwen35"), ["qwen35", "flavors", "--no-such-flag"])


# training, parsed by torchrun's parser and Megatron's


def torchrun_job(words: list[str]) -> tuple[int, list[str]]:
    """World size and flags of a training run that torchrun starts with these arguments."""
    from torch.distributed.run import parse_args

    args = parse_args(words)
    assert args.training_script in TRAINS, words
    nodes = int(args.nnodes.partition(":")[0])
    return nodes * int(args.nproc_per_node), args.training_script_args


def script_command(script: str, last: str) -> list[str]:
    """The words of the line of a script of examples/ that begins so, without its ``"$@"``."""
    text = (ROOT / script).read_text().replace("\\\n", " ")
    text = text.replace("$run", "runs/demo").replace("$(dirname $0)", "examples")
    text = text.replace('"$(dirname "$0")/', '"examples/')
    line = next(line for line in text.splitlines() if line.startswith(last))
    words = shlex.split(line)
    assert words[-1] == "$@"
    return words[:-1]


def training_runs() -> list[tuple[int, list[str]]]:
    runs = [torchrun_job(command.words[1:]) for command in commands("torchrun")]
    for _, words in commands("bash"):
        if words[1] == "examples/02_train.sh":
            start = script_command(words[1], "exec python -m qwen35_mcore.training.launch ")
            runs.append(torchrun_job([*start[4:], *words[2:]]))
    return runs


def parse_training(runs: list[tuple[int, list[str]]], workspace: Path) -> None:
    """Megatron's parser and checks take every run's flags, with its number of ranks; flags that
    a run on a CPU refuses are parsed as on a GPU first."""
    given = []
    for world, flags in runs:
        model, as_written = None, list(flags)
        if set(GPU_FLAGS) & set(flags):
            named = dict(pairwise(flags))
            model = named.get("--flavor"), named.get("--hf-config")
        without_gpu_flags(flags)
        given.append((world, model, as_written, flags))
    run_python(PARSE_RUNS, workspace, given)


def test_training_commands_parse(workspace: Path) -> None:
    runs = training_runs()
    assert len(runs) >= 6
    for _, flags in runs:
        if "--pretrained-checkpoint" in flags:  # its file would have to be there
            at = flags.index("--pretrained-checkpoint")
            del flags[at : at + 2]
            if "--image-data" in flags:
                flags += ["--hf-config", vision_language_folder(workspace)]
            elif not {"--flavor", "--hf-config"} & set(flags):  # that file is the model, too
                flags += ["--flavor", "35b-a3b"]
    parse_training(runs, workspace)


def vision_language_folder(workspace: Path) -> str:
    """A model's folder with a processor, beside conversations that it can read."""
    folder = make_processor(workspace / "vision-language")
    ids = {f"{kind}_token_id": SPECIAL.index(f"<|{kind}_pad|>") for kind in ("image", "video")}
    text = FLAVORS["35b-a3b"]
    tower = {"patch_size": PATCH, "out_hidden_size": text.hidden_size}
    outer = {"vision_config": tower} | ids
    write_config(folder, replace(text, model_type="qwen3_5_moe", carried_outer=outer))
    corpus = write_digits(workspace / "digits", 40)
    shards = workspace / "data/chats"
    split = {"split": "50,50,0", "processor": str(folder)}
    convert(inputs=[corpus], output_dir=shards, quiet=True, **split)
    return folder.name


def test_the_tokenizing_script_parses() -> None:
    scripts = [c.words for c in commands("bash") if c.words[1] == "examples/01_data.sh"]
    assert scripts
    for words in scripts:
        line = [*script_command(words[1], "qwen35 data tokenize "), *words[2:]]
        parse_click(click_command("qwen35"), line)


# plans: made, and started with stand-ins for torchrun and sbatch


def test_plans_are_made_and_started_as_written(workspace: Path) -> None:
    """In order, in a folder that holds nothing of this repository; then every command that starts
    a plan finds one for its number of GPUs, and Megatron takes the flags."""
    start = [sys.executable, "-m", "qwen35_mcore.cli"]
    paths = {"DATA": "data/corpus", "SAVE": "run", "REPO": str(ROOT)}
    env = os.environ | {"PYTHONPATH": str(ROOT)} | paths
    for where, words in commands("qwen35"):
        if words[1] == "plan":
            done = subprocess.run(
                [*start, *words[1:]], cwd=workspace, env=env, capture_output=True, text=True
            )
            # --explain ends with 1 where the layout cannot run
            expected = (0, 1) if "--explain" in words else (0,)
            assert done.returncode in expected, (where, done.stderr)
            assert done.stderr == ""
    runs = []
    for _, words in commands():
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


def plan_folder(name: str, workspace: Path) -> Path:
    """A plan that an earlier command wrote, or one of the repository's."""
    return workspace / name if (workspace / name).exists() else ROOT / name


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
    assert given[:2] == ["-m", "qwen35_mcore.training.launch"]
    ranks, flags = torchrun_job(given[2:])
    assert ranks == gpus
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
        [plan_folder(words[0], folder), *words[1:]],
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
    preset = plan_folder(words[script_at + 1], folder)
    assert json.loads((preset / "plan.json").read_text())["gpus"] == gpus
    layout = shlex.split((preset / "layout.args").read_text(), comments=True)
    return gpus, [*layout, *words[script_at + 2 :]]


# other programs


def test_scripts_parse(tmp_path: Path) -> None:
    """Scripts and modules of the repository take their arguments, by their own parser."""
    given = []
    for whole, found in ((True, commands("python")), (False, fragments("python"))):
        for where, words in found:
            if words[1] != "-m":
                words[1] = str(ROOT / words[1])
            elif words[2] in ("qwen35_mcore.training.launch", "tests.distributed.cases"):
                continue  # torchrun's arguments, or none
            given.append((where, whole, words[1:]))
    run_python(PARSE_SCRIPTS, tmp_path, given)


def test_modules_and_scripts_exist() -> None:
    for where, words in (*commands("python"), *fragments("python")):
        name = words[1] if words[1] != "-m" else f"{words[2].replace('.', '/')}.py"
        assert name in documents.tracked(), (where, words)


def test_make_knows_the_targets() -> None:
    for where, words in (*commands("make"), *fragments("make")):
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, env=env, capture_output=True)
        assert done.returncode == 0, (where, words)


def test_pip_installs_what_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for where, words in (*commands("pip"), *fragments("pip")):
        assert words[1:5] == ["install", "-c", "constraints.txt", "-e"], where
        wanted = re.fullmatch(r"\.(?:\[(.*)\])?", words[5])
        assert wanted, where
        assert set((wanted[1] or "").split(",")) - {""} <= set(extras["optional-dependencies"])


def test_pytest_finds_what_is_named() -> None:
    for where, words in (*commands("pytest"), *fragments("pytest")):
        assert all(word in documents.tracked() for word in words[1:] if "/" in word), where


def test_the_environment_is_the_one_that_make_makes() -> None:
    for command in (*commands("source"), *fragments("source")):
        assert command.words == ["source", ".venv/bin/activate"]
    assert re.search(r"^VENV \?= \.venv$", (ROOT / "Makefile").read_text(), flags=re.M)


def test_python_runs(tmp_path: Path) -> None:
    """What README.md computes is looked at in tests/unit/test_public_interface.py."""
    for block in documents.blocks():
        if block.language == "python" and not block.where.startswith("README.md:"):
            run_python(block.text, tmp_path)


# nothing is left out

COVERED: dict[str, Callable[..., None]] = {
    "qwen35": test_command_lines_parse,
    "qwen35-ckpt": test_command_lines_parse,
    "torchrun": test_training_commands_parse,
    "python": test_scripts_parse,
    "make": test_make_knows_the_targets,
    "pip": test_pip_installs_what_is_there,
    "pytest": test_pytest_finds_what_is_named,
    "source": test_the_environment_is_the_one_that_make_makes,
    "sbatch": test_plans_are_made_and_started_as_written,
    "run.sh": test_plans_are_made_and_started_as_written,
    "bash examples/01_data.sh": test_the_tokenizing_script_parses,
    "bash examples/02_train.sh": test_training_commands_parse,
    "bash launch/train.sh": test_plans_are_made_and_started_as_written,
}


def test_every_command_has_a_case() -> None:
    assert "checkpoint_tools/README.md" in documents.documents()
    for where, words in commands():
        program = " ".join(words[:2]) if words[0] == "bash" else Path(words[0]).name
        assert program in COVERED, f"{where}: no case of {Path(__file__).name} covers {words}"


def test_every_block_says_what_it_is() -> None:
    for block in documents.blocks():
        assert block.language in LANGUAGES, block.where


def test_the_demo_prints_a_documented_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import demo

    printed = demo.GPU_COMMANDS[demo.GPU_COMMANDS.index("torchrun") :]
    assert printed in (ROOT / "examples/README.md").read_text()
