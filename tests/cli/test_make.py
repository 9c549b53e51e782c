"""What `make` does before it runs anything: the choice of Python, the installation, once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def fake_python(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def run_setup(venv: Path, *extra: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "tools" / "venv.sh", venv, *extra],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def make(*arguments: str) -> str:
    # under `make test` these would tell the inner make what the outer one was called with
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_old_python_is_named(tmp_path: Path) -> None:
    old = fake_python(
        tmp_path / "python3", '[ "$1" = --version ] && echo "Python 3.11.9" && exit; exit 1'
    )
    done = run_setup(tmp_path / "venv", PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Python 3.12 or newer was found")
    assert f'{old} answers "Python 3.11.9"' in done.stderr
    assert "make PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_that_does_not_exist(tmp_path: Path) -> None:
    done = run_setup(tmp_path / "venv", PYTHON="/nowhere/python3")
    assert done.returncode == 1
    assert "/nowhere/python3" in done.stderr


def test_a_python_without_venv(tmp_path: Path) -> None:
    bare = fake_python(tmp_path / "python3", '[ "$2" != venv ]')
    done = run_setup(tmp_path / "venv", PYTHON=str(bare))
    assert done.returncode == 1
    assert "could not create the virtual environment" in done.stderr
    assert "python3-venv" in done.stderr


@pytest.mark.parametrize(("extra", "target"), [((), "."), (("test",), ".[test]")])
def test_installs_into_an_environment_that_is_there(
    tmp_path: Path, extra: tuple[str, ...], target: str
) -> None:
    calls = tmp_path / "calls"
    pip = f'[ "$1" = -c ] && exit; echo "$@" >> {calls}; echo "  Downloading torch"; echo noise'
    fake_python(tmp_path / "venv/bin/python", pip)
    done = run_setup(tmp_path / "venv", *extra)
    assert done.returncode == 0, done.stderr
    assert calls.read_text() == f"-m pip install -c constraints.txt -e {target}\n"
    assert done.stdout.splitlines()[1:] == ["  Downloading torch"]


def test_a_failed_installation_is_an_error(tmp_path: Path) -> None:
    fake_python(
        tmp_path / "venv/bin/python", '[ "$1" = -c ] && exit; echo "no such package" >&2; exit 1'
    )
    done = run_setup(tmp_path / "venv", "test")
    assert done.returncode == 1
    assert "no such package\nerror: the installation into" in done.stderr


def test_make_installs_once(tmp_path: Path) -> None:
    venv = f"VENV={tmp_path}"
    assert "tools/venv.sh" in make("-n", "test", venv)
    (tmp_path / ".installed-test").touch()
    assert "tools/venv.sh" not in make("-n", "test", venv)
    assert "tools/venv.sh" in make("-n", "check", venv)


def test_only_all_tests_are_exhaustive(tmp_path: Path) -> None:
    (tmp_path / ".installed-test").touch()
    venv = f"VENV={tmp_path}"
    assert '-m "not exhaustive" -k rope' in make("-n", "test", venv, "ARGS=-k rope")
    everything = make("-n", "test-all", venv)
    assert "not exhaustive" not in everything
    assert "--hypothesis-profile=exhaustive" in everything


def test_make_without_a_target_lists_the_targets() -> None:
    listed = [line.split()[1] for line in make().splitlines()]
    assert listed == [
        *("help", "demo", "demo-vision", "test", "test-all", "check", "format", "install"),
        "clean",
    ]
