"""Samples that cannot be used end the run, or are left out with a warning."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from qwen35_mcore.data.images.chat import Chat, Encoded
from qwen35_mcore.errors import DataError
from tests.helpers.conversations import ask, save_digit, write_conversations, write_digits
from tests.helpers.image_loaders import keys, tower, training, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, processor: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_data(write_digits(folder, 8), folder / "out", processor)


def damaged(folder: Path, processor: Path) -> Path:
    """Six samples, of which one has a broken image, one none, one too many tokens, and one has a
    broken text."""
    for number in range(6):
        save_digit(folder / f"{number}.png", number)
    conversations = [ask(n, f"{n}.png", text="x" * (400 if n == 3 else 4)) for n in range(6)]
    out = write_data(
        write_conversations(folder / "c.jsonl", conversations), folder / "out", processor
    )
    [path] = out.glob("*.tar")
    shutil.copy(path, folder / "whole.tar")
    with tarfile.open(folder / "whole.tar") as whole, tarfile.open(path, "w") as tar:
        for member in whole:
            content = bytearray(whole.extractfile(member).read())  # type: ignore[union-attr]
            if member.name == "000000001.0.png":
                content[30:] = bytes(len(content) - 30)
            if member.name == "000000002.0.png":
                member.name = "000000002.9.png"
            if member.name == "000000005.json":
                content[:1] = b"x"
            with (folder / "content").open("wb+") as file:
                file.write(content)
                file.seek(0)
                tar.addfile(member, file)
    return out


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_bad_samples_of_a_run(
    tmp_path: Path, processor: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = damaged(tmp_path, processor)
    loader = training(data, processor, num_workers=workers, bad_samples="skip", packing=workers > 0)
    read = keys([next(loader) for _ in range(12)])
    assert len(set(read)) == 2
    said = capsys.readouterr().err
    for line, what in (
        (2, "the image 1.png cannot be opened"),
        (3, "the shard has no 0.png of the sample"),
        (4, "more tokens than a sequence holds\n  got: 4"),
    ):
        assert f"{tmp_path / 'c.jsonl'}:{line}" in said
        assert what in said
    assert "key 000000005: the text of a sample is damaged" in said
    assert said.count("warning: a sample of the training data is left out") == loader.left_out
    assert f", {loader.left_out} so far on this rank" in said
    strict = training(data, processor, num_workers=workers)
    with pytest.raises(DataError, match=r"c\.jsonl:[234] |key 0+5: ") as caught:
        [next(strict) for _ in range(12)]
    assert str(caught.value).endswith("or leave such samples out with --bad-samples skip")
    assert str(caught.value).count("\n") <= 4


def test_tokens_that_do_not_fit_the_images_are_a_bad_sample(
    data: Path, processor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Chat.encode

    def with_one_token_less(chat: Chat, *args: Any) -> Encoded:
        encoded = encode(chat, *args)
        image = encoded.tokens == tower(chat).image_token_id
        first = image & (image.cumsum(0) == 1)
        return encoded._replace(tokens=encoded.tokens.masked_fill(first, 0))

    monkeypatch.setattr(Chat, "encode", with_one_token_less)
    loader = training(data, processor)
    with pytest.raises(DataError, match=r"jsonl:\d+ .*other numbers of image tokens") as caught:
        [next(loader) for _ in range(8)]
    assert str(caught.value).endswith("or leave such samples out with --bad-samples skip")


def test_what_nobody_foresaw_ends_the_run(
    data: Path, processor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Energon leaves such samples out, and prints why between the lines of the log."""
    monkeypatch.setattr(Chat, "encode", lambda *_: {}["nothing"])
    with pytest.raises(KeyError, match="nothing"):
        next(training(data, processor, bad_samples="skip"))


def test_a_run_of_bad_samples_alone_ends(
    tmp_path: Path, processor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen35_mcore.data.images.samples._MOST_IN_A_ROW", 10)
    corpus = write_conversations(tmp_path / "c.jsonl", [ask(1), ask(2)])
    data = write_data(corpus, tmp_path / "out", processor)
    loader = training(data, processor, seq_length=8, bad_samples="skip")
    with pytest.raises(DataError, match="more tokens than a sequence holds"):
        next(loader)


def test_images_need_a_tower(data: Path, processor: Path) -> None:
    loader = training(data, processor, vision=None, rope_index=None)
    with pytest.raises(DataError, match="the model has no vision tower"):
        [next(loader) for _ in range(8)]
