"""The `qwen35` command. Commands import what they need when they run, so that `--help` and
`flavors` answer at once and on a machine without torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from qwen35_mcore import __version__
from qwen35_mcore.errors import Qwen35Error
from qwen35_mcore.process.interrupts import (
    EXIT_INTERRUPTED,
    interrupt_once,
    interrupted,
    quiet_imports,
)

with quiet_imports():
    import typer

app = typer.Typer(
    name="qwen35",
    help="Qwen3.5 for Megatron-Core: sizes, training data, layouts, a check of the machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="Turn text into Megatron's .bin/.idx files, conversations with images into Energon's.",
    no_args_is_help=True,
)
app.add_typer(data_app, name="data")

_LARGEST = 2**17  # the time of `plan` grows with GPUs and with microbatches


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qwen35 {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def flavors(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A flavor, in any spelling. Default: all."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list with every component's count.")
    ] = False,
) -> None:
    """List the model sizes with their shapes and parameter counts."""
    from qwen35_mcore.config.flavor_table import flavor_rows, print_flavors

    rows = flavor_rows(name)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_flavors(rows)


@app.command(context_settings={"ignore_unknown_options": True})
def flags(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FLAG", help="Flags to explain. Default: count the flags of each class."
        ),
    ] = None,
) -> None:
    """Explain Megatron's flags: which the model decides, which work, why others are refused."""
    from qwen35_mcore.training.flags.show import described, overview

    typer.echo("\n".join(described(names) if names else overview()))


@data_app.command()
def tokenize(
    output_prefix: Annotated[
        str,
        typer.Option(metavar="PREFIX", help="Where the dataset goes: PREFIX.bin and PREFIX.idx."),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT",
            help="Text, jsonl or parquet files, or folders of them; 'stdlib' stands for the source "
            "files of this Python's standard library.",
        ),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="'byte' (no download), or a Hugging Face name or folder.")
    ] = "byte",
    json_key: Annotated[
        str, typer.Option(help="The jsonl key or parquet column that holds the text.")
    ] = "text",
    form: Annotated[
        Literal["text", "jsonl", "parquet"] | None,
        typer.Option("--format", help="Format of every input file. Default: by its name."),
    ] = None,
    split_text: Annotated[
        str,
        typer.Option(
            metavar="none|blank-lines|bytes:N",
            help="Cut text files into documents: at blank lines, or into at most N bytes at line "
            "ends. none: a file is one document.",
        ),
    ] = "none",
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenize.")] = 1,
    append_eod: Annotated[
        bool, typer.Option(help="End every document with the end-of-document token.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing dataset.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Do not print what is read, left out and written.")
    ] = False,
    stdlib: Annotated[
        bool, typer.Option("--stdlib", help="The same as the input 'stdlib'.")
    ] = False,
) -> None:
    """Tokenize text, jsonl or parquet into a Megatron dataset."""
    names = [*(inputs or []), *(["stdlib"] if stdlib else [])]
    if not names:
        raise typer.BadParameter(
            "give at least one file or folder, or --stdlib", param_hint="INPUT"
        )
    with quiet_imports():
        from qwen35_mcore import data

        run = data.tokenize  # imports what it needs
    report = run(
        inputs=names,
        output_prefix=output_prefix,
        tokenizer=tokenizer,
        text_key=json_key,
        form=form,
        split_text=split_text,
        workers=workers,
        append_eod=append_eod,
        overwrite=overwrite,
        quiet=quiet,
    )
    if not quiet:
        nothing = {"empty documents": report.empty_documents, "blank lines": report.blank_lines}
        skipped = ", ".join(f"{count:,} {what}" for what, count in nothing.items() if count)
        typer.echo(
            f"wrote {output_prefix}.bin: {report.documents:,} documents, {report.tokens:,} tokens"
            + (f"; left out: {skipped}" if skipped else "")
        )


@data_app.command()
def images(
    corpus: Annotated[
        list[str],
        typer.Argument(
            metavar="CORPUS",
            help="jsonl files, also packed as .gz or .zst: an object a line, with messages whose "
            "content is a string, or a list of parts of type text, image or video (a list of "
            "frames, and fps).",
        ),
    ],
    output_dir: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the shards and their index go.")
    ],
    processor: Annotated[
        str,
        typer.Option(
            help="The model's Hugging Face name or folder: tokenizer, chat template and "
            "preprocessor_config.json."
        ),
    ],
    json_key: Annotated[
        str, typer.Option(help="The jsonl key that holds the messages.")
    ] = "messages",
    image_root: Annotated[
        Path | None,
        typer.Option(help="Where relative paths of images begin. Default: at the jsonl file."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a sequence, of images too. Default: no limit."),
    ] = None,
    bad_samples: Annotated[
        Literal["error", "skip"],
        typer.Option(
            help="What happens to a sample with a broken or missing image, or more tokens than "
            "--max-length: an error, or a warning that names it, and it is left out."
        ),
    ] = "error",
    split: Annotated[
        str, typer.Option(metavar="TRAIN,VAL,TEST", help="Shares of the three splits.")
    ] = "100,0,0",
    shard_mib: Annotated[int, typer.Option(min=1, help="MiB of a shard.")] = 512,
    workers: Annotated[int, typer.Option(min=1, help="Processes that check and encode.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing dataset.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print warnings and errors alone.")
    ] = False,
) -> None:
    """Turn conversations, with images or without, into Megatron-Energon's WebDataset."""
    with quiet_imports():
        from qwen35_mcore.data.images.convert import convert
    report = convert(
        inputs=corpus,
        output_dir=output_dir,
        processor=processor,
        json_key=json_key,
        image_root=image_root,
        max_length=max_length,
        bad_samples=bad_samples,
        split=split,
        shard_mib=shard_mib,
        workers=workers,
        overwrite=overwrite,
        quiet=quiet,
    )
    if not quiet:
        typer.echo(report.summary(output_dir))


@app.command()
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
            help="Memory that a plan leaves free on each GPU. Default: 2, because measured peaks "
            "were up to 1.3 GiB above their prediction (one H100).",
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


@app.command(context_settings={"ignore_unknown_options": True})
def warm(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A folder that `qwen35 plan --emit` wrote.")
    ],
    flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="FLAG", help="More flags of the training that the plan is for."),
    ] = None,
) -> None:
    """Compile and tune a run's kernels on this node, into the folder QWEN35_KERNEL_CACHE."""
    from qwen35_mcore.training.warm import warm

    raise typer.Exit(warm(plan, flags or []))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
    no_gradient_check: Annotated[
        bool,
        typer.Option(
            "--no-gradient-check", help="Check versions and imports only; run no kernels."
        ),
    ] = False,
    patches: Annotated[
        bool,
        typer.Option(
            "--patches", help="Only list what this package replaces in megatron-core, and why."
        ),
    ] = False,
) -> None:
    """Check this machine's kernels and versions. Exits with 1 if training would fail or be slow."""
    if patches:
        _print_patches(as_json)
        return
    from qwen35_mcore.doctor.report import print_report, to_json
    from qwen35_mcore.doctor.supervise import examine

    found = examine(gradient_check=not no_gradient_check)
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=2))
    else:
        from rich.console import Console

        print_report(found, Console(highlight=False))
    raise typer.Exit(0 if found.ok else 1)


def main() -> None:
    """Entry point: a `Qwen35Error` becomes one message on stderr and exit status 2."""
    interrupt_once()
    try:
        app()
    except Qwen35Error as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except SystemExit as leaving:
        if leaving.code == EXIT_INTERRUPTED:  # typer's answer to Ctrl-C, without a word
            interrupted()
        raise


def _print_patches(as_json: bool) -> None:
    from qwen35_mcore.doctor.patches import patch_rows, print_patches

    rows = patch_rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_patches(rows)


if __name__ == "__main__":
    main()
