"""The vision-language model refuses what does not fit together, and leaves frozen parts alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.model.vision.freeze import freeze, part_of
from tests.helpers.distributed import WorkerPool
from tests.helpers.training import Layout
from tests.helpers.vision import IMAGE, VIDEO, VisionBatch, row, vision_toy_config


def test_the_model_refuses_what_does_not_fit_together(pool: WorkerPool) -> None:
    assert pool.run(refusals, 1) == [[
        "the text has other numbers of image tokens than the images make",
        "the text has other numbers of video tokens than the videos make",
        "the images have other patches than their grids say",
        "the images have other patches than their grids say",
        "training a vision-language model with MTP needs labels",
        "a part of a sequence does not say where its images are",
        "a part of a sequence does not say where its images are",
    ]]  # fmt: skip


def refusals() -> list[str]:
    """What is said of each wrong input, in a pool worker."""
    from qwen35_mcore.errors import Qwen35Error
    from tests.helpers.training import build_chunks, config_for, initialize

    config = vision_toy_config(mtp_num_hidden_layers=1)
    layout = Layout(vision=True)
    initialize(layout)
    [model] = build_chunks(config, config_for(config, layout), layout)
    tokens, positions = torch.tensor([[1, IMAGE, 2, VIDEO, 3]]), torch.arange(5)[None]
    patches, grid = torch.zeros(4, 96), torch.tensor([(1, 2, 2)])
    good: dict[str, Any] = {
        "pixel_values": patches,
        "image_grid_thw": grid,
        "pixel_values_videos": patches,
        "video_grid_thw": grid,
        "labels": tokens,
    }
    assert model(tokens, positions, **good).isfinite().all()
    said = []
    for ranks, wrong in (
        (1, {"image_grid_thw": torch.tensor([(1, 2, 4)])}),
        (1, {"pixel_values_videos": None, "video_grid_thw": None}),
        (1, {"pixel_values": patches[:3]}),
        (1, {"pixel_values": patches[:, :95], "pixel_values_videos": patches[:, :95]}),
        (1, {"labels": None}),
        (2, {}),
        (2, {"input_ids": tokens.clamp(max=9), "position_ids": None}),
    ):
        model.config.context_parallel_size = ranks  # all that is looked at before the refusal
        with pytest.raises(Qwen35Error) as caught:
            model(**{"input_ids": tokens, "position_ids": positions} | good | wrong)
        said.append(caught.value.what)
    return said


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    "parts", [("language",), ("vision",), ("merger", "language"), ("vision", "merger")]
)
@pytest.mark.exhaustive
def test_frozen_parts_have_neither_gradients_nor_state(
    pool: WorkerPool, parts: Any, stages: int
) -> None:
    """With two stages and a frozen language model the second stage trains nothing."""
    layout = Layout(vision=True, pp=stages)
    answers = pool.run(parts_that_train, stages, parts=parts, layout=layout)
    expected = {"language", "vision", "merger"} - set(parts)
    assert set.union(*(trained for trained, _ in answers)) == expected
    assert set.union(*(moved for _, moved in answers)) == expected


def parts_that_train(parts: Any, layout: Layout) -> tuple[set[str], set[str]]:
    """Parts that have main gradients, and those that a step changes; in a pool worker."""
    from tests.helpers.training import (
        Result,
        build_chunks,
        config_for,
        forward_backward,
        initialize,
        wrap,
    )  # fmt: skip

    model_config = vision_toy_config()
    initialize(layout)
    config = config_for(model_config, layout)
    [model] = build_chunks(model_config, config, layout)
    freeze(model, parts)
    [wrapped], optimizer = wrap([model], config, layout, lr=1e-3)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    batch = VisionBatch(model_config, [row(model_config, 64, [(1, 4, 4)], [], seed=0)])
    forward_backward(batch, [wrapped], config, len(batch.rows), Result(), 0)
    optimizer.step()
    named = dict(model.named_parameters())
    return (
        {part_of(name) for name, value in named.items() if hasattr(value, "main_grad")},
        {part_of(name) for name, value in named.items() if not torch.equal(value, before[name])},
    )


def test_what_cannot_be_frozen_is_refused() -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="language, vision, merger"):
        freeze(model, ["tower"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="all parts"):
        freeze(model, ["language", "vision", "merger"])
