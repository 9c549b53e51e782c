"""Mark the parameters of a built model that hold matrices, by the table of `config.matrices`."""

from __future__ import annotations

import torch

from qwen35_mcore.config.matrices import matrix_weights
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.mcore.muon import mark

PLACES = {
    "in_proj": ("gdn in",),
    "out_proj": ("gdn out",),
    "linear_qkv": ("attention in",),
    "linear_proj": ("attention out",),
    "linear_fc1": ("mlp in", "expert in", "shared expert in"),
    "linear_fc2": ("mlp out", "expert out", "shared expert out"),
    "weight1": ("expert in",),
    "weight2": ("expert out",),
    "eh_proj": ("mtp out",),
}
"""What a layer calls its projection, and the places of the table where it stands. A projection
stands in several where these hold the same matrices, at other sizes."""


def mark_matrices(model: torch.nn.Module, model_config: Qwen35Config, *, gates_apart: bool) -> None:
    """Mark every parameter of this rank's part of the language model that is made of matrices.

    Args:
        gates_apart: the input projection of a GatedDeltaNet ends with z. Otherwise it holds rows
            that are not Muon's, and its mark says that Muon cannot take it.
    """
    weights = {weight.place: weight for weight in matrix_weights(model_config)}
    for name, parameter in model.named_parameters():
        projection = None if name.startswith("vision_model.") else _projection(name)
        if projection is None:
            continue
        weight = next(weights[place] for place in PLACES[projection] if place in weights)
        rows = list(weight.rows.values())
        if weight.groups is not None:
            mark(parameter, [count // weight.groups for count in rows])
        elif projection == "in_proj" and not gates_apart:
            mark(parameter, [])
        else:
            mark(parameter, [parameter.shape[-2] * count // sum(rows) for count in rows])


def _projection(name: str) -> str | None:
    """The projection whose weight this is: of a module by that name, or a parameter of experts."""
    *_, module, parameter = ["", *name.split(".")]
    if module in PLACES:
        return module if parameter.startswith("weight") else None
    return parameter if parameter in PLACES else None
