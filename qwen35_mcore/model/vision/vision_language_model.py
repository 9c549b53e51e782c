"""The language model with the vision tower in front."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import ConfigError, DataError
from qwen35_mcore.mcore.gdn_heads import zigzag_of_documents
from qwen35_mcore.mcore.imports import PackedSeqParams, TransformerConfig, roll_tensor
from qwen35_mcore.mcore.pipeline_tensors import receive_several
from qwen35_mcore.model.gpt_model import Qwen35Model
from qwen35_mcore.model.vision.embedding import WordAndImageEmbedding, mark_images, place_features
from qwen35_mcore.model.vision.grids import Grid, Grids, read_grids
from qwen35_mcore.model.vision.rope import mrope_angles, rope_index
from qwen35_mcore.model.vision.tower import VisionModel


class Qwen35VisionLanguageModel(Qwen35Model):
    """transformers' ``Qwen3_5ForConditionalGeneration`` (dense and MoE) of Megatron's layers.

    The first pipeline stage holds the tower as ``vision_model``. A batch without images runs one
    block of empty patches through a tower that is trained, and uses nothing of it: its gradients
    are zero then, and no rank waits for another's.

    MTP, on the last stage, embeds the images that follow. The first stage sends them behind the
    hidden states, where they will be embedded, and the stages between hand them on. So stages send
    as many tensors of the hidden states' size as there are MTP layers and one, images or none.

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
        if config.pipeline_model_parallel_size > 1 and config.mtp_num_layers:
            config.pipeline_tensors = 1 + config.mtp_num_layers
            receive_several()
        super().__init__(config=config, **arguments)
        self._images_to_come: Sequence[Tensor] = ()
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

        A pipeline stage takes the tokens and the grids, or the positions and no tokens (None); that
        of MTP takes tokens, and the first takes all. A context-parallel rank takes all images, and
        its part of what `place_features` and `rope_index` made of the whole sequences.

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
        """
        packed = arguments.get("packed_seq_params")
        if self.config.context_parallel_size > 1:
            self._check_part(input_ids, position_ids)
        if position_ids is None:
            bounds = None if packed is None else packed.cu_seqlens_q
            position_ids = rope_index(
                input_ids, self.vision, image_grid_thw, video_grid_thw, cu_seqlens=bounds
            )
        if position_ids.dim() == 2:
            position_ids = position_ids.expand(3, -1, -1)
        if self.vision_model is None:
            return self._later_stage(input_ids, position_ids, attention_mask, **arguments)
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
            output = super().forward(input_ids, position_ids, attention_mask, **arguments)
            return self._with_images_to_come(output, list(self._upcoming(input_ids, packed)))
        finally:
            words.features = None

    def _upcoming(self, ids: Tensor, packed: PackedSeqParams | None) -> Iterator[Tensor]:
        """What each of MTP's layers on the last stage will embed of the images."""
        for _ in range(1, self.config.pipeline_tensors):
            ids, _ = roll_tensor(ids, cp_group=self.pg_collection.cp, packed_seq_params=packed)
            yield self.embedding.word_embeddings.images(ids)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """What the stage before sent, as megatron's schedules hand it over."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if received is not None and self.config.pipeline_tensors > 1:
            received, *self._images_to_come = received.chunk(self.config.pipeline_tensors)
        super().set_input_tensor(received)

    def _later_stage(self, ids: Tensor, *args: Any, **arguments: Any) -> Tensor:
        images, self._images_to_come = self._images_to_come, ()
        if not (images and self.mtp_process):
            return self._with_images_to_come(super().forward(ids, *args, **arguments), images)
        words = self.embedding.word_embeddings
        words.received = iter(images)
        try:
            return super().forward(mark_images(ids, self.vision), *args, **arguments)
        finally:
            words.received = None

    def _with_images_to_come(self, output: Tensor, images: Sequence[Tensor]) -> Tensor:
        if not images:
            return output
        return torch.cat([output, *(each.to(output.dtype) for each in images)])

    def _check_part(self, ids: Tensor, positions: Tensor | None) -> None:
        embeds = self.pre_process or self.mtp_process
        if positions is None or (embeds and bool((mark_images(ids, self.vision) != ids).any())):
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
        positions = self._positions(kwargs["position_ids"], kwargs["packed_seq_params"])
        angles = mrope_angles(positions, at_one[1, 0, 0, :half], section)
        return (prepared[0], angles, *prepared[2:])

    def _positions(self, here: Tensor, packed: PackedSeqParams | None) -> Tensor:
        """As megatron's attention takes them: of whole documents, of which it takes its part, but
        where there are none of this context-parallel rank alone."""
        group = self.pg_collection.cp
        if packed is None or group.size() == 1:
            return here
        parts = [torch.empty_like(here) for _ in range(group.size())]
        torch.distributed.all_gather(parts, here.contiguous(), group=group)
        length = here.shape[-1] * group.size()
        places = zigzag_of_documents(packed.cu_seqlens_q, group.size(), length)
        return torch.cat(parts, dim=-1)[..., places.flatten().argsort()]

    def _postprocess(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs["labels"] is None and self.mtp_process:
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
    for runs, got, why, fix in (
        (
            not config.mtp_standalone,
            "MTP in a pipeline stage without the loss",
            "the stage of the loss would be sent no images to come",
            "put MTP's layers and the loss on the same stage",
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
