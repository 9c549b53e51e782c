"""A wheel of this repository, installed where there is no checkout, does the whole work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.hf_toy import read_all, write_toy

ROOT = Path(__file__).parents[2]
PACKAGES = ("qwen35_mcore", "checkpoint_tools")
HERE_ALREADY = ("site-packages", "dist-packages")


def files_of(folder: Path) -> set[str]:
    """Everything that a package needs: modules and data, not what is written beside them."""
    return {
        str(path.relative_to(folder))
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, because setuptools leaves folders where it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    checked([*pip, "--wheel-dir", str(out), str(source)], out)
    (built,) = out.glob("*.whl")
    return built


class Installed:
    """An environment whose only packages of its own are the wheel's; torch and the like are those
    of the environment that runs the tests, whose editable installation is not among them."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.bin = folder / "venv" / "bin"
        self.folder = folder / "work"
        self.folder.mkdir()
        venv.create(folder / "venv")
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install"]
        checked([*pip, "--no-deps", "--no-index", str(wheel)], self.folder)
        others = [path for path in sys.path if Path(path).name in HERE_ALREADY]
        (site_packages,) = (folder / "venv").glob("lib/*/site-packages")
        (site_packages / "dependencies.pth").write_text("\n".join(others) + "\n")

    def run(self, command: str, *words: object) -> str:
        """A command of the environment, in an empty folder."""
        return checked([str(self.bin / command), *map(str, words)], self.folder)


def checked(command: list[str], folder: Path) -> str:
    """What a command prints. The checkout is not on its path: pip would find its package there."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_it_holds_every_module_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files_of(ROOT)


ORIGINS = """
import importlib.util, json, sys
def origin(name):
    try:
        return importlib.util.find_spec(name).origin
    except (ModuleNotFoundError, AttributeError):
        return None
print(json.dumps({name: origin(name) for name in sys.argv[1:]}))
"""


def test_nothing_is_imported_from_the_checkout(installed: Installed) -> None:
    others = ("examples.pretrain_qwen35", "tests.helpers")
    origins = json.loads(installed.run("python", "-c", ORIGINS, *PACKAGES, *others))
    for name in PACKAGES:
        assert Path(origins[name]).is_relative_to(installed.bin.parent)
    assert [origins[name] for name in others] == [None, None]


def test_it_tokenizes_imports_trains_exports_and_plans(installed: Installed) -> None:
    source = installed.folder / "Toy"
    config = write_toy(source, "qwen3_5_moe", vocab_size=512)
    (installed.folder / "notes.txt").write_text("a few words " * 2000)
    installed.run("qwen35", "data", "tokenize", "notes.txt", "--output-prefix", "data/notes")
    installed.run("qwen35-ckpt", "import", "Toy", "imported")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    log = installed.run(
        *("python", *torchrun, "-m", "qwen35_mcore.training.pretrain", "--hf-config", "Toy"),
        *("--pretrained-checkpoint", "imported", "--expert-model-parallel-size", "2"),
        *("--data-path", "data/notes", "--split", "1", "--seq-length", "64"),
        *("--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "2"),
        *("--lr", "1e-3", "--lr-decay-style", "constant", "--num-workers", "0"),
        *("--eval-iters", "0", "--log-interval", "1", "--save", "run", "--save-interval", "2"),
    )
    assert "iteration        2/       2" in log
    installed.run("qwen35-ckpt", "export", "run", "exported")
    exported = installed.folder / "exported"
    assert Qwen35Config.from_hf(exported) == config
    before, after = read_all(source), read_all(exported)
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert not all(after[name].equal(before[name]) for name in before)
    plan = ["--flavor", "4b", "--gpus", "8", "--global-batch-size", "64"]
    installed.run("qwen35", "plan", *plan, "--emit", "plans/4b")
    assert "--flavor 4b" in (installed.folder / "plans" / "4b" / "layout.args").read_text()
