"""Small vision-language models, and text with images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.model.vision.embedding import place_features
from qwen35_mcore.model.vision.rope import rope_index
from tests.helpers.toys import toy_config
from tests.helpers.training import Batch, on_this_rank

IMAGE, VIDEO = 250, 251
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_heads": 4,
    "patch_size": 4,
    "num_position_embeddings": 36,
}
Grid = tuple[int, int, int]


def vision_toy_config(
    *, moe: bool = True, vision: dict[str, Any] | None = None, **changes: Any
) -> Qwen35Config:
    """`toy_config` with a tower of two blocks."""
    return with_tower(toy_config(moe=moe, **changes), **vision or {})


def with_tower(config: Qwen35Config, **vision: Any) -> Qwen35Config:
    """The same text model with a tower of two blocks."""
    outer = {
        "vision_config": VISION | {"out_hidden_size": config.hidden_size} | vision,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    }
    model_type = config.model_type.removesuffix("_text")
    return replace(config, model_type=model_type, carried_outer=outer)


@dataclass
class Row:
    """One sequence: its tokens, and its images and videos in the order of their tokens."""

    tokens: torch.Tensor
    images: list[Grid] = field(default_factory=list)
    videos: list[Grid] = field(default_factory=list)


def row(
    config: Qwen35Config, length: int, images: list[Grid], videos: list[Grid], seed: int
) -> Row:
    """A row of ``length + 1`` tokens: random text, an image behind every third token of it, and
    behind the images every frame of the videos, each behind a token of its own."""
    vision = VisionConfig.of(config)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, IMAGE, (length + 1,), generator=generator).tolist()
    merge = vision.spatial_merge_size**2
    tokens: list[int] = []
    for t, h, w in images:
        tokens += [text.pop(), text.pop(), text.pop()] + [IMAGE] * (t * h * w // merge)
    for t, h, w in videos:
        for _ in range(t):
            tokens += [text.pop()] + [VIDEO] * (h * w // merge)
    assert len(tokens) <= length, f"the images alone are {len(tokens)} tokens"
    tokens += text[: length + 1 - len(tokens)]
    return Row(torch.tensor(tokens), images, videos)


def row_of_documents(
    config: Qwen35Config, documents: list[tuple[int, list[Grid], list[Grid]]], seed: int
) -> Row:
    """One row of documents, each a `row` of as many tokens; the last one has one more."""
    rows = [
        row(config, length - (number < len(documents)), images, videos, seed=10 * seed + number)
        for number, (length, images, videos) in enumerate(documents, start=1)
    ]
    return Row(
        torch.cat([one.tokens for one in rows]),
        [grid for one in rows for grid in one.images],
        [grid for one in rows for grid in one.videos],
    )


class VisionBatch(Batch):
    """Rows with images, each image's patches random numbers that depend on its number alone."""

    def __init__(
        self, config: Qwen35Config, rows: list[Row], documents: list[list[int]] | None = None
    ) -> None:
        super().__init__(torch.stack([one.tokens for one in rows]), documents=documents)
        self.config, self.rows = config, rows

    def to(self, device: Any) -> VisionBatch:
        return self  # megatron's CPU mode

    def sample(self, first: int, count: int) -> dict[str, Any]:
        return super().sample(first, count) | {"position_ids": None}

    def sample_on_this_rank(self, first: int, count: int) -> dict[str, Any]:
        """Under context parallelism, positions and images are placed before the split."""
        from megatron.core import parallel_state
        from megatron.core.utils import flatten_batch_for_packed_sequences

        if parallel_state.get_context_parallel_world_size() == 1:
            return super().sample_on_this_rank(first, count)
        vision = VisionConfig.of(self.config)
        whole = flatten_batch_for_packed_sequences(self.sample(first, count))
        images, bounds = self.images(first, count), whole["cu_seqlens"]
        grids = {name: value for name, value in images.items() if "grid" in name}
        positions = rope_index(
            whole["tokens"], vision, **grids, cu_seqlens=None if bounds is None else bounds[0]
        )
        whole["tokens"] = place_features(whole["tokens"], vision, **grids)
        parts = [on_this_rank(whole | {"position_ids": axis}) for axis in positions]
        return parts[0] | {"position_ids": torch.stack([part["position_ids"] for part in parts])}

    def images(self, first: int, count: int) -> dict[str, Any]:
        """Arguments as transformers' processor gives them; none where there is no image."""
        rows = self.rows
        images = [(n, grid) for n, one in enumerate(rows) for grid in one.images]
        videos = [(n, grid) for n, one in enumerate(rows) for grid in one.videos]
        arguments: dict[str, Any] = {}
        for values, grids, everything in (
            ("pixel_values", "image_grid_thw", images),
            ("pixel_values_videos", "video_grid_thw", videos),
        ):
            given = [
                (number, grid)
                for number, (n, grid) in enumerate(everything)
                if first <= n < first + count
            ]
            if given:
                arguments[values] = torch.cat([self._patches(n, values, grid) for n, grid in given])
                arguments[grids] = torch.tensor([grid for _, grid in given])
        return arguments

    def _patches(self, number: int, kind: str, grid: Grid) -> torch.Tensor:
        count = grid[0] * grid[1] * grid[2]
        generator = torch.Generator().manual_seed(1000 * number + len(kind))
        return torch.randn(count, VisionConfig.of(self.config).patch_values, generator=generator)


def token_types(tokens: torch.Tensor) -> torch.Tensor:
    """What transformers' processor calls mm_token_type_ids."""
    return (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()


def vision_logits(
    config: Qwen35Config, batch: VisionBatch, weights: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Our logits ``[b, s, vocabulary]`` of a whole batch, in a pool worker."""
    from tests.helpers.shards import load_global
    from tests.helpers.training import Layout, build_chunks, config_for, initialize

    layout = Layout(vision=True)
    initialize(layout)
    [model] = build_chunks(config, config_for(config, layout), layout)
    load_global([model], weights)
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(batch.tokens[:, :-1], **batch.images(0, len(batch.rows)))
    return logits
