"""The repository's markdown files: commands, Python, inline code and links, each with its place."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SHELL = ("bash", "sh")


class Block(NamedTuple):
    """A fenced block; ``where`` is ``FILE:LINE`` of its fence."""

    where: str
    language: str
    text: str


class Command(NamedTuple):
    """The words of a command, without the variables that are set for it."""

    where: str
    words: list[str]

    @property
    def program(self) -> str:
        """What names the case that covers it: the first word, of a plan's script its file name."""
        return Path(self.words[0]).name


class Link(NamedTuple):
    """A link to a path or a heading of the repository."""

    where: str
    document: str
    target: str


@cache
def tracked() -> frozenset[str]:
    """Files and folders of a fresh clone, relative to its root."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    files = [Path(name) for name in listed if name]
    folders = {folder for file in files for folder in file.parents}
    return frozenset(map(str, [*files, *folders]))


@cache
def documents() -> tuple[str, ...]:
    """Every markdown file of a fresh clone."""
    return tuple(sorted(name for name in tracked() if name.endswith(".md")))


def blocks() -> Iterator[Block]:
    """Every fenced block of every document."""
    for document in documents():
        text = (ROOT / document).read_text()
        for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, flags=re.M):
            line = text.count("\n", 0, found.start()) + 1
            yield Block(f"{document}:{line}", found[1], found[2])


def commands(*programs: str) -> list[Command]:
    """The commands of all shell blocks, or those of some programs."""
    found = [
        command
        for block in blocks()
        if block.language in SHELL
        for command in _commands(block.where, block.text)
    ]
    return [command for command in found if not programs or command.program in programs]


def fragments(*programs: str) -> list[Command]:
    """Parts of the programs' commands: inline code, and lines of blocks without a language."""
    found = [
        command
        for block in blocks()
        if not block.language
        for command in _commands(block.where, block.text)
    ]
    for document in documents():
        for code in inline_code(document):
            found += _commands(document, code)
    return [one for one in found if one.program in programs and len(one.words) > 1]


def inline_code(document: str) -> list[str]:
    """What stands between single backticks, on one line."""
    prose = re.sub(r"^```.*\n(?:.*\n)*?```$", "", (ROOT / document).read_text(), flags=re.M)
    return [" ".join(code.split()).replace("\\|", "|") for code in re.findall("`([^`]+)`", prose)]


def links() -> list[Link]:
    """Every link that does not leave the repository."""
    found = []
    for document in documents():
        for number, line in enumerate((ROOT / document).read_text().splitlines(), start=1):
            for target in re.findall(r"\]\(([^)]+)\)", line):
                if not re.match(r"[a-z]+:", target):
                    found.append(Link(f"{document}:{number}", document, target))
    return found


def headings(document: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", (ROOT / document).read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _commands(where: str, text: str) -> Iterator[Command]:
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # inline code need not be a command
            continue
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if words:
            yield Command(where, words)
