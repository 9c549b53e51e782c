"""Parameters that one rank holds, by part of the model.

The parts are named by one character: E embedding, with the vision tower of a run that trains it,
g GatedDeltaNet layer, a attention layer, m MTP layer, L output layer with final norm and losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import add
from typing import NamedTuple, Protocol

from qwen35_mcore.config import counts
from qwen35_mcore.config.images import Images
from qwen35_mcore.config.matrices import layer_weights
from qwen35_mcore.config.model_config import Qwen35Config


class Sizes(Protocol):
    """The parallel sizes that split parameters, all of them given."""

    @property
    def tp(self) -> int: ...
    @property
    def pp(self) -> int: ...
    @property
    def ep(self) -> int: ...
    @property
    def etp(self) -> int: ...


class Matrix(NamedTuple):
    """A parameter that Muon would update, on one rank; the experts of a layer are two."""

    expert: bool
    elements: float
    flops: float
    """Of its orthogonalisation."""


@dataclass(frozen=True)
class Parameters:
    """Parameters on one rank, by how they are shared and whether FP8 products use them."""

    dense: float = 0.0
    expert: float = 0.0
    in_fp8: float = 0.0
    matrices: tuple[Matrix, ...] = ()
    """Those of whole layers."""
    frozen: float = 0.0
    """Without gradients and optimizer state, among neither dense nor expert ones."""

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(*map(add, vars(self).values(), vars(other).values()))

    def freeze(self) -> Parameters:
        """The same without training."""
        return Parameters(in_fp8=self.in_fp8, frozen=self.count)

    @property
    def trained(self) -> float:
        return self.dense + self.expert

    @property
    def count(self) -> float:
        return self.trained + self.frozen


def mixer_parameters(model_config: Qwen35Config, sizes: Sizes, kind: str) -> Parameters:
    """GatedDeltaNet (g) or attention (a), and the norm before it, on one rank."""
    count = counts.gdn_parameters if kind == "g" else counts.attention_parameters
    split = count(model_config) / sizes.tp
    return Parameters(dense=split + model_config.hidden_size, in_fp8=split)


def feed_forward_parameters(model_config: Qwen35Config, sizes: Sizes) -> Parameters:
    """MLP or MoE, and the norm before it, on one rank. The router is on every TP rank."""
    dense = counts.mlp_parameters(model_config) + counts.shared_expert_parameters(model_config)
    split = dense / sizes.tp
    expert = counts.expert_parameters(model_config).total / (sizes.ep * sizes.etp)
    everywhere = model_config.hidden_size + counts.router_parameters(model_config)
    return Parameters(dense=split + everywhere, expert=expert, in_fp8=split)


def part_parameters(
    model_config: Qwen35Config, sizes: Sizes, kind: str, images: Images | None = None
) -> Parameters:
    """A part on one rank, of a run with images or of text alone. A pipeline's MTP stage holds a
    copy of the embedding; with tied embeddings that copy is its output layer too."""
    language = _language_parameters(model_config, sizes, kind)
    if images is None:
        return language
    tower = images.parameters(sizes.tp) if kind == "E" else {}
    parts = {"language": language} | {name: Parameters(dense=n) for name, n in tower.items()}
    trained = (one.freeze() if name in images.frozen else one for name, one in parts.items())
    return sum(trained, Parameters())


def _language_parameters(model_config: Qwen35Config, sizes: Sizes, kind: str) -> Parameters:
    hidden, tied = model_config.hidden_size, model_config.tie_word_embeddings
    pipelined = sizes.pp > 1
    table = Parameters(dense=model_config.vocab_size * hidden / sizes.tp)
    if kind == "E":
        return table
    if kind == "L":
        norm = Parameters(dense=hidden)
        return norm if tied and not pipelined else norm + table
    mixer = mixer_parameters(model_config, sizes, kind)
    layer = mixer + feed_forward_parameters(model_config, sizes)
    layer += Parameters(matrices=tuple(_matrices(model_config, sizes, kind)))
    if kind != "m":
        return layer
    joining = 2 * hidden**2 / sizes.tp
    own = layer + Parameters(dense=joining + 3 * hidden, in_fp8=joining)
    return own + table if pipelined and not tied else own


def _matrices(model_config: Qwen35Config, sizes: Sizes, kind: str) -> Iterator[Matrix]:
    """Of one layer."""
    for weight in layer_weights(model_config, kind):
        expert = weight.place.startswith("expert")
        held = (model_config.num_experts // sizes.ep if expert else 1) / weight.count
        elements = held * weight.parameters / (sizes.etp if expert else sizes.tp)
        yield Matrix(expert, elements, held * weight.newton_schulz_flops())
