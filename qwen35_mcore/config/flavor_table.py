"""The table of `qwen35 flavors`: shapes and parameter counts of the published sizes."""

from __future__ import annotations

from typing import Any

from qwen35_mcore.config.counts import count_parameters, vision_parameters
from qwen35_mcore.config.flavors import FLAVORS, VISION_FLAVORS, flavor_name, vision_flavor
from qwen35_mcore.config.vision import VisionConfig


def flavor_rows(name: str | None = None) -> list[dict[str, Any]]:
    """Shapes and parameter counts of one flavor (in any spelling), or of all.

    Raises:
        ConfigError: no such flavor.
    """
    return [_row(one) for one in ([flavor_name(name)] if name else FLAVORS)]


def _row(name: str) -> dict[str, Any]:
    model_config = FLAVORS[name]
    counts = count_parameters(model_config)
    return {
        "name": name,
        "layers": model_config.num_hidden_layers,
        "hidden": model_config.hidden_size,
        "heads": model_config.num_attention_heads,
        "kv_heads": model_config.num_key_value_heads,
        "experts": model_config.num_experts,
        "top_k": model_config.num_experts_per_tok,
        "max_positions": model_config.max_position_embeddings,
        "yarn_factor": model_config.yarn.factor if model_config.yarn else None,
        "total": counts.total,
        "active": counts.active,
        "vision": _tower(name),
        "components": {
            part: {"total": count.total, "active": count.active}
            for part, count in counts.by_component().items()
        },
    }


def _tower(name: str) -> int | None:
    """Parameters of the vision tower that a size was published with."""
    if name not in VISION_FLAVORS:
        return None
    return vision_parameters(VisionConfig.of(vision_flavor(name)))


def print_flavors(rows: list[dict[str, Any]]) -> None:
    """Print what `flavor_rows` returned as a table."""
    from rich.console import Console
    from rich.table import Table

    notes = ["total: with MTP; active: per token, without MTP; text model only"]
    notes += [
        f"{row['name']}: YaRN factor {row['yarn_factor']:g}, {row['max_positions']:,} positions"
        for row in rows
        if row["yarn_factor"]
    ]
    if towers := [f"{row['name']} {_short(row['vision'])}" for row in rows if row["vision"]]:
        notes.append(f"vision tower with its merger, besides: {', '.join(towers)}")
    table = Table(caption="\n".join(notes), caption_justify="left")
    table.add_column("flavor", no_wrap=True, min_width=10)
    for header in ("layers", "hidden", "heads/kv", "experts/top-k", "total", "active"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            str(row["layers"]),
            str(row["hidden"]),
            f"{row['heads']}/{row['kv_heads']}",
            f"{row['experts']}/{row['top_k']}" if row["experts"] else "-",
            _short(row["total"]),
            _short(row["active"]),
        )
    Console().print(table)


def _short(parameters: int) -> str:
    unit, letter = (10**9, "B") if parameters >= 10**8 else (10**6, "M")
    return f"{parameters / unit:.2f} {letter}"
