"""Transformers' model as the numerical reference, with an MTP head of a few lines on top."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.hf_reference import model_class, part_class


def reference_model(config: Qwen35Config, seed: int = 0) -> torch.nn.Module:
    """A randomly initialised float32 causal language model on the CPU.

    What transformers initialises to constants (norms, dt_bias, a small router) is moved off them,
    so that a wrong sign or a dropped tensor shows.
    """
    text = config.to_text_only()
    text_class = model_class(text)
    hf_config = text_class.config_class(**text.to_hf())
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = text_class(hf_config).float().eval()
    _move_off_constants(model, seed + 1)
    return model


def vision_language_model(config: Qwen35Config, seed: int = 0) -> torch.nn.Module:
    """The same with the vision tower, of a vision-language config."""
    whole_class = model_class(config)
    hf_config = whole_class.config_class.from_dict(config.to_hf())
    for level in (hf_config, hf_config.get_text_config(), hf_config.vision_config):
        level._attn_implementation = "eager"
        level._experts_implementation = "eager"
        level.dtype = torch.float32
    torch.manual_seed(seed)
    model = whole_class(hf_config).float().eval()
    _move_off_constants(model, seed + 1)
    return model


def _move_off_constants(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.05 if parameter.dim() > 1 else 0.2
            if name.endswith("A_log"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 - 1)
            elif name.endswith("mlp.gate.weight"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                base = 0.0 if parameter.dim() > 1 else parameter
                parameter.copy_(base + scale * torch.randn(parameter.shape, generator=generator))


class ReferenceMTP(torch.nn.Module):
    """One multi-token-prediction layer made of transformers' own modules.

    Position i joins the embedding of token i + 1 and the hidden state of position i, and predicts
    token i + 2. Parameter names are the published ones (``mtp.*``).
    """

    def __init__(self, model: Any, config: Qwen35Config, seed: int = 5) -> None:
        super().__init__()
        norm = part_class(config, "RMSNorm")
        text_config = model.config.get_text_config()
        layer_config = type(text_config)(**text_config.to_dict())
        layer_config.layer_types = ["full_attention"]
        layer_config._attn_implementation = "eager"
        layer_config._experts_implementation = "eager"
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = norm(hidden, eps)
        self.pre_fc_norm_hidden = norm(hidden, eps)
        self.fc = torch.nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = torch.nn.ModuleList([part_class(config, "DecoderLayer")(layer_config, 0)])
        self.norm = norm(hidden, eps)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                scale = 0.05 if parameter.dim() > 1 else 0.2
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    def loss(
        self,
        model: Any,
        hidden_bsh: torch.Tensor,
        tokens: torch.Tensor,
        embedded_bsh: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean loss over the positions that have a token after next; tokens ``[b, s + 1]``.

        Args:
            embedded_bsh, position_ids: of every position, images included; for a model with images.
        """
        text = getattr(model.model, "language_model", model.model)
        labels = tokens[:, 1:]  # the token that follows each position
        if embedded_bsh is None:
            embedded = text.embed_tokens(F.pad(labels[:, :-1], (0, 1)))
        else:
            embedded = F.pad(embedded_bsh[:, 1:], (0, 0, 0, 1))  # none after the last
        joined = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden_bsh)]
        x = self.fc(torch.cat(joined, dim=-1))
        length = x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length)[None].expand(x.shape[0], -1)
        causal = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        x = self.layers[0](
            x,
            position_embeddings=text.rotary_emb(x, position_ids),
            attention_mask=causal,
            position_ids=position_ids,
        )
        logits = model.lm_head(self.norm(x))
        return mean_loss(logits[:, :-1], labels[:, 1:])


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed up in float64: a float32 sum over some hundred tokens is off by 1e-6 of the mean."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.double().mean()


def reference_weights(model: torch.nn.Module, mtp: ReferenceMTP | None) -> dict[str, torch.Tensor]:
    """Published tensor names to parameters, MTP included."""
    named = dict(model.named_parameters())
    if mtp is not None:
        named |= {f"mtp.{name}": parameter for name, parameter in mtp.named_parameters()}
    return named


def reference_loss(
    model: Any, mtp: ReferenceMTP | None, tokens: torch.Tensor, mtp_scale: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Mean next-token loss, mean MTP loss, and the training loss that adds them up."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    loss = mean_loss(logits, tokens[:, 1:])
    if mtp is None:
        return loss, None, loss
    mtp_loss = mtp.loss(model, hidden, tokens)
    return loss, mtp_loss, loss + mtp_scale * mtp_loss
