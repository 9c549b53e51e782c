"""What the markdown files name is there: options, flags, files, headings, parallel modes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.helpers import documents
from tests.helpers.click_words import click_command, click_options
from tests.helpers.documents import ROOT, Link, fragments
from tests.helpers.flag_words import megatron_parser


def test_named_options_exist() -> None:
    """Of commands that are named in a sentence or outlined in a block without a language."""
    for where, words in fragments("qwen35", "qwen35-ckpt"):
        command, rest = click_command(words[0]), words[1:]
        while rest and not rest[0].startswith("-") and hasattr(command, "commands"):
            assert rest[0] in command.commands, (where, words)
            command, rest = command.commands[rest[0]], rest[1:]
        if command.context_settings.get("ignore_unknown_options"):  # `qwen35 flags --any-flag`
            continue
        asked = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert asked <= click_options(command), (where, words)


def test_named_flags_exist() -> None:
    """Flags that stand alone in a sentence are of Megatron, of this package or of its scripts."""
    known = {option for action in megatron_parser()._actions for option in action.option_strings}
    known |= click_options(click_command("qwen35")) | click_options(click_command("qwen35-ckpt"))
    for name in documents.tracked():
        scripts = r"^(launch|examples|tests/bench)/.*\.(py|sh|sbatch)$"
        if re.search(rf"{scripts}|/(arguments|image_flags)\.py$", name):
            known |= set(re.findall(r"--[a-z][a-z0-9-]+", (ROOT / name).read_text()))
    named = [(where, " ".join(words)) for where, words in fragments("torchrun")]
    for document in documents.documents():
        named += [(document, code) for code in documents.inline_code(document) if code[:2] == "--"]
    for where, text in named:
        assert set(re.findall(r"(?<!\S)--[a-z][\w-]+", text)) <= known, (where, text)


def test_named_files_exist() -> None:
    """A path of the repository, or the name of a script, that stands in a sentence."""
    tops = {name.partition("/")[0] for name in documents.tracked() if "/" in name}
    names = {Path(name).name for name in documents.tracked()}
    for document in documents.documents():
        for code in documents.inline_code(document):
            if not re.fullmatch(r"\w[\w./-]*", code):
                continue
            is_script = code.endswith((".py", ".sh", ".sbatch"))
            if "/" not in code:
                assert not is_script or code in names, (document, code)
            elif is_script or code.partition("/")[0] in tops:
                beside = os.path.normpath(Path(document).parent / code)
                assert {code.rstrip("/"), beside} & documents.tracked(), (document, code)


@pytest.mark.parametrize("link", documents.links(), ids=lambda link: f"{link.where}->{link.target}")
def test_links_lead_somewhere(link: Link) -> None:
    path, _, anchor = link.target.partition("#")
    folder = Path(link.document).parent
    target = os.path.normpath(folder / path) if path else link.document
    assert target in documents.tracked()
    if anchor:
        assert anchor in documents.headings(target)


def test_the_table_of_parallel_modes_has_every_mode() -> None:
    from tests.distributed.cases import CASES

    text = (ROOT / "tests/distributed/README.md").read_text()
    table = text[text.index("| mode |") :]
    rows = re.findall(r"^\| (.+?) \| \d ", table, flags=re.M)
    assert rows == [case.name for case in CASES]
