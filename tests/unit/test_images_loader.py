"""Microbatches from shards: rows, packing, masks and positions; order, restart and bad samples."""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35_mcore.data.images.chat import MEDIA, Encoded, load_chat, open_image
from qwen35_mcore.data.images.loader import ImageLoader, check_folder
from qwen35_mcore.errors import DataError
from qwen35_mcore.model.vision.rope import rope_index
from tests.helpers.conversations import ask, make_processor, write_conversations, write_digits
from tests.helpers.image_loaders import (
    ROWS,
    SEQ,
    documents,
    keys,
    loaders,
    tower,
    training,
    write_data,
)

COUNT = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, processor: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_data(write_digits(folder, COUNT), folder / "out", processor, split="20,4,0")


def stored(data: Path, processor: Path, part: str = "train") -> dict[tuple[int, ...], Encoded]:
    """Every conversation of a split as `Chat.encode` makes it, by its tokens."""
    chat, found = load_chat(str(processor)), {}
    for path in data.glob(f"{part}-*.tar"):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in (name for name in files if name.endswith(".json")):
            key, content = name.partition(".")[0], json.loads(files[name])
            images = {n: open_image(files[f"{key}.{n}"], n)[0] for n in content["paths"]}
            encoded = chat.encode(content["messages"], images)
            found[tuple(encoded.tokens.tolist())] = encoded
    return found


def epoch(loader: ImageLoader, samples: int) -> list[dict[str, Any]]:
    batches: list[dict[str, Any]] = []
    while len(keys(batches)) < samples:
        batches.append(next(loader))
    return batches


@pytest.mark.parametrize("packing", [False, True], ids=["rows of one document", "packed"])
def test_rows_hold_what_the_processor_makes(data: Path, processor: Path, packing: bool) -> None:
    """Tokens, labels, answers, positions and patches of every document are its own."""
    expected, vision = stored(data, processor), tower(load_chat(str(processor)))
    batches = epoch(training(data, processor, packing=packing), 2 * len(expected))
    assert set(keys(batches)) == expected.keys()
    for batch in batches:
        media: dict[str, list[torch.Tensor]] = {key: [] for key in MEDIA}
        for row, place in documents(batch):
            encoded = expected[tuple(batch["tokens"][row, place].tolist())]
            labels = batch["labels"][row, place]
            assert torch.equal(labels[:-1], encoded.tokens[1:])
            counted = batch["loss_mask"][row, place]
            assert torch.equal(counted[:-1].bool(), encoded.answers[1:])
            assert counted[-1] == 0
            grids = [encoded.media.get(key) for key in ("image_grid_thw", "video_grid_thw")]
            positions = rope_index(encoded.tokens[None], vision, *grids)[:, 0]
            assert torch.equal(batch["position_ids"][:, row, place], positions)
            for key, value in encoded.media.items():
                media[key].append(value)
        for key, values in media.items():
            if values:
                assert torch.equal(batch[key], torch.cat(values))
            else:
                assert batch[key] is None
        padding = batch["padding_mask"]
        assert not batch["loss_mask"][padding].any()
        assert batch["attention_mask"] is None
        shapes = {key: tuple(batch[key].shape) for key in ("tokens", "labels", "position_ids")}
        assert shapes == {
            "tokens": (ROWS, SEQ),
            "labels": (ROWS, SEQ),
            "position_ids": (3, ROWS, SEQ),
        }
        assert (batch["cu_seqlens"] is not None) == packing


def test_packed_rows_are_what_megatron_takes(data: Path, processor: Path) -> None:
    """Bounds from 0 to the end of the row, of which megatron makes one sequence."""
    from qwen35_mcore.mcore.imports import flatten_batch_for_packed_sequences

    batch = next(training(data, processor, packing=True))
    bounds, places = batch["cu_seqlens"], documents(batch)
    assert bounds.dtype == batch["max_seqlen"].dtype == torch.int32
    assert max(Counter(row for row, _ in places).values()) > 1
    assert batch["max_seqlen"].tolist() == [int(row.diff().max()) for row in bounds]
    assert bounds[:, 0].tolist() == [0] * ROWS
    assert bounds[:, -1].tolist() == [SEQ] * ROWS
    flat = flatten_batch_for_packed_sequences({**batch, "position_ids": None})
    begins = {row * SEQ + place.start for row, place in places}
    assert begins <= set(flat["cu_seqlens"][0].tolist())
    assert flat["cu_seqlens"][0, -1] == ROWS * SEQ


def test_text_models_count_positions_in_one_axis(tmp_path: Path) -> None:
    folder = make_processor(tmp_path / "processor", images=False)
    corpus = write_conversations(tmp_path / "c.jsonl", [ask(n) for n in range(4)])
    data = write_data(corpus, tmp_path / "out", folder)
    options = {"vision": None, "rope_index": None, "packing": True, "packing_buffer": 4}
    batch = next(training(data, folder, **options))
    assert batch["position_ids"].shape == (ROWS, SEQ)
    for row, place in documents(batch):
        assert batch["position_ids"][row, place].tolist() == list(range(place.stop - place.start))
    assert all(batch[key] is None for key in MEDIA)


@pytest.mark.parametrize(
    ("workers", "packing"),
    [(0, False), (0, True), (2, True), pytest.param(2, False, marks=pytest.mark.exhaustive)],
)
def test_a_restart_continues_with_the_next_sample(
    data: Path, processor: Path, workers: int, packing: bool
) -> None:
    options = {"num_workers": workers, "packing": packing}
    loader = training(data, processor, **options)
    for _ in range(3):
        next(loader)
    states, batches = [], []
    for _ in range(6):
        states.append(loader.save_state())
        batches.append(next(loader))
    for done in (0, 4):
        again = training(data, processor, **options)
        again.restore_state(states[done])
        assert keys([next(again) for _ in batches[done:]]) == keys(batches[done:])


def test_before_the_first_sample_there_is_a_state(data: Path, processor: Path) -> None:
    first, second = training(data, processor), training(data, processor)
    second.restore_state(first.save_state())
    assert keys([next(first)]) == keys([next(second)])


def test_the_seed_gives_the_order(data: Path, processor: Path) -> None:
    orders = [
        keys([next(loader) for _ in range(8)])
        for loader in (training(data, processor, seed=seed) for seed in (1, 1, 2))
    ]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_ranks_have_no_sample_in_common(data: Path, processor: Path, workers: int) -> None:
    every = stored(data, processor).keys()
    read = [
        set(keys([next(loader) for _ in range(8)]))
        for loader in (
            training(data, processor, dp_rank=rank, dp_size=2, num_workers=workers)
            for rank in range(2)
        )
    ]
    assert read[0].isdisjoint(read[1])
    assert read[0] | read[1] == every


@pytest.mark.parametrize("end", ["closed", "garbage"])
def test_workers_end_with_their_loader(
    data: Path, processor: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Told to, not killed after a time limit."""
    others = set(multiprocessing.active_children())
    loader = training(data, processor, num_workers=1)
    next(loader)
    [worker] = set(multiprocessing.active_children()) - others
    monkeypatch.setattr(type(worker), "terminate", lambda worker: None)
    if end == "closed":
        loader.close()
    del loader
    gc.collect()
    worker.join(timeout=300)
    assert not worker.is_alive()


def test_validation_begins_again(data: Path, processor: Path) -> None:
    """Every sample once, padding in the rows that are left, and then the first one."""
    _, loader = loaders(data, processor, valid_micro_batch_size=3)
    assert loader is not None
    batches = [next(loader) for _ in range(4)]
    order = keys(batches)
    assert set(order[:4]) == stored(data, processor, "val").keys()
    assert order[4:] == order[:4]
    assert [len(keys([batch])) for batch in batches] == [3, 1, 3, 1]
    assert batches[1]["padding_mask"][1:].all()


def test_no_validation_data(tmp_path: Path, processor: Path) -> None:
    corpus = write_conversations(tmp_path / "c.jsonl", [ask(1), ask(2)])
    data = write_data(corpus, tmp_path / "out", processor)
    assert loaders(data, processor)[1] is None
    with pytest.raises(DataError, match="fewer samples of the split val"):
        loaders(data, processor, valid=data)


def test_a_blend_of_folders(tmp_path: Path, data: Path, processor: Path) -> None:
    """Energon's own description of several folders and their weights."""
    corpus = write_conversations(tmp_path / "c.jsonl", [ask(n, text="Other.") for n in range(4)])
    other = write_data(corpus, tmp_path / "other", processor)
    (tmp_path / "blend.yaml").write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        f"      - {{path: {data}, weight: 1}}\n      - {{path: {other}, weight: 1}}\n"
    )
    loader, none = loaders(tmp_path / "blend.yaml", processor)
    assert none is None
    read = set(keys([next(loader) for _ in range(16)]))
    assert read & stored(data, processor).keys()
    assert read & stored(other, processor).keys()


# what cannot be read


def test_a_position_of_other_settings(data: Path, processor: Path) -> None:
    state = training(data, processor).save_state()
    for change, said in (
        ({"seed": 2}, "seed 2"),
        ({"num_workers": 1}, "workers 1"),
        ({"dp_size": 2}, "data-parallel size 2"),
        ({"micro_batch_size": 4}, "micro-batch size 4"),
        ({"packing": True}, "packing True"),
    ):
        with pytest.raises(DataError, match="belongs to other settings") as caught:
            training(data, processor, **change).restore_state(state)
        assert f"got: {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": "nowhere"}, "is no dataset of conversations with images"),
        ({"dp_size": 12, "num_workers": 2}, "got: 20 samples, 24 data-parallel ranks x workers"),
    ],
)
def test_folders_that_cannot_be_read(
    data: Path, processor: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError) as caught:
        training(data, processor, **options)
    assert said in str(caught.value)


DAMAGES: dict[str, tuple[str, Any]] = {
    "an empty index": (".nv-meta/.info.json", b""),
    "an index of another form": (".nv-meta/.info.json", b"[1]"),
    "an index that is no text": (".nv-meta/.info.json", b"{]\xff"),
    "no splits": (".nv-meta/split.yaml", None),
    "no shard": ("train-000000.tar", None),
    "an empty shard": ("train-000000.tar", b""),
    "half a shard": ("train-000000.tar", 0.5),
    "no index of a shard": ("train-000000.tar.idx", None),
}
"""A file of the folder, and its new content: none, or a part of the old one."""


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_known_at_the_start(data: Path, tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    name, content = DAMAGES[case]
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if content is not None:
        part = whole[: int(len(whole) * content)] if isinstance(content, float) else content
        (folder / name).write_bytes(part)
    with pytest.raises(DataError, match="is damaged") as caught:
        check_folder(folder, "train", 1)
    assert "fix: copy it again, or make it with" in str(caught.value)


@pytest.mark.parametrize("weight", ["-1", "0", ".nan", ".inf", "abc", "true"])
def test_weights_of_a_blend(tmp_path: Path, weight: str) -> None:
    blend = tmp_path / "blend.yaml"
    blend.write_text(f"splits: {{train: {{blend: [{{path: a, weight: {weight}}}]}}}}")
    with pytest.raises(DataError, match="has a weight that is not a positive number"):
        check_folder(blend, "train", 1)
    blend.write_text("splits: {train: {blend: [{path: a, weight: 1}, {path: b, weight: 0.5}]}}")
    assert check_folder(blend, "train", 1) == blend
