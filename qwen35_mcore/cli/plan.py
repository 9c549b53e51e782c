"""``qwen35 plan``: the options, handed to `planner.command`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_LARGEST = 2**17  # the time of `plan` grows with GPUs and with microbatches


def plan(
    gpus: Annotated[int, typer.Option(min=1, max=_LARGEST, help="Total number of GPUs.")],
    global_batch_size: Annotated[
        int, typer.Option(min=1, max=_LARGEST, help="Sequences per optimizer step.")
    ],
    flavor: Annotated[str | None, typer.Option(help="A size; see `qwen35 flavors`.")] = None,
    hf_config: Annotated[
        str | None,
        typer.Option(help="Instead of --flavor: a Hugging Face config.json, or its folder."),
    ] = None,
    gpu: Annotated[
        str,
        typer.Option(help="Kind of GPU: h100-80g, h200-141g, b200-180g, gb200-186g, a100-80g."),
    ] = "h100-80g",
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs that the job uses on each node. Default: 8 (GB200: 4), or the next smaller "
            "number that divides --gpus.",
        ),
    ] = None,
    headroom: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="Memory that a plan leaves free on each GPU. Default: 2, because "
            "measured peaks were up to 0.6 GiB above their prediction, and uneven routing takes "
            "more.",
        ),
    ] = None,
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 4096,
    vision: Annotated[
        bool, typer.Option("--vision", help="Train the vision tower too; with --image-patches.")
    ] = False,
    image_patches: Annotated[
        int | None,
        typer.Option(min=1, help="Patches of an image: 1,024 of 512 x 512 pixels."),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images of a sequence. Default: 1.")
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART",
            help="Do not train this part: language, vision (the tower without its merger) or "
            "merger. May be repeated.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="File that tests.bench.bench_calibration wrote. Default: this package's own."
        ),
    ] = None,
    tp: Annotated[
        list[int] | None, typer.Option(min=1, help="Try only this tensor parallel size.")
    ] = None,
    pp: Annotated[
        list[int] | None, typer.Option(min=1, help="Try only this pipeline parallel size.")
    ] = None,
    vpp: Annotated[
        list[int] | None, typer.Option(min=1, help="Try only this number of stages per rank.")
    ] = None,
    cp: Annotated[
        list[int] | None, typer.Option(min=1, help="Try only this context parallel size.")
    ] = None,
    ep: Annotated[
        list[int] | None, typer.Option(min=1, help="Try only this expert parallel size.")
    ] = None,
    etp: Annotated[
        list[int] | None, typer.Option(min=1, help="Try only this expert tensor parallel size.")
    ] = None,
    micro_batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Try only this number of sequences per microbatch."),
    ] = None,
    recompute: Annotated[
        str | None, typer.Option(help="Try only none, selective or full. Default: all.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="bf16, fp8-blockwise, fp8-tensorwise, or all: every one that the GPU has. "
            "Default: bf16."
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="adam, precision-aware (bf16 gradients and moments), or muon.")
    ] = "adam",
    dispatcher: Annotated[
        str | None,
        typer.Option(
            help="Who exchanges the experts' tokens: alltoall, ncclep (within a node), or all: try "
            "both. Default: alltoall."
        ),
    ] = None,
    graphs: Annotated[
        str | None,
        typer.Option(
            help="CUDA graphs: none, parts (of layers), full (one of the step), or all: try each. "
            "Default: the first of full, parts and none that a layout can have."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of layouts to show.")] = 5,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="Do not search. Explain why this layout cannot run, or predict what it would do: "
            "tp=8,pp=4,vpp=1,ep=8,mbs=1,recompute=full,layout=Et*3|..., in any order. A size that "
            "is not named is 1.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    emit: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write layout.args, plan.json and run.sh to DIR."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an existing DIR.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files of --emit instead of writing them.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the schedule and the memory: FILE.png or FILE.svg.")
    ] = None,
) -> None:
    """Find the fastest parallel layout that fits into memory. Needs no GPU."""
    from qwen35_mcore.planner import command

    output = command.Output(
        as_json=as_json, emit=emit, overwrite=overwrite, dry_run=dry_run, picture=picture
    )
    output.check()
    if vision and image_patches is None:
        raise typer.BadParameter("--vision needs it", param_hint="--image-patches")
    if not vision and (image_patches or images or freeze):
        raise typer.BadParameter(
            "images and frozen parts are of a run that trains the vision tower",
            param_hint="--vision",
        )
    job = command.make_job(
        flavor=flavor,
        hf_config=hf_config,
        gpus=gpus,
        gpu=gpu,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        calibration=calibration,
        gpus_per_node=gpus_per_node,
        headroom_gib=command.DEFAULT_HEADROOM_GIB if headroom is None else headroom,
        vision={"patches": image_patches, "per_sequence": images or 1, "frozen": freeze or ()}
        if vision
        else None,
        optimizer=optimizer,
    )
    sizes = {
        "tp": tp,
        "pp": pp,
        "vpp": vpp,
        "cp": cp,
        "ep": ep,
        "etp": etp,
        "micro_batch_size": micro_batch_size,
    }
    words = {"recompute": recompute, "precision": precision}
    words |= {"dispatcher": dispatcher, "graphs": graphs}
    if explain is not None:
        command.refuse_pins({**sizes, **words})
        raise typer.Exit(command.run_explain(job, explain, output=output))
    space: dict[str, Any] = {name: tuple(values or ()) for name, values in sizes.items()}
    space |= command.switches(job.gpu, words)
    command.run_search(job, command.Space(**space), top=top, output=output)
