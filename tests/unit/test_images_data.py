"""`qwen35 data images`: what lies in the folder it writes, and what it says about bad samples."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from qwen35_mcore.data.images.convert import ImagesReport, convert
from qwen35_mcore.errors import DataError
from tests.helpers.conversations import (
    ask,
    save_digit,
    write_conversations,
    write_digits,
)


def run(corpus: Path, output: Path, processor: Path, **options: Any) -> ImagesReport:
    return convert(inputs=[corpus], output_dir=output, processor=str(processor), **options)


def samples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By shard: the samples, each with its parts."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        parts: dict[str, dict[str, Any]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                parts.setdefault(key, {})[name] = file.read()
        found[path.name] = list(parts.values())
    return found


def test_what_is_stored(tmp_path: Path, processor: Path) -> None:
    corpus = write_digits(tmp_path / "data", 8)
    report = run(corpus, tmp_path / "out", processor, split="3,1,0")
    assert report.samples == {"train": 6, "val": 2}
    assert report.images == 2 * (1 + 2 + 3)
    stored = samples(tmp_path / "out")
    assert list(stored) == ["train-000000.tar", "val-000000.tar"]
    every = [sample for shard in stored.values() for sample in shard]
    [two] = [one for one in every if json.loads(one["json"])["source"] == f"{corpus}:2"]
    content = json.loads(two["json"])
    assert content["paths"] == {"0.png": "pictures/1.png", "1.png": "pictures/0.png"}
    assert content["messages"][0]["content"][0] == {"type": "image", "image": "0.png"}
    assert two["0.png"] == (tmp_path / "data/pictures/1.png").read_bytes()
    assert two["1.png"] == (tmp_path / "data/pictures/0.png").read_bytes()


def test_shards_are_closed_when_they_are_full(tmp_path: Path, processor: Path) -> None:
    import numpy as np
    import PIL.Image

    noise = np.random.default_rng(0).integers(0, 255, (512, 400, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "noise.png")  # 600 kB
    corpus = write_conversations(tmp_path / "c.jsonl", [ask(n, "noise.png") for n in range(4)])
    run(corpus, tmp_path / "out", processor, shard_mib=1)
    assert [len(shard) for shard in samples(tmp_path / "out").values()] == [2, 2]


def bad_corpus(folder: Path) -> Path:
    """Good samples, and one of every kind that cannot be used."""
    save_digit(folder / "good.png", 0)
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:-40])
    (folder / "text.png").write_text("no image")
    save_digit(folder / "long.png", 1, (64, 64))
    conversations = [
        ask(0, "good.png"),
        ask(1, "broken.png"),
        ask(2, "missing.png"),
        ask(3, "text.png"),
        ask(4, "long.png"),
        ask(5, "good.png")[:1],
        ask(6),
    ]
    corpus = write_conversations(folder / "c.jsonl", conversations, id=1)
    corpus.write_text(corpus.read_text() + "\n{}\n[\n")
    return corpus


BAD = {
    2: ("broken.png cannot be opened", "fix: replace or remove it"),
    3: ("missing.png cannot be read", "got: No such file or directory"),
    4: ("text.png cannot be opened", "got: cannot identify image file"),
    5: ("more tokens than a sequence holds", "allowed: up to 100"),
    6: ("there is no answer to train on", "at least one message of the role assistant"),
    9: ("has no key 'messages'", "with --json-key"),
    10: ("is not valid JSON", "one JSON object per line"),
}


def test_bad_samples_are_left_out_and_counted(
    tmp_path: Path, processor: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = bad_corpus(tmp_path)
    report = run(corpus, tmp_path / "out", processor, max_length=100, bad_samples="skip")
    assert (report.samples, report.left_out, report.blank_lines) == ({"train": 2}, len(BAD), 1)
    assert report.summary("out").endswith(
        "; left out: 7 bad samples, 1 blank lines, the key id of 7 lines"
    )
    warnings = capsys.readouterr().err.split("warning: a sample is left out: ")[1:]
    assert len(warnings) == len(BAD)
    for warning, (line, (what, hint)) in zip(warnings, BAD.items(), strict=True):
        assert f"{corpus}:{line}" in warning
        assert what in warning
        assert hint in warning


@pytest.mark.parametrize("line", BAD)
def test_a_bad_sample_is_an_error(tmp_path: Path, processor: Path, line: int) -> None:
    corpus = bad_corpus(tmp_path)
    corpus.write_text(corpus.read_text().splitlines()[line - 1] + "\n")
    with pytest.raises(DataError) as caught:
        run(corpus, tmp_path / "out", processor, max_length=100)
    assert BAD[line][0] in str(caught.value)
    assert f"{corpus}:1" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} & {"out", "out.partial"} == set()


def test_an_existing_folder_is_kept(tmp_path: Path, processor: Path) -> None:
    corpus = write_conversations(tmp_path / "c.jsonl", [ask(1), ask(2)])
    run(corpus, tmp_path / "out", processor)
    with pytest.raises(DataError, match="exists already"):
        run(corpus, tmp_path / "out", processor)
    write_conversations(corpus, [ask(3)])
    assert run(corpus, tmp_path / "out", processor, overwrite=True).samples == {"train": 1}
    assert not list(tmp_path.glob("out.*"))  # neither a part nor what was replaced
    assert len(samples(tmp_path / "out")["train-000000.tar"]) == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    with pytest.raises(DataError, match="is there and is no dataset"):
        run(corpus, other, processor, overwrite=True)
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(DataError, match="still writing or was killed"):
        run(corpus, tmp_path / "new", processor)
    run(corpus, tmp_path / "new", processor, overwrite=True)


@pytest.mark.parametrize("split", ["", "a", "0,0", "1,1,1,1", "1,-1", "nan"])
def test_impossible_splits(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match="--split must give the shares"):
        run(tmp_path / "c.jsonl", tmp_path / "out", tmp_path, split=split)


def test_a_split_without_samples(tmp_path: Path, processor: Path) -> None:
    corpus = write_conversations(tmp_path / "c.jsonl", [ask(1), ask(2)])
    with pytest.raises(DataError, match="not enough samples for the split val"):
        run(corpus, tmp_path / "out", processor, split="99,1")
    assert not (tmp_path / "out").exists()


def test_inputs_are_jsonl_files(tmp_path: Path, processor: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for given, said in ((tmp_path, "is a folder"), (tmp_path / "a.txt", "is no jsonl file")):
        with pytest.raises(DataError, match=said):
            run(given, tmp_path / "out", processor)


def test_images_below_another_folder(tmp_path: Path, processor: Path) -> None:
    save_digit(tmp_path / "elsewhere/1.webp", 1)
    corpus = write_conversations(tmp_path / "c.jsonl", [ask(1, "1.webp")])
    assert run(corpus, tmp_path / "out", processor, image_root=tmp_path / "elsewhere").images == 1
    [[sample]] = samples(tmp_path / "out").values()
    assert "0.webp" in sample
