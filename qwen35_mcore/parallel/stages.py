"""Megatron's ``pipeline_model_parallel_layout`` strings, read and written without Megatron.

A layout lists the virtual pipeline stages in the order of the forward pass, separated by ``|``.
A stage holds E (embedding), t (decoder layer), m (MTP layer) and L (loss) in any number, also none.
``x*3`` repeats one character, ``(tt|)*29`` a group; commas are decoration. Stage i runs on pipeline
rank i % pp as its virtual stage i // pp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from qwen35_mcore.errors import ConfigError

_TOKEN = re.compile(
    r"\((?P<group>[^()]*)\)\*(?P<group_times>\d+)|(?P<one>[EtmL|])(?:\*(?P<one_times>\d+))?"
)


def parse_pipeline_layout(text: str) -> tuple[str, ...]:
    """The stages of a layout string, each as its layer characters: ``"Et|t*2|mL"`` is
    ``("Et", "tt", "mL")``.

    Raises:
        ConfigError: the text is outside the grammar; the message shows where. Groups do not nest
            and need a count, as in Megatron.
    """
    return tuple(_expand(text.replace(",", ""), text).split("|"))


def _expand(part: str, whole: str) -> str:
    return "".join(_tokens(part, whole))


def _tokens(part: str, whole: str) -> Iterator[str]:
    position = 0
    while position < len(part):
        match = _TOKEN.match(part, position)
        if match is None:
            raise ConfigError(
                f"the pipeline layout cannot be read from {part[position:]!r} on",
                got=whole,
                allowed="E, t, m, L and | (each may be followed by *N), and groups (...)*N",
            )
        if match["group"] is None:
            yield match["one"] * int(match["one_times"] or 1)
        else:
            yield _expand(match["group"], whole) * int(match["group_times"])
        position = match.end()


def write_pipeline_layout(stages: Sequence[str]) -> str:
    """The shortest text this finds for stages given as their layer characters:
    ``("Ett", "ttt", "ttt", "tmL")`` is ``Ett|(t*3|)*2tmL``.

    Runs of one layer become ``t*3`` and equal neighbouring stages a group, where that is shorter.
    """
    parts = []
    bars = [*("|" for _ in stages[:-1]), ""]
    for text, equal in groupby(map("".join, zip(map(_write_stage, stages), bars, strict=True))):
        plain = text * (times := len(list(equal)))
        parts.append(min(plain, f"({text})*{times}", key=len))
    return "".join(parts)


def _write_stage(stage: str) -> str:
    runs = ((layer, len(list(run))) for layer, run in groupby(stage))
    return "".join(layer * times if times < 3 else f"{layer}*{times}" for layer, times in runs)


def stage_problems(
    stages: tuple[str, ...], *, num_layers: int, num_mtp_layers: int, standalone_mtp: bool, pp: int
) -> Iterator[str]:
    """What is wrong with the content of a layout, one sentence each.

    Args:
        stages: as `parse_pipeline_layout` returns them, pp * vpp of them.
        num_layers: decoder layers of the model.
        num_mtp_layers: its MTP layers.
        standalone_mtp: allow MTP in a stage without the loss.
        pp: pipeline parallel size.
    """
    flat = "".join(stages)
    wanted = {"E": 1, "t": num_layers, "m": num_mtp_layers, "L": 1}
    for layer, count in wanted.items():
        if flat.count(layer) != count:
            yield f"it has {flat.count(layer)} {layer}, the model has {count}"
    if not flat.startswith("E"):
        yield "E (the embedding) must come first"
    if not flat.endswith("L"):
        yield "L (the loss) must come last"
    if "m" not in flat:
        return
    if "t" in flat[flat.index("m") :]:
        yield "m (MTP) must come after every t"
    yield from _mtp_problems(stages, standalone=standalone_mtp, pp=pp)


def _mtp_problems(stages: tuple[str, ...], *, standalone: bool, pp: int) -> Iterator[str]:
    holding = [i for i, stage in enumerate(stages) if "m" in stage]
    if not standalone:
        if holding != [len(stages) - 1]:
            yield "m (MTP) must be in the last virtual stage, together with L"
        return
    if len(holding) > 1:
        yield "every m (MTP) must be in one stage"
    if holding[0] < len(stages) - pp:
        yield f"m (MTP) must be on a rank's last virtual stage, one of the last {pp} stages"
