"""``qwen35 data``: text and conversations to what training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen35_mcore.process.interrupts import quiet_imports

app = typer.Typer(
    help="Turn text into Megatron's .bin/.idx files, conversations with images into Energon's.",
    no_args_is_help=True,
)


@app.command()
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


@app.command()
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
