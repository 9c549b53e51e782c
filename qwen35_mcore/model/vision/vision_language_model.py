"""The language model with the vision tower in front."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import ConfigError, DataError
from qwen35_mcore.mcore.imports import TransformerConfig
from qwen35_mcore.model.gpt_model import Qwen35Model
from qwen35_mcore.model.vision.embedding import WordAndImageEmbedding, place_features
from qwen35_mcore.model.vision.grids import Grid, Grids, read_grids
from qwen35_mcore.model.vision.rope import mrope_angles, rope_index
from qwen35_mcore.model.vision.tower import VisionModel


class Qwen35VisionLanguageModel(Qwen35Model):
    """transformers' ``Qwen3_5ForConditionalGeneration`` (dense and MoE) of Megatron's layers.

    The first pipeline stage holds the tower as ``vision_model``. A batch without images runs one
    block of empty patches through a tower that is trained, and uses nothing of it: its gradients
    are zero then, and no rank waits for another's.

    Args:
        model_config: has the tower's description.
        spec_provider: what the tower's layers are made of.
        arguments: of `Qwen35Model`.

    Raises:
        ConfigError: the description contradicts the language model, or the layout is one that the
            tower's outputs do not reach.
    """

    word_embedding = WordAndImageEmbedding

    def __init__(
        self,
        config: TransformerConfig,
        *,
        model_config: Qwen35Config,
        spec_provider: Any,
        **arguments: Any,
    ) -> None:
        vision = VisionConfig.of(model_config)
        check_vision_run(config)
        # the fused kernels take one angle a position, equal in every row and packed document
        config.apply_rope_fusion = False
        super().__init__(config=config, **arguments)
        self.vision = vision
        self.rope_parameters = model_config.rope_parameters
        self.vision_model = (
            VisionModel(vision, config, spec_provider, self.pg_collection)
            if self.pre_process
            else None
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_grid_thw: Grids = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Grids = None,
        **arguments: Any,
    ) -> Tensor:
        """Logits or losses, as of the language model.

        Every pipeline stage takes the tokens and the grids, or the positions; the first takes all.
        A context-parallel rank takes all images, and its part of what `place_features` and
        `rope_index` made of the whole sequences.

        Args:
            input_ids: ``[b, s]`` int64, with an image token for each of the merger's outputs; under
                context parallelism of `place_features`.
            position_ids: ``[3, b, s]`` of `rope_index`, or ``[b, s]`` for text; None: `rope_index`
                of the tokens, which the host computes.
            pixel_values, pixel_values_videos: patches ``[n, patch_values]`` of all images, and of
                all videos, in the order of their tokens; as transformers' processor gives them.
            image_grid_thw, video_grid_thw: their grids, ``[images, 3]`` int64.
            arguments: of megatron's ``GPTModel.forward``.

        Raises:
            DataError: tokens, patches and grids do not fit together.
            ConfigError: packed documents under context parallelism.
        """
        if self.config.context_parallel_size > 1:
            self._check_part(input_ids, position_ids, arguments.get("packed_seq_params"))
        if position_ids is None:
            position_ids = rope_index(input_ids, self.vision, image_grid_thw, video_grid_thw)
        if position_ids.dim() == 2:
            position_ids = position_ids.expand(3, -1, -1)
        if self.vision_model is None:
            return super().forward(input_ids, position_ids, attention_mask, **arguments)
        if self.config.context_parallel_size == 1:
            input_ids = place_features(input_ids, self.vision, image_grid_thw, video_grid_thw)
        grids = [
            grid
            for grid_thw in (image_grid_thw, video_grid_thw)
            for grid in read_grids(grid_thw, self.vision)
        ]
        words = self.embedding.word_embeddings
        words.features = self._features(
            self.vision_model, [pixel_values, pixel_values_videos], grids
        )
        try:
            return super().forward(input_ids, position_ids, attention_mask, **arguments)
        finally:
            words.features = None

    def _check_part(self, ids: Tensor, positions: Tensor | None, packed: Any) -> None:
        if packed is not None:
            raise ConfigError(
                "packed documents with images are not split over context-parallel ranks",
                got=f"context_parallel_size={self.config.context_parallel_size}",
                fix="pad every document to a row of its own, or use no context parallelism",
            )
        kinds = (self.vision.image_token_id, self.vision.video_token_id)
        if positions is None or any(bool((ids == kind).any()) for kind in kinds):
            raise DataError(
                "a part of a sequence does not say where its images are",
                got="no positions" if positions is None else "image tokens",
                fix="split what place_features and rope_index make of whole sequences",
            )

    def _features(
        self, tower: VisionModel, pixels: list[Tensor | None], grids: list[Grid]
    ) -> Tensor | None:
        """The tower's outputs ``[features, hidden]``; None where nothing asks for them."""
        given = [each for each in pixels if each is not None]
        if not (given or grids):
            trained = any(parameter.requires_grad for parameter in tower.parameters())
            if not (trained and torch.is_grad_enabled()):
                return None
            side = self.vision.spatial_merge_size
            given = [torch.zeros(side**2, self.vision.patch_values)]
            grids = [(1, side, side)]
        patches = torch.cat(given) if given else torch.empty(0, self.vision.patch_values)
        features: Tensor = tower(patches, grids)
        return features

    def _preprocess(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._preprocess(*args, **kwargs)
        section = self.rope_parameters.mrope_section
        assert section is not None
        # megatron's angles are positions times frequencies, so position 1 has the frequencies
        at_one = self.rotary_pos_emb(2, packed_seq=True)  # whole, not a context-parallel part
        at_one = at_one[0] if isinstance(at_one, tuple) else at_one  # YaRN's come with a factor
        half = at_one.shape[-1] // 2
        angles = mrope_angles(kwargs["position_ids"], at_one[1, 0, 0, :half], section)
        return (prepared[0], angles, *prepared[2:])

    def _postprocess(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs["labels"] is None and self.mtp_process and self.vision_model is not None:
            # megatron derives MTP's labels from the ids then
            if self.training:
                raise ConfigError(
                    "training a vision-language model with MTP needs labels", got="labels=None"
                )
            kwargs["input_ids"] = kwargs["input_ids"].clamp(min=0)
        return super()._postprocess(*args, **kwargs)


def check_vision_run(config: Any) -> None:
    """Refuse what the tower's outputs do not reach, or what was not proven with them.

    Args:
        config: the TransformerConfig, or the arguments that it will be made of.

    Raises:
        ConfigError: with the first of it.
    """
    pipeline, mtp = config.pipeline_model_parallel_size, config.mtp_num_layers
    for runs, got, why, fix in (
        (
            pipeline == 1 or not mtp,
            f"pipeline_model_parallel_size={pipeline}, mtp_num_layers={mtp}",
            "MTP embeds the images that follow: the tower's outputs stay on the first pipeline "
            "stage, and MTP is on the last",
            "set mtp_num_hidden_layers to 0, or use no pipeline",
        ),
        (
            config.cuda_graph_impl == "none",
            f"cuda_graph_impl={config.cuda_graph_impl}",
            "positions and patches differ from step to step, and a CUDA graph repeats the first",
            "leave CUDA graphs off",
        ),
        (
            not config.overlap_moe_expert_parallel_comm,
            "overlap_moe_expert_parallel_comm=True",
            "megatron's schedule of overlapped expert communication does not call the tower",
            "leave the overlap off",
        ),
    ):
        if not runs:
            raise ConfigError(
                f"the vision-language model cannot run this way: {why}", got=got, fix=fix
            )
