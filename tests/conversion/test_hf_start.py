"""A run that starts from a Hugging Face folder imports it once, beside itself, and trains."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from checkpoint_tools.mcore.read import MegatronCheckpoint
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import CheckpointError
from qwen35_mcore.training.checks.hf_start import import_start, model_of_start
from tests.helpers.ckpt_cli import ckpt, ok
from tests.helpers.hf_toy import rewrite, write_toy
from tests.helpers.pretrain_runs import script_server, small_dataset

KIND = "qwen3_5_moe"


def flags(source: Path | str, save: Path, *more: str) -> list[str]:
    return [
        *("--pretrained-checkpoint", str(source), "--save", str(save), "--load", str(save)),
        *("--save-interval", "1", "--data-path", small_dataset(), "--split", "80,10,10"),
        *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "2"),
        *("--lr", "1e-3", "--lr-decay-style", "constant", "--num-workers", "0"),
        *("--eval-iters", "0", *more),
    ]


def arguments(
    source: Path | str, save: Path | None, load: Path | None = None, *, vision: bool = False
) -> Namespace:
    """What `import_start` looks at."""
    return Namespace(
        pretrained_checkpoint=str(source),
        save=save and str(save),
        load=load and str(load),
        ckpt_step=None,
        qwen35_vision=vision,
    )


def at_once(count: int, source: Path, save: Path) -> list[Any]:
    """`import_start` on several ranks of a job: its result or its error on each."""
    model, results = Qwen35Config.from_hf(source), []

    def rank() -> None:
        args = arguments(source, save)
        try:
            import_start(args, model)
            results.append(Path(args.pretrained_checkpoint))
        except CheckpointError as error:
            results.append(str(error))

    threads = [threading.Thread(target=rank) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "Toy"
    write_toy(folder, KIND, vocab_size=512)
    return folder


def test_one_command_from_published_weights_to_training(source: Path, tmp_path: Path) -> None:
    """Two ranks, no other flag for the model; started again, the run resumes without the import."""
    run = tmp_path / "run"
    command = flags(source, run, "--train-iters", "2", "--exit-interval", "1")
    log = script_server().run(command, 2).output()
    assert log.count(f"imported {source}\n") + log.count(f"imported before from {source}\n") == 1
    (imported,) = (tmp_path / "imported").glob("Toy-*")
    ok(ckpt("verify", source, imported))
    assert f"successfully loaded checkpoint from {imported}" in log
    shutil.rmtree(tmp_path / "imported")
    log = script_server().run(command, 2).output()
    assert f"successfully loaded checkpoint from {run}" in log
    assert "at iteration 1\n" in log
    assert not (tmp_path / "imported").exists()
    ok(ckpt("export", run, tmp_path / "hf"))
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()


def test_a_failed_import_is_one_error_on_all_ranks(source: Path, tmp_path: Path) -> None:
    """The advice is followed: without the MTP layer that the files lack, the run starts."""
    folder = Path(shutil.copytree(source, tmp_path / "Toy"))
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n[:4] != "mtp."})
    command = flags(folder, tmp_path / "run", "--train-iters", "1")
    run = script_server().start(command, 2)
    assert run.wait() == [2, 2]
    assert run.output().count("error: ") == 1
    assert "Traceback" not in run.output()
    assert f"importing {folder} failed: " in run.output()
    assert "--override mtp_num_hidden_layers=0" in run.output()
    command += ["--override", "mtp_num_hidden_layers=0"]
    script_server().run(command)
    config = json.loads(MegatronCheckpoint(tmp_path / "run").argument("qwen35_hf_config"))
    assert Qwen35Config.from_hf(config).mtp_num_hidden_layers == 0


def test_ranks_that_wait_share_the_failure_and_the_next_start_tries_again(
    source: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "Toy"))
    shard = next(folder.glob("*.safetensors"))
    content = shard.read_bytes()
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    shard.write_bytes(b"\0" * len(content))
    os.utime(shard, ns=times)
    results = at_once(3, folder, tmp_path / "run")
    assert len(results) == 3
    assert len(set(results)) == 1
    assert "failed" in results[0]
    assert len(next((tmp_path / "imported").glob(".*.lock")).read_text().splitlines()) == 1
    shard.write_bytes(content)
    os.utime(shard, ns=times)
    assert len(set(at_once(2, folder, tmp_path / "run"))) == 1
    assert [p.name[:4] for p in (tmp_path / "imported").iterdir() if p.name[0] != "."] == ["Toy-"]


def test_an_import_is_used_again_but_not_for_a_changed_source(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "Toy"))
    first = at_once(2, folder, tmp_path / "a")
    before = (first[0] / "release/metadata.json").stat().st_ino
    assert at_once(1, folder, tmp_path / "b") == first[:1]
    assert (first[0] / "release/metadata.json").stat().st_ino == before
    shard = next(folder.glob("*.safetensors"))
    os.utime(shard, ns=(0, 0))
    (other,) = at_once(1, folder, tmp_path / "a")
    assert other.parent == first[0].parent
    assert other not in first
    next((other / "release").glob("*.distcp")).unlink()
    (message,) = at_once(1, folder, tmp_path / "a")
    assert f"delete {other} and start again" in message


def test_a_killed_rank_blocks_nobody(source: Path, tmp_path: Path) -> None:
    """Its import goes on without it, or is gone with it: the next start has it either way."""
    process = multiprocessing.get_context("fork").Process(
        target=at_once, args=(1, source, tmp_path / "run")
    )
    process.start()
    while not list((tmp_path / "imported").glob(".*.lock")):
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (imported,) = at_once(1, source, tmp_path / "run")
    ok(ckpt("verify", source, imported))


def refuse(args: Namespace, model: Qwen35Config, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        import_start(args, model)
    for part in parts:
        assert part in str(caught.value)


def test_commands_in_advice_take_any_path(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "a b"))
    advice = f"`qwen35-ckpt import '{folder}' OUT_DIR`"
    refuse(arguments(folder, None), Qwen35Config.from_hf(folder), advice)


def test_what_flags_decide_is_refused_before_the_import(source: Path, tmp_path: Path) -> None:
    model, run = Qwen35Config.from_hf(source), tmp_path / "run"
    other = Qwen35Config.from_hf({**model.to_hf(), "tie_word_embeddings": True})
    refuse(arguments(source, run), other, "of another model", "tie_word_embeddings False")
    refuse(arguments(source, None), model, "beside --save", "qwen35-ckpt import")
    refuse(arguments(source, source / "run"), model, "--save lies in the Hugging Face folder")
    refuse(arguments("", run, source), model, "--load names a Hugging Face folder")
    refuse(arguments("Toy/Absent-1B", run), model, "`hf download Toy/Absent-1B`")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where imports would go, without importing."""
    import qwen35_mcore.training.checks.hf_start as module

    found: list[Path] = []
    monkeypatch.setattr(module._Import, "wait", lambda self: found.append(self.target))
    return found


def test_a_hub_id_in_the_local_cache(
    source: Path, tmp_path: Path, targets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    repo = tmp_path / "hub" / "models--Org--Toy-1B"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("0" * 40)
    shutil.copytree(source, repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    args = arguments("Org/Toy-1B", tmp_path / "run")
    assert model_of_start(["--pretrained-checkpoint", "Org/Toy-1B", "--lr", "1"])
    import_start(args, Qwen35Config.from_hf(source))
    assert targets[0].name.startswith("Toy-1B-")
    assert args.pretrained_checkpoint == str(targets[0])


@pytest.mark.parametrize("own_file_system", [True, False])
def test_it_lands_where_every_node_sees_it(
    own_file_system: bool,
    source: Path,
    tmp_path: Path,
    targets: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: own_file_system)
    import_start(arguments(source, tmp_path / "run"), Qwen35Config.from_hf(source))
    parent = tmp_path / "run" if own_file_system else tmp_path
    assert targets[0].parent == parent / "imported"
