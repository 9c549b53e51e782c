"""The `qwen35` command; `data` and `plan`, which have many options, in a file each.

Commands import what they need when they run, so that `--help` and `flavors` answer at once and on
a machine without torch. This package may import every other of `qwen35_mcore`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

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

    from qwen35_mcore.cli.data import app as data_app
    from qwen35_mcore.cli.plan import plan

app = typer.Typer(
    name="qwen35",
    help="Qwen3.5 for Megatron-Core: sizes, training data, layouts, a check of the machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")


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


app.command()(plan)


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
