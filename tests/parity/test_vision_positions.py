"""Positions of text, images and patches are transformers', exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import DataError
from qwen35_mcore.model.vision.grids import frame_lengths, patch_coordinates, position_taps
from qwen35_mcore.model.vision.rope import rope_index
from tests.helpers.kinds import examples
from tests.helpers.reference_model import vision_language_model
from tests.helpers.vision import (
    IMAGE,
    VIDEO,
    Grid,
    VisionBatch,
    row,
    token_types,
    vision_toy_config,
)


@st.composite
def rows_of_images(draw: st.DrawFn) -> tuple[list[Any], bool]:
    sides = st.integers(1, 4).map(lambda n: 2 * n)
    image = st.tuples(st.just(1), sides, sides)
    video = st.tuples(st.integers(1, 3), sides, sides)
    row = st.tuples(st.lists(image, max_size=3), st.lists(video, max_size=2))
    return draw(st.lists(row, min_size=1, max_size=3)), draw(st.booleans())


@examples(40)
@given(drawn=rows_of_images())
def test_positions_are_get_rope_index(
    drawn: tuple[list[Any], bool], reference_positions: Any
) -> None:
    images, padded = drawn
    config = vision_toy_config(moe=False)
    rows = [row(config, 450, *each, seed=number) for number, each in enumerate(images)]
    batch = VisionBatch(config, rows)
    tokens = batch.tokens[:, :-1]
    mask = None
    if padded:
        mask = torch.ones_like(tokens)
        mask[:, -7:] = 0
        mask[0, 0] = 0  # a token of text is in front of every image and video
    grids = {name: x for name, x in batch.images(0, len(rows)).items() if "grid" in name}
    expected = reference_positions(tokens, token_types(tokens), attention_mask=mask, **grids)[0]
    ours = rope_index(tokens, VisionConfig.of(config), attention_mask=mask, **grids)
    assert ours.dtype == expected.dtype
    assert torch.equal(ours, expected)
    if not padded:
        bounds = torch.arange(len(rows) + 1) * tokens.shape[1]
        one_row = tokens.reshape(1, -1)
        packed = rope_index(one_row, VisionConfig.of(config), **grids, cu_seqlens=bounds)
        assert torch.equal(packed.view_as(ours), expected)


@pytest.fixture(scope="module")
def reference_positions() -> Any:
    return vision_language_model(vision_toy_config(moe=False)).model.get_rope_index


@examples(40)
@given(
    grids=st.lists(st.tuples(st.integers(1, 3), *[st.integers(1, 30)] * 2), min_size=1, max_size=4)
)
def test_learned_positions_and_frames_are_transformers(grids: list[Grid]) -> None:
    from transformers import vision_utils

    vision = VisionConfig(out_hidden_size=8)
    grids = [(t, 2 * h, 2 * w) for t, h, w in grids]
    given = torch.tensor(grids)
    taps, weights = position_taps(grids, vision)
    expected = vision_utils.get_vision_interpolation_indices_and_weights(
        given, 48, align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(taps, expected[0])
    assert torch.equal(weights, expected[1])
    coordinates = torch.stack(patch_coordinates(grids, vision), dim=-1)
    assert torch.equal(coordinates, vision_utils.get_vision_position_ids(given, 2))
    bounds = torch.tensor([0, *frame_lengths(grids)]).cumsum(0)
    assert torch.equal(bounds, vision_utils.get_vision_cu_seqlens(given))


def test_neighbouring_images_without_text_between() -> None:
    """transformers' function fails on them; each begins where the one before ends."""
    vision = VisionConfig.of(vision_toy_config())
    tokens = torch.tensor([[1, *[IMAGE] * 6, 2]])
    positions = rope_index(tokens, vision, [(1, 2, 4), (1, 4, 4)])
    assert positions[0, 0].tolist() == [0, 1, 1, 3, 3, 3, 3, 5]
    assert positions[2, 0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]


@pytest.mark.parametrize(
    ("tokens", "images", "videos", "says"),
    [
        ([1, IMAGE, IMAGE, 2], [(1, 2, 2)], None, "2 tokens 250|1 tokens 250 without an image"),
        ([1, IMAGE, 2], [(1, 2, 4)], None, "a run of 1 tokens 250 for an image of 2"),
        ([1, IMAGE, 2], None, None, "1 tokens 250 without an image"),
        ([1, 2], [(1, 2, 2)], None, "1 images or frames of videos without tokens"),
        ([1, VIDEO, 2], None, [(2, 2, 2)], "1 images or frames of videos without tokens"),
        ([1, IMAGE, 2], [(1, 3, 2)], None, "cannot be merged"),
        ([1, IMAGE, 2], [(0, 2, 2)], None, "cannot be merged"),
    ],
)
def test_wrong_numbers_of_image_tokens_are_refused(
    tokens: list[int], images: Any, videos: Any, says: str
) -> None:
    vision = VisionConfig.of(vision_toy_config())
    with pytest.raises(DataError, match=says):
        rope_index(torch.tensor([tokens]), vision, images, videos)
