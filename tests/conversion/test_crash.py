"""Killed at any moment, a conversion goes on, and nothing half-finished looks finished."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from checkpoint_tools.inspect_ckpt import inspect_folder
from checkpoint_tools.mcore.read import MegatronCheckpoint
from qwen35_mcore.errors import CheckpointError
from tests.helpers.ckpt_cli import ckpt, ok, refused
from tests.helpers.forked_ckpt import ForkServer

KILLS = [3, pytest.param(20, marks=pytest.mark.exhaustive)]
SMALL_PARTS = ("--max-shard-size", "100KB", "--workers", "2")


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_does_not_look_complete(target: Path) -> None:
    assert not target.exists()
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        assert inspect_folder(partial)["complete"] is False


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("direction", ["import", "export"])
def test_killed_at_random_moments(
    toys: dict[str, Path], tmp_path: Path, forks: ForkServer, direction: str, kills: int
) -> None:
    source = toys["qwen3_5_moe"]
    if direction == "export":
        ok(ckpt("import", source, tmp_path / "m"))
        source = tmp_path / "m"
    undisturbed = tmp_path / "undisturbed"
    for folder in (tmp_path / "to warm up", undisturbed):
        began = time.monotonic()
        forks.start(direction, source, folder, *SMALL_PARTS)
        assert forks.wait() == 0
        duration = time.monotonic() - began
    expected = content(undisturbed)

    target, rng, killed, rounds = tmp_path / "target", random.Random(0), 0, 0
    while killed < kills:
        rounds += 1
        assert rounds < 20 * kills
        process = forks.start(direction, source, target, *SMALL_PARTS)
        time.sleep(rng.uniform(0, duration))
        status = forks.kill(process)
        if target.exists():
            assert content(target) == expected
            # killed after it was done: the same command may only say so
            forks.start(direction, source, target, *SMALL_PARTS)
            assert forks.wait() in (0, 2)
            shutil.rmtree(target)
            shutil.rmtree(tmp_path / "target.partial", ignore_errors=True)
        else:
            assert_does_not_look_complete(target)
        killed += status == -signal.SIGKILL
    forks.start(direction, source, target, *SMALL_PARTS)
    assert forks.wait() == 0
    assert content(target) == expected
    assert not (tmp_path / "target.partial").exists()


def interrupted(tmp_path: Path, source: Path, forks: ForkServer) -> Path:
    """An import killed after some parts were finished; returns its partial folder."""
    partial = tmp_path / "target.partial"
    for _ in range(50):
        shutil.rmtree(tmp_path / "target", ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        process = forks.start("import", source, tmp_path / "target", *SMALL_PARTS)
        while len(list(partial.glob("tree/release/*.distcp"))) < 4:  # two of them in the manifest
            time.sleep(0.001)
            if (tmp_path / "target").exists():
                break
        forks.kill(process)
        if not (tmp_path / "target").exists():
            return partial
    raise AssertionError("it was never caught in the middle")


def test_finished_parts_are_kept_and_damaged_ones_written_again(
    toys: dict[str, Path], tmp_path: Path, forks: ForkServer
) -> None:
    source = toys["qwen3_5_moe"]
    partial = interrupted(tmp_path, source, forks)
    manifest = (partial / "manifest.jsonl").read_text()
    parts = sorted(
        path for path in partial.glob("tree/release/*.distcp") if f'/{path.name}"' in manifest
    )
    kept, damaged = parts[0], parts[1]
    kept_inode, damaged_content = kept.stat().st_ino, damaged.read_bytes()
    flipped = bytearray(damaged_content)
    flipped[len(flipped) // 2] ^= 1
    damaged.write_bytes(flipped)
    ok(ckpt("import", source, tmp_path / "target", *SMALL_PARTS))
    release = tmp_path / "target" / "release"
    assert (release / kept.name).stat().st_ino == kept_inode
    assert (release / damaged.name).read_bytes() == damaged_content
    ok(ckpt("verify", source, tmp_path / "target"))


def test_half_a_line_in_the_manifest_is_forgotten(
    toys: dict[str, Path], tmp_path: Path, forks: ForkServer
) -> None:
    source = toys["qwen3_5_moe"]
    manifest = interrupted(tmp_path, source, forks) / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-7])
    ok(ckpt("import", source, tmp_path / "target", *SMALL_PARTS))
    ok(ckpt("verify", source, tmp_path / "target"))


def test_work_of_another_command_is_not_continued(
    toys: dict[str, Path], tmp_path: Path, forks: ForkServer
) -> None:
    partial = interrupted(tmp_path, toys["qwen3_5_moe"], forks)
    refused(ckpt("import", toys["qwen3_5_text"], tmp_path / "target"), str(partial), "delete")
    refused(
        ckpt("import", toys["qwen3_5_moe"], tmp_path / "target", *SMALL_PARTS, "--layout", "mcore"),
        "another command",
    )
    refused(
        ckpt("import", toys["qwen3_5_moe"], tmp_path / "target", *SMALL_PARTS, "--vision"),
        "other vision",
    )


def test_the_record_of_a_text_import_is_the_same_in_every_release(
    toys: dict[str, Path], tmp_path: Path, forks: ForkServer
) -> None:
    """Unfinished work goes on where the whole record is equal."""
    manifest = interrupted(tmp_path, toys["qwen3_5_moe"], forks) / "manifest.jsonl"
    job = json.loads(manifest.read_text().splitlines()[0])["job"]
    expected = "command layout carry no_mtp max_shard_bytes input files"
    assert set(job) == set(expected.split())


def test_an_existing_target_is_refused_and_stays(toys: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "target"
    ok(ckpt("import", toys["qwen3_5_text"], target))
    before = content(target)
    refused(ckpt("import", toys["qwen3_5_moe"], target), str(target), "--overwrite")
    assert content(target) == before


def test_overwrite_replaces_results_of_conversions_only(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    source, target = toys["qwen3_5_text"], tmp_path / "target"
    ok(ckpt("import", source, target))
    (target / "iter_0000500").mkdir()
    kept = content(target)
    refused(ckpt("import", source, target, "--overwrite"), "iter_0000500", "choose another")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    for command, given in (("import", source), ("export", target)):
        outcome = ckpt(command, given, tmp_path / "notes", "--overwrite")
        refused(outcome, "thesis.tex", "choose another")
    assert content(target) == kept
    (target / "iter_0000500").rmdir()
    ok(ckpt("import", source, target, "--overwrite"))
    ok(ckpt("export", target, tmp_path / "hf"))
    ok(ckpt("export", target, tmp_path / "hf", "--overwrite"))


def test_a_target_in_its_source_or_around_it(toys: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "models" / "hf"
    shutil.copytree(toys["qwen3_5_text"], source)
    before = content(source)
    for target in (source, source / "m", tmp_path / "models", source / ".." / "hf"):
        for flags in ([], ["--overwrite"], ["--dry-run"]):
            refused(ckpt("import", source, target, *flags), "in each other", "outside")
    assert content(source) == before
    ok(ckpt("import", source, tmp_path / "m"))
    for target in (tmp_path / "m", tmp_path / "m" / "release"):
        refused(ckpt("export", tmp_path / "m", target, "--overwrite"), "in each other")
    ok(ckpt("export", tmp_path / "m", tmp_path / "m" / "hf"))


def test_an_export_goes_on_only_to_the_same_result(
    toys: dict[str, Path], tmp_path: Path, forks: ForkServer
) -> None:
    source, reference = tmp_path / "m", tmp_path / "reference"
    ok(ckpt("import", toys["qwen3_5_text"], source))
    reference.mkdir()
    for path in toys["qwen3_5_text"].glob("*.safetensors"):
        wide = {name: tensor.float() for name, tensor in load_file(path).items()}
        save_file(wide, reference / path.name, {"format": "pt"})
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(toys["qwen3_5_text"] / name, reference)
    export = ("export", source, tmp_path / "target", *SMALL_PARTS)
    partial = tmp_path / "target.partial"
    while not list(partial.glob("tree/*.safetensors")):
        shutil.rmtree(partial, ignore_errors=True)
        process = forks.start(*export)
        while not list(partial.glob("tree/*.safetensors")) and not (tmp_path / "target").exists():
            time.sleep(0.001)
        forks.kill(process)
        shutil.rmtree(tmp_path / "target", ignore_errors=True)
    other = ckpt(*export, "--reference", reference)
    refused(other, str(partial), "outputs", "delete")
    shutil.rmtree(partial)
    ok(ckpt(*export, "--reference", reference))
    ok(ckpt("verify", reference, tmp_path / "target"))


def test_overwrite_replaces_only_after_success(
    toys: dict[str, Path], tmp_path: Path, forks: ForkServer
) -> None:
    target, partial = tmp_path / "target", tmp_path / "target.partial"
    arguments = ("import", toys["qwen3_5_moe"], target, *SMALL_PARTS, "--overwrite")
    while not any(partial.glob("tree/release/*.distcp")):  # else it ended before it was killed
        shutil.rmtree(partial, ignore_errors=True)
        ok(ckpt("import", toys["qwen3_5_text"], target, "--overwrite"))
        before = content(target)
        process = forks.start(*arguments)
        while psutil.pid_exists(process) and not any(partial.glob("tree/release/*.distcp")):
            time.sleep(0.001)
        forks.kill(process)
    assert content(target) == before
    ok(ckpt(*arguments))
    ok(ckpt("verify", toys["qwen3_5_moe"], target))
    assert not (tmp_path / "target.partial").exists()


def test_killed_while_cleaning_up(toys: dict[str, Path], tmp_path: Path) -> None:
    source, target = toys["qwen3_5_text"], tmp_path / "target"
    ok(ckpt("import", source, tmp_path / "other"))
    # the moment after the rename: the result in place, the manifest not yet removed
    from checkpoint_tools.files import manifest

    remove = manifest._remove
    manifest._remove = lambda folder: None
    try:
        ok(ckpt("import", source, target))
    finally:
        manifest._remove = remove
    assert (tmp_path / "target.partial" / "manifest.jsonl").exists()
    ok(ckpt("import", source, target))
    assert not (tmp_path / "target.partial").exists()
    assert content(target) == content(tmp_path / "other")


def test_two_processes_cannot_write_one_target(
    toys: dict[str, Path], tmp_path: Path, forks: ForkServer
) -> None:
    partial = interrupted(tmp_path, toys["qwen3_5_moe"], forks)
    import fcntl

    with open(partial / "manifest.jsonl", "rb") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)
        refused(
            ckpt("import", toys["qwen3_5_moe"], tmp_path / "target", *SMALL_PARTS),
            "another process",
        )


def test_the_tracker_is_what_makes_it_a_checkpoint(toys: dict[str, Path], tmp_path: Path) -> None:
    ok(ckpt("import", toys["qwen3_5_text"], tmp_path / "m"))
    (tmp_path / "m" / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match="no Megatron checkpoint"):
        MegatronCheckpoint(tmp_path / "m")


def test_an_empty_folder_may_be_the_target(toys: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    ok(ckpt("import", toys["qwen3_5_text"], tmp_path / "target"))
    ok(ckpt("verify", toys["qwen3_5_text"], tmp_path / "target"))
