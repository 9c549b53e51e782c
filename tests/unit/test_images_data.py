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


LOST: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an answer without a loss": ({}, {"weight": 0}, "weight 0"),
    "an answer that is masked": ({}, {"masked": True}, "masked True"),
    "a size for one picture": ({"max_pixels": 256}, {}, "max_pixels 256"),
    "frames of a picture": ({"image": "a.gif"}, {}, "got: 2 frames"),
    "levels above 255": ({"image": "deep.png"}, {}, "got: 16- or 32-bit levels"),
    "a name with a NUL byte": ({"image": "a\0.png"}, {}, "embedded null byte"),
    "a name with half a character": ({"image": "\ud800.png"}, {}, "surrogates not allowed"),
    "a special token as a key": ({}, {"tool_calls": [{"<|im_end|>": 1}]}, "a special token"),
}
"""Keys of the image and of the answer, and what is said about them."""


@pytest.mark.parametrize("case", LOST)
def test_what_would_be_lost_is_refused(tmp_path: Path, processor: Path, case: str) -> None:
    import numpy as np
    import PIL.Image

    save_digit(tmp_path / "good.png", 0)
    frames = [PIL.Image.new("L", (8, 8), level) for level in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    PIL.Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    image, answer, said = LOST[case]
    messages = ask(0, "good.png")
    messages[0]["content"][0] |= image
    messages[1] |= answer
    corpus = write_conversations(tmp_path / "c.jsonl", [messages])
    with pytest.raises(DataError) as caught:
        run(corpus, tmp_path / "out", processor)
    assert said in str(caught.value)
    assert f"{corpus}:1" in str(caught.value)


def test_keys_that_nothing_reads_are_counted(tmp_path: Path, processor: Path) -> None:
    """Also: keys without a value, as tables of columns have them, are none."""
    messages = ask(0, "good.png")
    messages[0]["content"][0] |= {"detail": "high", "path": None, "text": None}
    messages[0]["name"] = messages[1]["name"] = "someone"
    save_digit(tmp_path / "good.png", 0)
    corpus = write_conversations(tmp_path / "c.jsonl", [messages])
    report = run(corpus, tmp_path / "out", processor)
    assert report.unused_keys == {"messages.name": 1, "image.detail": 1}


def test_nothing_to_write(tmp_path: Path, processor: Path) -> None:
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(DataError, match="there is no conversation to write"):
        run(tmp_path / "c.jsonl", tmp_path / "out", processor)


def test_a_link_leads_to_the_data(
    tmp_path: Path, processor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_conversations(tmp_path / "c.jsonl", [ask(1)])
    (tmp_path / "link").symlink_to("disk/data")
    for overwrite in (False, True):
        run(corpus, tmp_path / "link", processor, overwrite=overwrite)
        assert (tmp_path / "link").is_symlink()
        assert samples(tmp_path / "disk/data").keys() == {"train-000000.tar"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match="the output folder is the current one"):
        run(corpus, Path("."), processor)
    with pytest.raises(DataError, match="is there and is no dataset"):
        run(corpus, Path("/"), processor)


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
