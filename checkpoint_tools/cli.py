"""The `qwen35-ckpt` command. Commands import what they need when they run, so that `--help`
answers at once."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import sys
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from qwen35_mcore import __version__
from qwen35_mcore.errors import CheckpointError, Qwen35Error

app = typer.Typer(
    name="qwen35-ckpt",
    help="Convert Qwen3.5 checkpoints between Hugging Face and Megatron: exact, streamed, no GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Workers = Annotated[
    int, typer.Option(min=1, help="Number of files read and written at the same time.")
]
MaxShardSize = Annotated[
    str, typer.Option(help="Largest file, such as 5GB or 500MiB (a tensor is never split).")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing target after success.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Explain = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Only explain where this tensor goes and how; write nothing."
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="HF_DIR",
        help="Hugging Face folder (or repo id) that supplies config, vision tower, tokenizer, "
        "dtypes and expert layout for a run that did not start from an import.",
    ),
]
NoMtp = Annotated[
    bool, typer.Option("--no-mtp", help="Leave out the MTP layer that the config has.")
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qwen35-ckpt {__version__}")
        raise typer.Exit


@app.callback()
def _version(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command("import")
def import_(
    hf_dir: Annotated[
        str, typer.Argument(metavar="HF_DIR", help="Hugging Face folder, or a Hub repo id.")
    ],
    out_dir: Annotated[
        Path, typer.Argument(metavar="OUT_DIR", help="Where the Megatron checkpoint goes.")
    ],
    layout: Annotated[
        Literal["qwen35", "mcore"],
        typer.Option(help="qwen35: for this package. mcore: megatron-core's own GatedDeltaNet."),
    ] = "qwen35",
    carry: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Carry unknown tensors that match along unchanged. Repeatable.",
        ),
    ] = None,
    no_mtp: NoMtp = False,
    vision: Annotated[
        bool,
        typer.Option(
            "--vision",
            help="Convert the vision tower, for a run that trains it; without, it is carried.",
        ),
    ] = False,
    workers: Workers = 4,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    explain: Explain = None,
    as_json: Json = False,
) -> None:
    """Convert a Hugging Face folder to a Megatron torch_dist checkpoint.

    Start training from it with --pretrained-checkpoint OUT_DIR --load RUN --save RUN.
    """
    from checkpoint_tools.convert import import_checkpoint
    from checkpoint_tools.hf.hub import local_folder
    from checkpoint_tools.hf.import_plan import plan_import

    source = local_folder(hf_dir)
    what: Any = {
        "checkpoint_format": layout, "carry": carry or (), "no_mtp": no_mtp, "vision": vision
    }  # fmt: skip
    if explain is not None:
        plan = plan_import(source, **what)
        _print_explanation(explain, plan.table, plan.carried)
        return
    options = _options(workers, max_shard_size, overwrite, dry_run, as_json)
    report = import_checkpoint(source, out_dir, options, **what)
    _print_report(report, dry_run=dry_run, as_json=as_json)


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="iter_NNNNNNN, release, or the run folder above it."
        ),
    ],
    hf_out: Annotated[
        Path, typer.Argument(metavar="HF_OUT", help="Where the Hugging Face folder goes.")
    ],
    dtype: Annotated[
        Literal["original", "checkpoint", "float32"],
        typer.Option(
            help="original: as before the import. checkpoint: as stored. float32: the optimizer's "
            "main parameters."
        ),
    ] = "original",
    reference: Reference = None,
    no_mtp: NoMtp = False,
    workers: Workers = 4,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    explain: Explain = None,
    as_json: Json = False,
) -> None:
    """Convert a Megatron checkpoint to a folder that transformers loads."""
    from checkpoint_tools.export import export_checkpoint, plan_export
    from checkpoint_tools.hf.hub import local_folder

    plan = plan_export(
        checkpoint,
        reference=local_folder(reference) if reference else None,
        choice=dtype,
        no_mtp=no_mtp,
    )
    if explain is not None:
        _print_explanation(explain, plan.exported.table, plan.carried)
        return
    options = _options(workers, max_shard_size, overwrite, dry_run, as_json)
    report = export_checkpoint(hf_out, plan, options)
    _print_report(report, dry_run=dry_run, as_json=as_json)


@app.command()
def verify(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="Hugging Face folder or Megatron checkpoint.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="The other one, of either kind.")],
    reference: Reference = None,
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only", help="Leave out the optimizer state of two Megatron checkpoints."
        ),
    ] = False,
    workers: Workers = 4,
    as_json: Json = False,
) -> None:
    """Compare every tensor bit for bit, with dtype and shape. Exits with 1 on any difference."""
    from checkpoint_tools.hf.hub import local_folder
    from checkpoint_tools.verify import compare

    result = compare(
        first,
        second,
        reference=local_folder(reference) if reference else None,
        weights_only=weights_only,
        workers=workers,
        quiet=as_json,
    )
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2))
    else:
        _print_comparison(result)
    raise typer.Exit(0 if result.equal else 1)


@app.command()
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Hugging Face folder or Megatron checkpoint.")
    ],
    as_json: Json = False,
) -> None:
    """Print what a folder is and whether it is complete. Exits with 1 if it is not."""
    from checkpoint_tools.inspect_ckpt import inspect_folder

    facts = inspect_folder(folder)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            typer.echo(f"{name:20} {_shown(name, value)}")
    raise typer.Exit(0 if facts["complete"] else 1)


def run() -> NoReturn:
    """Entry point of the process: `main`, but for half a second that torch takes at both ends.

    While it is imported the garbage collector finds nothing, nor does it afterwards: a conversion
    leaves no tensors in cycles. And once the last byte is on the disk the interpreter would take
    torch apart piece by piece.
    """
    gc.disable()
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            typer.echo(stop.code, err=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed by who started this
                stream.flush()
        except BrokenPipeError:  # nobody reads any more
            pass
        except OSError:
            status = status or 1
    os._exit(status)


def main() -> None:
    """The command: what the user can fix is one message on stderr and exit status 2."""
    # a checkpoint of many ranks is many files, each mapped
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        app()
    except Qwen35Error as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        typer.echo(f"error: {error.strerror or error}{where}", err=True)
        typer.echo("  nothing that looks complete was written", err=True)
        sys.exit(2)


def _options(workers: int, max_shard_size: str, overwrite: bool, dry_run: bool, quiet: bool) -> Any:
    from checkpoint_tools.files.job import Options

    return Options(
        workers=workers,
        max_shard_bytes=parse_size(max_shard_size),
        overwrite=overwrite,
        dry_run=dry_run,
        quiet=quiet,
    )


def parse_size(text: str) -> int:
    """Bytes in a size such as 5GB, 500MiB or 1000000.

    Raises:
        CheckpointError: it is no positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        number, unit, binary = match.groups()
        power = " KMGT".index(unit.upper() or " ")
        size = int(Decimal(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise CheckpointError("not a size", got=text, allowed="such as 5GB or 500MiB")
    return size


def _print_explanation(name: str, table: Any, carried: Any) -> None:
    from checkpoint_tools.table.explain import explain

    typer.echo(explain(name, table, [tensor.name for tensor in carried.tensors] if carried else ()))


def _print_report(report: Any, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **vars(report)}, indent=2))
        return
    done = "would write" if dry_run else "wrote"
    typer.echo(
        f"{done} {report.target}: {report.tensors} tensors, {_size(report.bytes)}, "
        f"{report.carried} carried through, {len(report.files)} other files"
    )
    for note in report.notes:
        typer.echo(f"  {note}")


def _print_comparison(result: Any) -> None:
    for name in result.missing:
        typer.echo(f"missing  {name}")
    for name in result.extra:
        typer.echo(f"extra    {name}")
    for field in result.config:
        typer.echo(f"config   {field}")
    for one in result.differences:
        detail = f"{one.first} / {one.second}"
        if one.what == "values":
            detail = f"{one.elements} elements, largest difference {one.largest:.3g}"
        typer.echo(f"{one.what:8} {one.name}: {detail}")
    for note in result.notes:
        typer.echo(f"note     {note}")
    verdict = "equal" if result.equal else "DIFFERENT"
    typer.echo(f"{verdict}: {result.tensors} tensors compared, {_size(result.bytes)}")


def _shown(name: str, value: Any) -> str:
    if name == "bytes":
        return _size(value)
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {_size(one) if name == 'dtypes' else one}" for key, one in value.items()
        )
    return str(value)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


if __name__ == "__main__":
    run()
