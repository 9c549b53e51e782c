"""Results as they come: a JSON line and a line to read for each, at once, and the exit status."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED, NOT_RUN = "ok", "failed", "skipped", "not run"
"""A comparison that holds (or a measurement), one that does not (or a run that broke), one that
this machine cannot make, and one for which no time was left."""
LOG_CHARACTERS = 6000
"""Of the end of a log that goes into the row of what failed."""


@dataclass
class Results:
    """Rows of one call; each is on disk before the next piece of work starts.

    Args:
        file: where JSON lines are appended, if anywhere.
        machine: written into every row, so that lines of several calls can share a file.
    """

    file: Path | None
    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, part: str, name: str, status: str, text: str, **data: Any) -> None:
        """Record a result.

        Args:
            text: what a reader of the terminal wants to know of it.
            data: everything else for the file.
        """
        row = {**self.machine, "part": part, "name": name, "status": status, "text": text, **data}
        self.rows.append(row)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{part:9s} {name:44s} {status:8s} {text}", flush=True)

    def of(self, part: str) -> list[dict[str, Any]]:
        """This call's rows of a part."""
        return [row for row in self.rows if row["part"] == part]

    def exit_status(self) -> int:
        """1 if anything failed, or was not run although it was asked for; else 0."""
        return int(any(row["status"] in (FAILED, NOT_RUN) for row in self.rows))


def earlier_rows(file: Path | None, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that earlier calls on the same kind of machine left in the file, the newest of a name.

    A line that a killed call left unfinished counts for nothing.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    lines = file.read_text("utf-8").splitlines() if file is not None and file.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and machine.items() <= row.items():
            found[row["part"], row["name"]] = row
    return list(found.values())


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
