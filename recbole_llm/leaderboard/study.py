"""What of a suite has been run, and what has to be: the cells that settings chosen on valid leave open come last."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_llm.errors import UserError
from recbole_llm.evaluation.results import read_run
from recbole_llm.leaderboard.choice import decide
from recbole_llm.leaderboard.suite import Cell

# Of the file beside a cell's result that says why there is none.
REASON = ".reason.txt"


@dataclass
class Study:
    """A suite's cells, and why some have no result.

    Attributes:
        cells: all that may run; of a row with settings to choose, every value with every seed.
        folder: where results go.
        metric: by which settings are chosen on valid.
        only: the rows to run; ``None``, all. What others have is shown all the same.
        reasons: why a cell has failed in this call; :meth:`reason` knows of earlier ones too.
    """

    cells: list[Cell]
    folder: Path
    metric: str = "ndcg@10"
    only: frozenset[str] | None = None
    reasons: dict[Cell, str] = field(default_factory=dict)
    _whole: set[Path] = field(default_factory=set)

    def file(self, cell: Cell) -> Path:
        """Where a cell's result is."""
        return self.folder / "cells" / cell.file

    def done(self, cell: Cell) -> bool:
        """Whether it is there and can be read; one that was damaged since is measured again."""
        file = self.file(cell)
        if file not in self._whole and file.is_file():
            try:
                read_run(file)
            except UserError:
                return False
            self._whole.add(file)
        return file in self._whole

    def reason(self, cell: Cell) -> str:
        """Why a cell has no result, as this call or an earlier one found; empty where nothing is known."""
        file = self.file(cell).with_suffix(REASON)
        if cell in self.reasons or self.done(cell) or not file.is_file():
            return self.reasons.get(cell, "")
        return file.read_text(encoding="utf-8")

    def choice(self, place: tuple[str, str, str], row: str, final: bool = True) -> dict[str, Any] | None:
        """How a row's open settings are chosen.

        Args:
            place: the row's table.
            row: its name.
            final: runs that failed in an earlier call are still to be tried; without, they count as failed.

        Returns:
            See :func:`recbole_llm.leaderboard.choice.decide`; ``None`` where nothing is open, or as long as the runs
            that decide are not over.
        """
        tried = [cell for cell in self.cells if (cell.place, cell.row) == (place, row) and self._decides(cell)]
        why = self.reasons.get if final else self.reason
        runs = [(cell.choice, self.file(cell) if self.done(cell) else None, why(cell) or "") for cell in tried]
        return decide(runs, self.metric.lower(), tried[0].seed) if tried else None

    def wanted(self) -> list[Cell]:
        """The cells that by now are known to be run: all but what is still open, or was not chosen."""
        cells = self._to_run()
        open_rows = dict.fromkeys((cell.place, cell.row) for cell in cells if self._decides(cell))
        settled = {(place, row): self.choice(place, row) for place, row in open_rows}
        return [
            cell
            for cell in cells
            if not cell.choice
            or self._decides(cell)
            or cell.choice == (settled[cell.place, cell.row] or {}).get("values")
        ]

    def expected(self) -> int:
        """How many cells will have been wanted in the end."""
        cells = self._to_run()
        sure = sum(not cell.choice or self._decides(cell) for cell in cells)
        later = {(cell.place, cell.row, cell.seed) for cell in cells if cell.choice and not self._decides(cell)}
        return sure + len(later)

    def _to_run(self) -> list[Cell]:
        """The cells of the rows to run."""
        return self.cells if self.only is None else [cell for cell in self.cells if cell.row in self.only]

    def _decides(self, cell: Cell) -> bool:
        """Whether it is one of the first seed's runs of a row with open settings."""
        return bool(cell.choice) and cell.seed == self.cells[0].seed
