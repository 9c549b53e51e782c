"""The picture of a plan: what is on it, and that it is written whole or not at all."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.candidate import Candidate
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.picture import draw
from qwen35_mcore.planner.prediction import Prediction, predict
from tests.unit.test_planner_search import job_of


def plan(pp: int, vpp: int, microbatches: int, *, flavor: str = "2b") -> Prediction:
    job = replace(job_of(flavor, pp, microbatches), headroom_bytes=2 * GIB)
    return predict(job, Candidate(pp=pp, vpp=vpp))


def texts(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return [
        "".join(one.itertext()).strip() for one in root.iter("{http://www.w3.org/2000/svg}text")
    ]


def test_png_is_an_image_of_the_size_that_the_ranks_need(tmp_path: Path) -> None:
    sizes = []
    for pp in (2, 4):
        draw(plan(pp, 1, 4), tmp_path / "plan.png")
        header = (tmp_path / "plan.png").read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        sizes.append(struct.unpack(">II", header[16:]))
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1]


def test_a_short_schedule_is_drawn_whole(tmp_path: Path) -> None:
    drawn = plan(3, 2, 6)
    draw(drawn, tmp_path / "plan.svg")
    words = texts(tmp_path / "plan.svg")
    assert "2b on 3 h100-80g (predicted)" in words
    assert drawn.pipeline_layout in words
    assert any("6 microbatches" in word and "interleaved" in word for word in words)
    assert {f"forward, chunk {chunk}" for chunk in (0, 1)} <= set(words)
    assert "limit 77.6 GiB, 2.0 below the card's" in words
    assert any(f"step {drawn.step_s:.2f} s" in word for word in words)
    for rank, held in enumerate(drawn.memory()):
        busy = drawn.simulation.busy_s[rank] + drawn.after_s
        assert f"rank {rank} · {busy / drawn.step_s:.0%} busy" in words
        assert f"{held.total / GIB:.1f}" in words
    # every stage runs every microbatch forward and backward, and the passes are long enough to say
    assert all(words.count(str(micro)) >= 2 * 6 for micro in range(1, 6))


def test_the_even_split_is_named_beside_the_choice(tmp_path: Path) -> None:
    full = Candidate(pp=4, ep=4, micro_batch_size=8, recompute="full")
    free, tight = plan(4, 1, 16), predict(job_of("35b-a3b", 16, 512), full)
    assert free.even_split_step_s is not None
    assert tight.splits.even() is not None
    assert tight.even_split_step_s is None
    for drawn, words in (
        (free, f"split evenly {free.even_split_step_s:.2f} s"),
        (tight, "the even split does not fit"),
    ):
        draw(drawn, tmp_path / "plan.svg")
        assert any(words in text for text in texts(tmp_path / "plan.svg"))


def test_drawing_twice_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        draw(plan(2, 1, 4), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.svg", "two.svg"]


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    for name in ("plan.jpg", "plan"):
        with pytest.raises(PlanError, match=r"no known format(.|\n)*fix: name it .*/plan\.svg"):
            draw(plan(2, 1, 4), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlanError, match="pip install matplotlib"):
        draw(plan(2, 1, 4), tmp_path / "plan.png")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.svg").mkdir()
    for target, reason in (
        (tmp_path / "file" / "plan.png", f"{tmp_path / 'file'} is no folder"),
        (tmp_path / ("x" * 300 + ".svg"), "File name too long"),
        (tmp_path / ("x" * 300) / "plan.svg", "File name too long"),
        (tmp_path / "folder.svg", "it is a folder"),
    ):
        with pytest.raises(PlanError, match="cannot write the picture") as caught:
            draw(plan(2, 1, 4), target)
        assert f"got: {target}: {reason}\n  fix: choose a folder" in str(caught.value)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"<svg")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(PlanError, match="No space left on device"):
        draw(plan(2, 1, 4), tmp_path / "plan.svg")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    draw(plan(2, 1, 4), tmp_path / "plans" / "here" / "plan.svg")
    assert [path.name for path in (tmp_path / "plans" / "here").iterdir()] == ["plan.svg"]


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, qwen35_mcore.planner.picture; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
