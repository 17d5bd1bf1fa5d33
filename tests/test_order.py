"""The order of a table's systems beside a paper's, against values worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.leaderboard.order import order_of
from recbole_llm.leaderboard.paper import beside_paper
from recbole_llm.leaderboard.words import orders


def test_values_worked_out_by_hand() -> None:
    # d = (1, -1, 1, -1, 0): rho = 1 - 6 * 4 / (5 * 24). Of 10 pairs 2 are exchanged: tau = (8 - 2) / 10.
    order = order_of([1, 2, 3, 4, 5], [20, 10, 40, 30, 50])
    assert order is not None and order.systems == 5
    assert order.spearman == pytest.approx(0.8) and order.kendall == pytest.approx(0.6)
    # Of the 120 orders, sums of squared d: 0 in 1, 2 in 4, 4 in 3; exchanged pairs: none in 1, one in 4, two in 9.
    assert order.spearman_p == pytest.approx(2 * (1 + 4 + 3) / 120)
    assert order.kendall_p == pytest.approx(2 * (1 + 4 + 9) / 120)


def test_ties_have_the_mean_of_their_ranks() -> None:
    # Ranks 1, 2, 3, 4 and 1, 2.5, 2.5, 4, centred: rho = 4.5 / sqrt(5 * 4.5); tau-b = 5 / sqrt(6 * 5).
    order = order_of([0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.6, 0.9])
    assert order is not None
    assert order.spearman == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert order.kendall == pytest.approx(5 / math.sqrt(6 * 5))
    # Two of the 24 orders agree as much: the two equal ones may stand either way.
    assert order.spearman_p == order.kendall_p == pytest.approx(2 * 2 / 24)


def test_too_few_systems_or_no_order_at_all_say_nothing() -> None:
    assert order_of([1, 2], [1, 2]) is None and order_of([], []) is None
    assert order_of([1, 2, 3], [4, 4, 4]) is None and order_of([4, 4, 4], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="3 and 2"):
        order_of([1, 2, 3], [1, 2])


@given(st.permutations(range(5)))
def test_chance_is_the_share_of_orders_that_agree_or_disagree_as_much(ours: list[int]) -> None:
    order = order_of(range(5), ours)
    assert order is not None
    counts: dict[str, list[float]] = {"spearman": [], "kendall": []}
    for other in itertools.permutations(range(5)):
        counts["spearman"].append(1 - sum((one - two) ** 2 for one, two in enumerate(other)) / 20)
        pairs = itertools.combinations(other, 2)
        counts["kendall"].append(sum(1 if one < two else -1 for one, two in pairs) / 10)
    for name, values in counts.items():
        own = getattr(order, name)
        tails = (sum(value >= own - 1e-9 for value in values), sum(value <= own + 1e-9 for value in values))
        assert getattr(order, f"{name}_p") == pytest.approx(min(1, 2 * min(tails) / 120))


def test_many_systems_are_drawn_and_the_draw_is_always_the_same() -> None:
    first, again = (order_of(range(12), range(12, 0, -1)) for _ in range(2))
    assert first == again and first is not None
    assert first.spearman == pytest.approx(-1) and 0 < first.spearman_p <= 0.001


PAPER: dict[str, Any] = {
    "source": "A paper",
    "beside": {"toy": "Large"},
    # Two rows stand for one of its systems; the first counts. One of its systems has no row here, one row no figure.
    "rows": {"ours": "Ours", "ours, bare": "Ours", "A": "A", "B": "B", "C": "C"},
    "missing": {"D": "not here"},
    "figures": {
        "Large": {
            "Ours": {"NDCG@10": 0.4, "Hit@10": 0.4}, "A": {"NDCG@10": 0.3, "Hit@10": 0.1}, "B": {"NDCG@10": 0.2},
            "C": {"NDCG@10": 0.1, "Hit@10": 0.2}, "D": {"NDCG@10": 0.05, "Hit@10": 0.05},
        }
    },
}  # fmt: skip


def beside(means: dict[str, float]) -> dict[str, Any]:
    rows = [
        {"name": name, "metrics": {"ndcg@10": {"mean": mean}, "hit@10": {"mean": mean}}} for name, mean in means.items()
    ]
    found = beside_paper(PAPER, "toy", {"rows": rows})
    assert found is not None
    return found


def test_a_system_counts_once_and_only_where_both_sides_have_it() -> None:
    found = beside({"ours, bare": 0.01, "ours": 0.4, "A": 0.3, "B": 0.1, "C": 0.2})
    ndcg, hit = found["orders"]
    assert (ndcg["metric"], ndcg["systems"], hit["metric"], hit["systems"]) == ("ndcg@10", 4, "hit@10", 3)
    # Neighbours B and C are exchanged: rho = 1 - 6 * 2 / (4 * 15), tau = (5 - 1) / 6.
    assert ndcg["spearman"] == pytest.approx(0.8) and ndcg["kendall"] == pytest.approx(2 / 3)
    # Ours 3 1 2 beside 3 2 1.
    assert hit["spearman"] == pytest.approx(0.5) and hit["kendall"] == pytest.approx(1 / 3)


def test_a_row_that_failed_is_no_system() -> None:
    found = beside({"ours": 0.4, "A": 0.3, "B": 0.1})
    assert [order["metric"] for order in found["orders"]] == ["ndcg@10"], "two systems have hit@10"
    assert orders(found) == [
        "ndcg@10, 3 systems: Spearman's rho +1.00, p 0.33; Kendall's tau +1.00, p 0.33",
    ]
    assert beside({"ours": 0.4, "A": 0.3})["orders"] == [] and orders(beside({})) == []
