"""Data that cannot train a run: refused before any process group forms, and the advice works."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qwen35_mcore.data import tokenize
from tests.cli.test_pretrain_errors import error_of, flags
from tests.helpers.pretrain_runs import script_server, small_dataset
from tests.helpers.text_data import make_bpe

SHORT = ["--flavor", "tiny-dense", "--train-iters", "1", "--global-batch-size", "1"]


def evaluated(*more: str) -> list[str]:
    """A run with the evaluation that users get without a flag."""
    given = flags(*SHORT, *more)
    at = given.index("--eval-iters")
    return given[:at] + given[at + 2 :]


def without_data(*more: str) -> list[str]:
    given = flags(*SHORT, *more)
    at = given.index("--data-path")
    return given[:at] + given[at + 4 :]


@pytest.mark.parametrize("source", ["split", "train-data-path"])
def test_an_evaluation_without_data(source: str) -> None:
    arguments = evaluated("--split", "100,0,0")
    if source == "train-data-path":
        at = arguments.index("--data-path")
        arguments = [*arguments[:at], *arguments[at + 4 :], "--train-data-path", small_dataset()]
        at = arguments.index("--split")
        arguments = arguments[:at] + arguments[at + 2 :]
    message = error_of(arguments)
    assert "the run evaluates but has no validation data" in message
    assert "--eval-iters 100 every 1000 steps" in message
    assert "pass --eval-iters 0" in message
    script_server().run([*arguments, "--eval-iters", "0"])


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a dataset of a few sequences."""
    folder = tmp_path_factory.mktemp("validation")
    (folder / "a.txt").write_text("some text " * 30)
    tokenize(
        inputs=[folder / "a.txt"],
        output_prefix=folder / "x",
        tokenizer="byte",
        workers=1,
        quiet=True,
    )
    return str(folder / "x")


def test_whole_validation_sets(validation: str) -> None:
    sets = ["--train-data-path", small_dataset(), "--valid-data-path", validation]
    arguments = without_data(*sets, "--full-validation")
    assert "fix: pass --multiple-validation-sets as well" in error_of(arguments)
    run = script_server().run([*arguments, "--multiple-validation-sets"])
    assert "validation-0 loss" in run.output()


def test_whole_validation_sets_under_tensor_parallelism(validation: str) -> None:
    sets = ["--train-data-path", small_dataset(), "--valid-data-path", validation]
    tensor = ["--tensor-model-parallel-size", "2", "--micro-batch-size", "2"]
    whole = ["--global-batch-size", "2", "--full-validation", "--multiple-validation-sets"]
    arguments = without_data(*sets, *tensor, *whole)
    assert "2 sequences a microbatch of an evaluation" in error_of(arguments, 2)
    advised = ["--eval-micro-batch-size", "1"]
    assert "validation-0 loss" in script_server().run([*arguments, *advised], 2).output()


def test_ids_outside_the_vocabulary_without_a_sidecar(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{small_dataset()}{suffix}", f"{tmp_path}/foreign{suffix}")
    given = ["--data-path", f"{tmp_path}/foreign", "--tokenizer-type", "NullTokenizer"]
    small = ["--override", "vocab_size=100", "--vocab-size", "100"]
    message = error_of(flags(*SHORT, *given, *small))
    assert f"{tmp_path}/foreign.bin holds ids that the model does not have" in message
    assert "0 to 99" in message
    script_server().run(flags(*SHORT, *given, "--vocab-size", "257"))


def test_an_id_that_only_its_batch_shows(tmp_path: Path) -> None:
    """A sidecar may be wrong about its data."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{small_dataset()}{suffix}", f"{tmp_path}/x{suffix}")
    sidecar = tmp_path / "x.json"
    sidecar.write_text(sidecar.read_text().replace('"vocab_size": 257', '"vocab_size": 100'))
    given = ["--data-path", f"{tmp_path}/x", "--override", "vocab_size=100"]
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
    sidecar.write_text(sidecar.read_text().replace('"eod_id": 256', '"eod_id": 99'))
    run = script_server().start(flags(*SHORT, *given, *null))
    assert run.wait() == [2]
    assert "error: a batch holds an id that the model does not have" in run.output()
    assert "Traceback" not in run.output()


@pytest.mark.parametrize("flag", ["--data-cache-path", "--save", "--tensorboard-dir"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").touch()
    given = [flag, str(tmp_path / "file" / "x"), "--save-interval", "1"]
    given += ["--use-distributed-optimizer"]
    assert f"{flag} cannot be written to" in error_of(flags(*SHORT, *given))
    good = [str(tmp_path / "x") if word == given[1] else word for word in given]
    script_server().run(flags(*SHORT, *good))


def test_a_tokenizer_that_moved(tmp_path: Path) -> None:
    """A folder with data and tokenizer trains wherever it is; one without says who named it."""
    home = tmp_path / "data"
    make_bpe(home / "tok", eos_token="<|endoftext|>")
    text = tmp_path / "a.txt"
    text.write_text("some text " * 2000)
    tokenize(
        inputs=[text], output_prefix=home / "x", tokenizer=str(home / "tok"), workers=1, quiet=True
    )
    moved = home.rename(tmp_path / "moved")
    given = flags(*SHORT, "--data-path", str(moved / "x"), "--split", "1")
    script_server().run(given)
    (moved / "tok").rename(tmp_path / "tok")
    message = error_of(given)
    assert f"the tokenizer's folder does not exist (named by {moved / 'x.json'})" in message
    named = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "tok")]
    script_server().run([*given, *named])
    (moved / "tok").mkdir()
    message = error_of(given)
    assert f"the tokenizer could not be loaded (named by {moved / 'x.json'})" in message
