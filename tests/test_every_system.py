"""One suite has a row for every system."""

from __future__ import annotations

import pytest

from recbole_llm import registry
from recbole_llm.leaderboard.suite import read_suite

# What the papers compare with and RecBole has; SASRec and BERT4Rec as they are trained here, at all positions at once.
TABLES = ("Pop", "BPR", "ItemKNN", "EASE", "LightGCN", "SASRecAllPositions", "BERT4RecWindows")


@pytest.mark.parametrize(
    "model",
    [
        *TABLES,
        *(
            entry.name
            for entry in registry.entries().values()
            if entry.module.startswith("recbole_llm.") and not entry.fast_of
        ),
    ],
)
def test_every_system_has_a_row(model: str) -> None:
    rows = read_suite("all").rows
    assert model in {settings["model"] for settings in rows.values()}, (
        f"{model} is registered and properties/suite/all.yaml has no row for it: add one, with the budget "
        "that its head states"
    )


def test_sasrec_stands_there_by_both_losses() -> None:
    rows = read_suite("all").rows
    assert rows["SASRec (CE)"].get("loss_type", "CE") == "CE" and rows["SASRec (BCE)"]["loss_type"] == "BCE"
