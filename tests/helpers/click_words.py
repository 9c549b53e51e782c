"""Words of the command lines of this package, read by the parser that would run them."""

from __future__ import annotations

from typing import Any

import typer


def click_command(program: str) -> Any:
    from checkpoint_tools.cli import app as checkpoint_app
    from qwen35_mcore.cli import app

    return typer.main.get_command({"qwen35": app, "qwen35-ckpt": checkpoint_app}[program])


def parse_click(command: Any, words: list[str]) -> None:
    """Parse without running; raises a usage error where the command would not run."""
    context = command.make_context(words[0], words[1:])
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def click_options(command: Any) -> set[str]:
    """The options of a command and of all commands in it."""
    own = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    return own.union(*(click_options(one) for one in getattr(command, "commands", {}).values()))
