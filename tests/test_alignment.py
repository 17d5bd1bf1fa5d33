"""The alignment view: scores against plain computation, and a run found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import SMALL

from recbole_llm.errors import UserError
from recbole_llm.evaluation import alignment
from recbole_llm.evaluation.alignment import Aligned, Space, disparity, neighbours, overlap, recall, rotated_recall
from recbole_llm.inspection import inspect
from recbole_llm.training.runs import run


def cloud(seed: int, rows: int = 40, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width))


def rotation(seed: int, width: int = 6) -> np.ndarray:
    return np.linalg.qr(cloud(seed, width, width))[0]


@given(st.integers(0, 50), st.floats(0.1, 10))
def test_a_turned_scaled_and_moved_copy_is_the_same_shape(seed: int, scale: float) -> None:
    texts = cloud(seed)
    items = scale * texts @ rotation(seed + 1) + 3
    assert disparity(items, texts) == pytest.approx(0, abs=1e-9)
    assert disparity(cloud(seed + 2), texts) > 0.3
    assert disparity(np.ones_like(texts), texts) == 1.0
    assert rotated_recall(items, texts, np.arange(40), 1, seed) == 1.0
    assert recall(scale * texts, texts, np.arange(40), 1) == 1.0


@given(st.integers(0, 50), st.integers(1, 5))
def test_recall_is_the_plain_count_over_distinct_texts(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    table = cloud(seed, 15)
    owner = np.append(rng.integers(0, 15, 15), np.arange(15))
    items = cloud(seed + 1, 30)
    hits = 0
    for item, own in zip(items, owner, strict=True):
        cosines = [item @ text / np.linalg.norm(item) / np.linalg.norm(text) for text in table]
        hits += own in sorted(range(15), key=lambda text: -cosines[text])[:k]
    assert recall(items, table[owner], owner, k) == hits / 30


@given(st.integers(0, 50))
def test_neighbours_and_their_overlap_are_plain_loops(seed: int) -> None:
    left, right = cloud(seed, 12), cloud(seed + 1, 12)

    def near(rows: np.ndarray) -> list[set[int]]:
        rows = rows - rows.mean(0)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return [
            set(
                sorted((other for other in range(12) if other != one), key=lambda other: -(rows[one] @ rows[other]))[:3]
            )
            for one in range(12)
        ]

    expected = np.mean([len(one & other) / 3 for one, other in zip(near(left), near(right), strict=True)])
    assert overlap(neighbours(left, 3), neighbours(right, 3)) == pytest.approx(expected)
    # Pairs exchanged: the same as turning the table of texts itself.
    order = np.random.default_rng(seed).permutation(12)
    turned = alignment._renamed(neighbours(right, 3), order)
    assert [set(row) for row in turned.tolist()] == [set(row) for row in neighbours(right[order], 3).tolist()]


def test_unrelated_spaces_score_chance_and_related_ones_above_it() -> None:
    texts = cloud(0, 200, 16)
    spaces = [
        Space("unrelated", cloud(1, 200, 16)),
        Space("related", texts @ rotation(2, 16) + 0.1 * cloud(3, 200, 16)),
    ]
    names = [str(number) for number in range(200)]
    scores = alignment.score(Aligned(names, names, spaces, {"texts": texts}, 7))["references"]["texts"]
    for name, entry in scores["unrelated"].items():
        assert entry["value"] == pytest.approx(entry["shuffled"], abs=0.06), name
        if entry["chance"] is not None:
            assert entry["shuffled"] == pytest.approx(entry["chance"], abs=0.02), name
    related = scores["related"]
    assert related["procrustes disparity"]["value"] < 0.1 < related["procrustes disparity"]["shuffled"]
    assert related["recall@1, rotated"]["value"] > 0.9 > related["recall@1"]["value"]
    assert related["shared 10 neighbours"]["value"] > 0.5


@pytest.fixture
def finished(settings_of: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    def make(model: str = "GLTA", **more: Any) -> Path:
        settings = settings_of(item_text="{movie_title} {class}", **SMALL.get(model, {})) | more
        return Path(run(model, "small", config_dict=settings)["result_file"]).parent

    return make


def test_a_run_is_found_again_and_shown(finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished(alignment_epochs=2, train_item_projector=False)
    stages = sorted((folder.parent / "cache").iterdir())
    view = alignment.aligned(folder, states=True)
    assert [space.moment for space in view.spaces] == ["before item_text_alignment", "after item_text_alignment"]
    before, after = (space.items for space in view.spaces)
    assert before.shape == after.shape == (len(view.texts), 16) and not np.allclose(before, after)
    assert len(view.references) == 2 and all(table.shape == after.shape for table in view.references.values())
    monkeypatch.setattr(alignment, "can_draw", lambda: False)
    text = inspect(["alignment", str(folder)])
    assert "matplotlib is not installed" in text and "chance" in text
    scores = json.loads((folder / "alignment.json").read_text(encoding="utf-8"))
    assert scores["items"] == len(view.texts)
    assert sorted((folder.parent / "cache").iterdir()) == stages, "a look adds nothing to the cache"


def test_the_projector_after_a_stage_is_the_one_the_stage_kept(finished: Callable[..., Path]) -> None:
    from recbole_llm.training.state import load_state

    folder = finished(train_item_projector=True, **{"graph_model.embedding_size": 8})
    view = alignment.aligned(folder)
    assert [space.moment for space in view.spaces][1:] == ["after item_text_alignment", "after user_item_alignment"]
    weights = load_state(next((folder.parent / "cache").glob("user_item_alignment-*")) / "weights.safetensors")[
        "state_dict"
    ]
    assert weights["item_projector.weight"].shape == (16, 8)
    # The map is linear, so the spaces' spans tell whose weights they are.
    span = np.linalg.svd(weights["item_projector.weight"].double().numpy(), full_matrices=False)[0]
    last = view.spaces[-1].items - weights["item_projector.bias"].double().numpy()
    assert np.allclose(last @ span @ span.T, last, atol=1e-5)
    assert not np.allclose(view.spaces[1].items, view.spaces[2].items)


def test_the_picture_is_drawn(finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="MATPLOTLIB MISSING: the picture is not drawn (pip install '.[test]')")
    monkeypatch.setattr(alignment, "MAPPED_ITEMS", 100)  # a thousand take t-SNE most of a minute
    folder = finished()
    assert str(folder / "alignment.png") in inspect(["alignment", str(folder)])
    assert (folder / "alignment.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_have_no_alignment_to_show_are_refused(finished: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="BPR has no items in a language model's space"):
        inspect(["alignment", str(finished("BPR"))])
    folder = finished()
    with pytest.raises(UserError, match="--picture"):
        inspect(["alignment", str(folder), "--picture=false"])
    for stage in (folder.parent / "cache").glob("item_text_alignment-*"):
        stage.rename(stage.with_name("gone"))
    with pytest.raises(UserError, match="run it again"):
        inspect(["alignment", str(folder)])
