"""``bench/results/<device kind>.csv``: rows of all runs, added to and read again."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_results import COLUMNS, SAVE_EVERY, Results, now, write_atomically

__all__ = ["SAVE_EVERY", "Table", "latest", "read"]
NUMBERS = ("value", "p20", "p50", "p80")


class Table(Results):
    """Rows of a run, appended to a CSV that other runs have written to.

    All rows of a run have the same ``time``: when it began. The file is replaced as a whole each time.

    Args:
        path: the CSV; it is made where it is missing.
        gpu: the device's name, of a CPU too.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path, gpu: str) -> None:
        super().__init__(path.parent, gpu)
        self.path, self.moment, self._written = path, now(), 0
        read(path)

    def save(self) -> None:
        new = self.rows[self._written :]
        if not new:
            return
        # Read anew: another run may have added to it.
        write_atomically(self.path, _text([*read(self.path), *new]))
        self._written = len(self.rows)


def _text(rows: Iterable[dict[str, Any]]) -> str:
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV as text; none where there is no file.

    Raises:
        ValueError: the file has other columns than ``gpu_results.COLUMNS``.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} must have the columns {','.join(COLUMNS)}, got {','.join(reader.fieldnames or ())}; "
                "move it away, or write to another directory with --output"
            )
        return list(reader)


def latest(rows: Iterable[dict[str, str]]) -> list[dict[str, Any]]:
    """Of each measurement the rows of its last run on the device that was measured last, their figures as numbers.

    A measurement is a kernel or model in one mode at one size. They come in the order in which they were first made, so
    that to repeat some of them replaces their figures and leaves the rest.
    """
    rows = list(rows)
    device = max(rows, key=lambda row: row["time"])["gpu"] if rows else ""
    rows = [row for row in rows if row["gpu"] == device]
    measurements: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        measurements.setdefault((row["kernel"], row["mode"], row["x"]), []).append(row)
    return [
        {**row, **{name: float(row[name]) for name in NUMBERS}}
        for measured in measurements.values()
        for row in measured
        if row["time"] == max(other["time"] for other in measured)
    ]
