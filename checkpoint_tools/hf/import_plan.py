"""Every tensor of a Hugging Face checkpoint is converted, carried or refused by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from checkpoint_tools.hf.carried import Carried, other_files
from checkpoint_tools.hf.foreign_tensors import refuse_foreign
from checkpoint_tools.hf.read import HFCheckpoint, HFTensor
from checkpoint_tools.table.names import (
    HEAD,
    MTP_PREFIX,
    Format,
    Naming,
    rows,
)
from checkpoint_tools.table.row import Row
from checkpoint_tools.table.transforms import same_bits
from checkpoint_tools.table.vision import VISION_PREFIX
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import CheckpointError

_CONVERTIBLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# computed from the config; trainers of some years saved them, and transformers passes over them
_COMPUTED = "*rotary_emb.inv_freq"
_EXPERTS = re.compile(r"\.mlp\.experts\.((gate_up|down)_proj|\d+\.(gate|up|down)_proj\.weight)$")


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """A Hugging Face folder and what becomes of each of its tensors."""

    hf: HFCheckpoint
    config: Qwen35Config
    """Of the model that is trained: without MTP when that was asked for."""
    table: list[Row]
    carried: Carried
    notes: list[str]
    """What whoever converts should know, one line each."""


def plan_import(
    folder: Path,
    *,
    checkpoint_format: Format = "qwen35",
    carry: Sequence[str] = (),
    no_mtp: bool = False,
    vision: bool = False,
) -> ImportPlan:
    """Read a Hugging Face folder and decide what happens to each tensor.

    Args:
        carry: name patterns (``*`` and ``?``) of tensors to carry through untouched.
        no_mtp: convert without MTP although the config says there is one.
        vision: convert the vision tower, for a run that trains it; without, it is carried.

    Raises:
        CheckpointError: a tensor is missing, unknown, misshapen, quantised or not the config's.
        ConfigError: config.json is missing, is not of this family, or describes no tower that
            could be converted.
    """
    if vision and checkpoint_format == "mcore":
        raise CheckpointError(
            "megatron-core has no model of its own with this vision tower",
            got="--vision --layout mcore",
            fix="drop --vision to carry the tower, or --layout mcore to train it here",
        )
    hf = HFCheckpoint(folder)
    refuse_foreign(hf.tensors)
    config = Qwen35Config.from_hf(folder)
    if vision and not config.is_vision_language:
        raise CheckpointError(
            "the model has no vision tower that could be converted",
            got=f"--vision, model_type {config.model_type}",
            fix="drop --vision, or name a vision-language folder",
        )
    carried = {
        name for name in hf.tensors if any(fnmatchcase(name, p) for p in (*carry, _COMPUTED))
    }
    if config.is_vision_language and not vision:
        carried |= {name for name in hf.tensors if name.startswith(VISION_PREFIX)}
    given = {name: entry for name, entry in hf.tensors.items() if name not in carried}
    naming = Naming.detect(config, given)
    notes = list(hf.notes)
    left_out: set[str] = set()
    if no_mtp:
        left_out = {name for name in given if name.startswith(MTP_PREFIX)}
        given = {name: entry for name, entry in given.items() if name not in left_out}
        notes += _without_mtp(hf.folder, config, left_out)
        naming = replace(naming, mtp=False)
        config = replace(config, mtp_num_hidden_layers=0)
    table = rows(config, naming, checkpoint_format, vision=vision)
    _check_carry(hf.tensors, carry, table)
    _check_names(config, naming, given, table)
    _check_tensors(given, table)
    if config.tie_word_embeddings and HEAD in given:
        _check_tied(hf, f"{naming.prefix}embed_tokens.weight")
    if config.is_vision_language and not any(n.startswith(VISION_PREFIX) for n in hf.tensors):
        raise _no_vision(naming)
    files, other_weights = other_files(hf)
    return ImportPlan(
        hf=hf,
        config=config,
        table=table,
        carried=Carried(
            naming=naming,
            dtypes={n: entry.dtype for n, entry in hf.tensors.items() if n not in left_out},
            tensors=hf.lazy(sorted(carried)),
            weights=hf.paths if carried else [],
            files=files,
        ),
        notes=[*notes, *(f"left out, other weights: {file}" for file in other_weights)],
    )


def _without_mtp(folder: Path, config: Qwen35Config, left_out: Collection[str]) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"left out, the MTP layer: {len(left_out)} tensors")
    if config.mtp_num_hidden_layers:
        notes.append(
            "without the MTP layer of its config.json: to train it with --hf-config "
            f"{folder}, add --override mtp_num_hidden_layers=0"
        )
    return notes


def _check_names(
    config: Qwen35Config, naming: Naming, given: Collection[str], table: list[Row]
) -> None:
    """Refuse names that are missing or too many; what has a way out comes after what has none."""
    expected = {spec.name for row in table for spec in row.hf}
    if config.tie_word_embeddings:
        expected.add(HEAD)
    lacking = expected - set(given)
    missing = sorted(lacking - {HEAD})
    unknown = sorted(set(given) - expected)
    if missing:
        if config.tie_word_embeddings and HEAD in given and len(missing) == 1:
            # the trainer kept the other name of the one tensor
            unknown = [HEAD]
        raise _missing(missing, unknown, table, naming)
    if naming.mtp and not config.mtp_num_hidden_layers:
        raise CheckpointError(
            f"there are tensors named {MTP_PREFIX}* and config.json has no MTP layer",
            fix=f"set {config.family.mtp_key} to 1 in config.json, or carry them: --carry 'mtp.*'",
        )
    if unknown:
        _refuse_too_many(config, unknown)
        raise CheckpointError(
            f"{len(unknown)} unknown tensors",
            got=", ".join(unknown[:5]),
            fix="if this model computes without them, carry them through unchanged: --carry "
            f"'{unknown[0]}' (patterns work). If they are its own under other names, rename them: "
            "a model that is saved by transformers has the right ones",
        )
    if config.mtp_num_hidden_layers and not naming.mtp:
        unsaid = ", also where it is not said" if config.family.mtp_default else ""
        raise CheckpointError(
            f"config.json has an MTP layer and there are no tensors named {MTP_PREFIX}*",
            got=f"{config.family.mtp_key} {config.mtp_num_hidden_layers}{unsaid}",
            fix="transformers, and the trainers that use it, drop them when they save: --no-mtp "
            "converts without",
        )
    if not config.tie_word_embeddings and HEAD in lacking:
        raise CheckpointError(
            f"there is no {HEAD} and config.json does not tie it to the embedding",
            fix="fetch the file that holds it. Only where the model was trained with tied "
            "embeddings is there none: then set tie_word_embeddings to true (at the top level)",
        )


def _check_carry(given: Collection[str], carry: Sequence[str], table: list[Row]) -> None:
    """Refuse patterns that name nothing, or what the model itself is made of."""
    needed = {spec.name for row in table for spec in row.hf}
    for pattern in carry:
        names = [name for name in given if fnmatchcase(name, pattern)]
        taken = sorted(needed.intersection(names))
        if names and not taken:
            continue
        raise CheckpointError(
            f"--carry names {'the model' if taken else 'no tensor that is there'}",
            got=f"{pattern!r}" + (f", which is also {', '.join(taken[:3])}" if taken else ""),
            allowed="patterns (* and ?) of tensors that the model computes without",
            fix="narrow the pattern" if taken else "correct the pattern, or leave it out",
        )


def _refuse_too_many(config: Qwen35Config, unknown: list[str]) -> None:
    """Refuse layers, experts and blocks of the tower beyond the config's, and experts that are
    stored in both ways."""
    limits = [
        (r"(?:^|\.)layers\.(\d+)\.", config.num_hidden_layers, "num_hidden_layers"),
        (r"\.experts\.(\d+)\.", config.num_experts, "num_experts"),
    ]
    if config.is_vision_language and any(name.startswith(VISION_PREFIX) for name in unknown):
        depth = VisionConfig.of(config).depth  # the tower is converted, otherwise it is carried
        limits.append((r"\.visual\.blocks\.(\d+)\.", depth, "vision_config.depth"))
    for pattern, count, key in limits:
        beyond = [n for n in unknown if (m := re.search(pattern, n)) and int(m[1]) >= (count or 0)]
        if beyond:
            raise CheckpointError(
                f"there are tensors beyond config.json's {key}",
                got=", ".join(beyond[:3]),
                allowed=f"{key} {count}",
                fix="correct config.json: it is of another model, or was edited",
            )
    if all(_EXPERTS.search(name) for name in unknown):
        raise CheckpointError(
            "the experts are stored twice, packed and one by one",
            got=", ".join(unknown[:3]),
            fix="nobody can tell which are meant: write the folder again with one of the two",
        )


def _missing(
    missing: list[str], unknown: list[str], table: list[Row], naming: Naming
) -> CheckpointError:
    fix = "fetch the checkpoint again, or correct config.json if it is of another model"
    decoder = sum(spec.name.startswith(naming.prefix) for row in table for spec in row.hf)
    if any(".mlp.experts." in name for name in missing) and any(
        ".mlp.experts." in name for name in unknown
    ):
        fix = "some layers hold their experts packed, some one by one: load the model with "
        fix += "transformers and save it, which makes them alike"
    elif unknown == [HEAD] and missing[0].endswith("embed_tokens.weight"):
        fix = f"the tied embedding is stored as {HEAD}: load the model with transformers and save "
        fix += "it, which names it as it should be"
    elif unknown and len(missing) >= decoder // 2:
        fix = (
            f"the names here, such as {unknown[0]}, are not those of transformers: load the model "
        )
        fix += "with what saved it, and save it for transformers"
    return CheckpointError(
        f"{len(missing)} tensors are missing", got=", ".join(missing[:5]), fix=fix
    )


def _no_vision(naming: Naming) -> CheckpointError:
    return CheckpointError(
        "config.json is vision-language and there is no vision tower",
        got=f"tensors named {naming.prefix}*, none named {VISION_PREFIX}*",
        fix="fetch the missing files; or, if this is the text model alone, say so in config.json: "
        '"architectures": ["Qwen3_5ForCausalLM"] (Qwen3_5MoeForCausalLM for a mixture of experts)',
    )


def _check_tied(hf: HFCheckpoint, embedding: str) -> None:
    """A tied model may have a copy of its embedding, not another output layer."""
    a, b = hf.tensors[HEAD], hf.tensors[embedding]
    if (a.dtype, a.shape) != (b.dtype, b.shape) or not same_bits(a.read(), b.read()):
        raise CheckpointError(
            f"config.json ties the output layer to the embedding and {HEAD} is another one",
            fix="set tie_word_embeddings to false (at the top level of config.json): transformers "
            "computes with both, too",
        )


def _check_tensors(given: Mapping[str, HFTensor], table: list[Row]) -> None:
    expected = {spec.name: spec.shape for row in table for spec in row.hf}
    for name, shape in expected.items():
        entry = given[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{name} has another shape than config.json says",
                got=str(entry.shape),
                allowed=str(shape),
                fix="correct config.json if it is of another model, else fetch the weights again",
            )
        if entry.dtype not in _CONVERTIBLE:
            raise CheckpointError(
                f"{name} is quantised",
                got=str(entry.dtype),
                allowed=", ".join(str(dtype) for dtype in _CONVERTIBLE),
                fix="start from the weights that were quantised: the bfloat16 release",
            )
