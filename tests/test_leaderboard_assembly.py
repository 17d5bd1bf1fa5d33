"""From runs to a table: what counts and what is refused, the best baseline, tests, bold, cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_runs import STAGE, write_rankings, write_run
from scipy import stats
from statsmodels.stats.multitest import multipletests

from recbole_llm.errors import UserError
from recbole_llm.leaderboard.assemble import table_of
from recbole_llm.leaderboard.details import with_details
from recbole_llm.leaderboard.paper import beside_paper
from recbole_llm.leaderboard.rows import RowRuns
from recbole_llm.leaderboard.words import agreement, judged, own_bases, unshared

METRIC = "ndcg@10"


def table(rows: list[RowRuns], **changes: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "dataset": "toy", "protocol": "", "column": "", "metric": "NDCG@10", "metrics": ["NDCG@10"], "reference": None,
        "baselines": None, "alpha": 0.05,
    }  # fmt: skip
    made = table_of(rows, **asked | changes)
    json.dumps(made, allow_nan=False)
    return made


def named(made: dict[str, Any], name: str) -> dict[str, Any]:
    (row,) = (row for row in made["rows"] if row["name"] == name)
    return row


def around(mean: float, seed: int, users: int = 200) -> np.ndarray:
    values = np.random.default_rng(seed).normal(mean, 0.1, users)
    return values - values.mean() + mean


def test_a_row_is_the_mean_of_its_seeds_user_by_user(tmp_path: Path) -> None:
    one, two = around(0.3, 1), around(0.5, 2)
    runs = [write_run(tmp_path / str(seed), "GLTA", seed, values) for seed, values in ((1, one), (2, two))]
    made = table([RowRuns("ours", runs, settings={"epochs": 3})])
    row = named(made, "ours")
    figure = row["metrics"][METRIC]
    low, high = stats.ttest_1samp((one + two) / 2, 0).confidence_interval(0.95)
    assert (figure["mean"], figure["low"], figure["high"]) == pytest.approx((0.4, low, high))
    assert figure["std"] == pytest.approx(np.std([0.3, 0.5], ddof=1))
    assert (row["seeds"], row["kind"], row["baseline"], row["settings"]) == ([1, 2], "language", False, {"epochs": 3})
    assert [curve["seed"] for curve in row["curves"]] == [1, 2] and row["curves"][0]["loss"] == [0.5, 0.4]
    assert made["split"]["fingerprint"] == "f" * 64 and made["evaluation"]["policy"] == "unified"
    assert (made["best_baseline"], made["tests"]) == (None, 0)


def test_rankings_of_one_user_are_tested_together(tmp_path: Path) -> None:
    # Every user is asked about 1 to 5 times and answered much alike, which says no more of the rows than one ranking.
    rng = np.random.default_rng(5)
    of = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    users = [f"u{number:02}" for number in of]
    answered = {"Pop": around(0.3, 1, 40), "GLTA": around(0.33, 2, 40)}
    rows = {name: values[of] + rng.normal(0, 0.01, len(of)) for name, values in answered.items()}
    made = table(
        [
            RowRuns(name, [write_run(tmp_path / name, name, 1, values, users=users, eval_unit="row")])
            for name, values in rows.items()
        ]
    )
    figures = {name: named(made, name)["metrics"][METRIC] for name in rows}
    assert {name: figure["mean"] for name, figure in figures.items()} == pytest.approx(
        {name: values.mean() for name, values in rows.items()}
    )
    sums = {name: [values[of == user].sum() for user in range(40)] for name, values in rows.items()}
    found = figures["GLTA"]["against"]["Pop"]
    assert found["p"] == pytest.approx(stats.ttest_rel(sums["GLTA"], sums["Pop"]).pvalue)
    assert found["difference"] == pytest.approx((rows["GLTA"] - rows["Pop"]).mean())
    assert found["p"] > 2 * stats.ttest_rel(rows["GLTA"], rows["Pop"]).pvalue, "else the test shows nothing"
    assert "the mean over rankings" in judged(made)


def test_the_best_baseline_is_chosen_on_valid_and_never_on_test(tmp_path: Path) -> None:
    rows = [
        RowRuns("Pop", [write_run(tmp_path / "pop", "Pop", 1, around(0.4, 1), valid=0.2)]),
        RowRuns("BPR", [write_run(tmp_path / "bpr", "BPR", 1, around(0.3, 2), valid=0.3)]),
        RowRuns("GLTA", [write_run(tmp_path / "glta", "GLTA", 1, around(0.5, 3), valid=0.9)]),
    ]
    made = table(rows)
    assert [row["name"] for row in made["rows"]] == ["GLTA", "Pop", "BPR"]
    assert made["best_baseline"] == "BPR"
    assert table(rows, baselines=["Pop"])["best_baseline"] == "Pop"
    assert table(rows, baselines=["GLTA", "Pop"])["best_baseline"] == "GLTA"


def test_every_row_is_tested_against_both_and_all_pairs_are_corrected_together(tmp_path: Path) -> None:
    values = {"Pop": around(0.30, 1), "BPR": around(0.32, 2), "EASE": around(0.315, 3), "GLTA": around(0.33, 4)}
    rows = [
        RowRuns(name, [write_run(tmp_path / name, name, 1, own, valid=0.9 if name == "BPR" else 0.1)])
        for name, own in values.items()
    ]
    made = table(rows, reference="GLTA")
    # BPR against GLTA is GLTA against BPR: one test.
    pairs = [("Pop", "BPR"), ("EASE", "BPR"), ("GLTA", "BPR"), ("Pop", "GLTA"), ("EASE", "GLTA")]
    assert (made["best_baseline"], made["reference"], made["tests"]) == ("BPR", "GLTA", len(pairs))
    plain = [stats.ttest_rel(values[one], values[other]).pvalue for one, other in pairs]
    adjusted = multipletests(plain, method="holm")[1]
    assert min(plain) < 0.05 < max(plain), "else the marks show nothing"
    for (one, other), p, after in zip(pairs, plain, adjusted, strict=True):
        found = named(made, one)["metrics"][METRIC]["against"][other]
        assert (found["p"], found["p_adjusted"]) == pytest.approx((p, after))
        difference = (values[one] - values[other]).mean()
        assert found["difference"] == pytest.approx(difference)
        assert found["mark"] == ("" if after >= 0.05 else "+" if difference > 0 else "-")
    mirrored = named(made, "BPR")["metrics"][METRIC]["against"]
    assert list(mirrored) == ["GLTA"]
    forward = named(made, "GLTA")["metrics"][METRIC]["against"]["BPR"]
    assert mirrored["GLTA"]["p_adjusted"] == forward["p_adjusted"]
    assert mirrored["GLTA"]["difference"] == pytest.approx(-forward["difference"])


def test_bold_is_only_what_is_significantly_better(tmp_path: Path) -> None:
    def bold(**means: float) -> list[str]:
        folder = tmp_path / "-".join(f"{name}{mean}" for name, mean in means.items())
        rows = [
            RowRuns(name, [write_run(folder / name, name, 1, around(mean, place), valid=float(name == "BPR"))])
            for place, (name, mean) in enumerate(means.items())
        ]
        return [row["name"] for row in table(rows)["rows"] if row["metrics"][METRIC]["bold"]]

    assert bold(BPR=0.3, Pop=0.2, GLTA=0.5) == ["GLTA"]
    assert bold(BPR=0.3, Pop=0.6, GLTA=0.5) == ["Pop", "GLTA"], "chosen on valid, another baseline may still be better"
    assert bold(BPR=0.5, Pop=0.2, GLTA=0.3) == ["BPR"]
    assert bold(BPR=0.300, Pop=0.2, GLTA=0.301) == [], "the highest value, but no more than chance"
    assert bold(BPR=0.301, Pop=0.2, GLTA=0.300) == []
    assert bold(BPR=0.3) == [], "nothing to be better than"


def damage_users(run: Path) -> None:
    with np.load(run / "per_user.npz") as arrays:
        content = dict(arrays)
    content[METRIC][3] += 0.5
    np.savez(run / "per_user.npz", **content)


def damage_result(run: Path) -> None:
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    result["test"][METRIC] += 0.01
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")


def damage_keys(run: Path) -> None:
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    del result["evaluation"]
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")


def damage_archive(run: Path) -> None:
    (run / "per_user.npz").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("changes", "harm", "words"),
    [
        ({"fingerprint": "0123456789abcdef" * 4}, None, "another split: 0123456789abcdef, .* ffffffffffffffff"),
        ({"policy": "recbole"}, None, "policy recbole .*unified"),
        ({"exclude_history": False}, None, "exclude_history False .*True"),
        ({"eval_unit": "row"}, None, "eval_unit row .*user"),
        ({"ranking": "sampled"}, None, "ranking sampled .*full"),
        ({"counted": "0123456789abcdef"}, None, "counted 0123456789abcdef .*is None"),
        ({"fingerprint": None}, None, "no fingerprint"),
        ({"users": [f"v{number}" for number in range(200)]}, None, "other users: .* both have 0"),
        ({"seed": 1}, None, "seed 1 stands twice"),
        ({}, damage_users, "per_user.npz of .* does not agree"),
        ({}, damage_result, "does not agree"),
        ({}, damage_archive, "cannot be read"),
        ({}, damage_keys, "says nothing of evaluation"),
    ],
)
def test_what_was_not_judged_alike_is_refused_by_name_and_counts_nowhere(
    tmp_path: Path, changes: dict[str, Any], harm: Callable[[Path], None] | None, words: str
) -> None:
    base = write_run(tmp_path / "base", "BPR", 1, around(0.2, 1))
    good = write_run(tmp_path / "good", "GLTA", 1, around(0.3, 2))
    odd = write_run(tmp_path / "odd", "GLTA", changes.pop("seed", 2), around(0.9, 3), valid=0.9, **changes)
    if harm:
        harm(odd)
    expected = table([RowRuns("BPR", [base]), RowRuns("GLTA", [good])])
    found = table([RowRuns("BPR", [base]), RowRuns("GLTA", [good, odd])])
    (refused,) = named(found, "GLTA")["refused"]
    seed = json.loads((odd / "result.json").read_text(encoding="utf-8"))["seed"]
    assert (refused["seed"], refused["run"]) == (seed, str(odd))
    with pytest.raises(UserError, match=words):
        raise UserError(refused["reason"])
    named(found, "GLTA")["refused"] = []
    assert found == expected

    # A row of which nothing is left stands last, without any figure.
    if "stands twice" not in words:
        found = table([RowRuns("GLTA", [odd]), RowRuns("BPR", [base]), RowRuns("Pop", [good])])
        row = found["rows"][-1]
        assert (row["name"], row["metrics"], row["seeds"], row["runs"]) == ("GLTA", {}, [], [])
        assert row["refused"][0]["reason"] and found["best_baseline"] in ("BPR", "Pop")


def test_a_search_of_the_whole_catalogue_stands_beside_full_rankings(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", "BPR", 1, around(0.2, 1))
    beam = write_run(tmp_path / "beam", "GLTA", 1, around(0.3, 2), ranking="beam")
    found = table([RowRuns("BPR", [base]), RowRuns("GLTA", [beam])])
    assert not named(found, "GLTA")["refused"] and named(found, "GLTA")["seeds"] == [1]


def test_the_table_is_for_what_the_most_runs_were_judged_on(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", "Pop", 1, around(0.2, 1), fingerprint="1" * 64)
    others = [write_run(tmp_path / f"{seed}", "BPR", seed, around(0.2, seed), fingerprint="2" * 64) for seed in (1, 2)]
    rows = [RowRuns("Pop", [first]), RowRuns("BPR", others)]
    assert table(rows)["split"]["fingerprint"] == "2" * 64
    assert table(rows, like=first)["split"]["fingerprint"] == "1" * 64
    assert [refused["seed"] for refused in named(table(rows, like=first), "BPR")["refused"]] == [1, 2]
    assert table([rows[0], RowRuns("BPR", others[:1])])["split"]["fingerprint"] == "1" * 64, "a tie: the first row's"


def test_a_row_whose_seeds_all_agree_is_sound(tmp_path: Path) -> None:
    values = around(0.3, 1)
    runs = [write_run(tmp_path / str(seed), "EASE", seed, values, valid=0.5) for seed in (1, 2, 3)]
    single = write_run(tmp_path / "single", "EASE", 1, values, valid=0.4)
    made = table([RowRuns("three", runs), RowRuns("one", [single])])
    assert named(made, "three")["metrics"][METRIC]["std"] == pytest.approx(0, abs=1e-12)
    against = named(made, "one")["metrics"][METRIC]["against"]["three"]
    assert (against["difference"], against["p_adjusted"], against["mark"]) == (0.0, 1.0, "")


def test_failed_rows_keep_their_reason_and_partial_ones_their_figures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "BPR", 1, around(0.2, 1))
    made = table([
        RowRuns("broken", failed=[{"seed": None, "reason": "no such model"}], settings={"model": "GLTA"}),
        RowRuns("BPR", [run], failed=[{"seed": 2, "reason": "diverged"}]),
    ])  # fmt: skip
    assert [row["name"] for row in made["rows"]] == ["BPR", "broken"]
    assert named(made, "broken")["failed"] == [{"seed": None, "reason": "no such model"}]
    assert (named(made, "broken")["model"], named(made, "broken")["baseline"]) == ("GLTA", False)
    assert named(made, "BPR")["failed"][0]["seed"] == 2 and named(made, "BPR")["seeds"] == [1]
    nothing = table([RowRuns("broken", failed=[{"seed": 1, "reason": "no such model"}])])
    assert (nothing["split"], nothing["evaluation"], nothing["tests"]) == (None, None, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"reference": "BRP"}, "reference: 'BRP' is no row; did you mean 'BPR'"), ({"baselines": ["x"]}, "rows: BPR")],
)
def test_names_that_are_no_rows_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    run = write_run(tmp_path / "run", "BPR", 1, around(0.2, 1))
    with pytest.raises(UserError, match=words):
        table([RowRuns("BPR", [run])], **changes)


def test_cost_is_what_it_was_when_made(tmp_path: Path) -> None:
    def stage(fingerprint: str, seconds: float, memory: float, tokens: int | None, cached: bool) -> dict[str, Any]:
        return STAGE | {
            "fingerprint": fingerprint, "seconds": seconds, "peak_memory_mb": memory, "tokens": tokens, "cached": cached
        }  # fmt: skip

    twice = [stage("a", 10, 300, 0, True), stage("b", 5, 200, 1000, True), stage("a", 10, 300, 0, True)]
    runs = [
        write_run(tmp_path / "1", "GLTA", 1, around(0.2, 1), stages=twice),
        write_run(tmp_path / "2", "GLTA", 2, around(0.2, 2), stages=[stage("c", 25, 500, 3000, False)]),
    ]
    cost = named(table([RowRuns("GLTA", runs)]), "GLTA")["cost"]
    assert cost == {
        "seconds": 20.0, "peak_memory_mb": 400.0, "parameters": 2000, "trainable": 1000, "tokens": 2000,
        "users_per_second": 500.0,
    }  # fmt: skip
    old = write_run(tmp_path / "3", "GLTA", 3, around(0.2, 3), stages=[stage("d", 1, 1, None, True)])
    assert named(table([RowRuns("GLTA", [*runs, old])]), "GLTA")["cost"]["tokens"] is None


def test_metrics_at_every_k_come_from_the_rankings(tmp_path: Path) -> None:
    lists, wanted = [[1, 2, 3], [3, 2, 1], [2, 3, 1]], [[1], [1, 2], [0]]
    recall = {1: (1 + 0 + 0) / 3, 2: (1 + 0.5 + 0) / 3, 3: (1 + 1 + 0) / 3}
    ndcg = (1 + (1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3)) + 0) / 3
    values = {"recall@2": np.array([1, 0.5, 0])}
    more = {"rankings": "rankings.npz", "config": {"dataset": "toy", "data_path": str(tmp_path)}}
    run = write_run(tmp_path / "run", "BPR", 1, values, **more)
    write_rankings(run, lists, wanted, 4)
    found = table([RowRuns("BPR", [run])], metric="recall@2", metrics=[])["rows"][0]
    assert found["at_k"]["recall"] == pytest.approx(list(recall.values()))
    assert found["at_k"]["ndcg"][2] == pytest.approx(ndcg)

    other = write_run(tmp_path / "other", "LCRec", 1, {"recall@2": np.array([0.5, 0.5, 0])}, **more)
    write_rankings(other, lists, wanted, 4)
    (refused,) = table([RowRuns("LCRec", [other])], metric="recall@2")["rows"][0]["refused"]
    assert "does not agree" in refused["reason"]
    result = json.loads((other / "result.json").read_text(encoding="utf-8"))
    result["evaluation"]["prompts"] = 3
    (other / "result.json").write_text(json.dumps(result), encoding="utf-8")
    both = table([RowRuns("BPR", [run]), RowRuns("LCRec", [other])], metric="recall@2", metrics=[])
    assert named(both, "LCRec")["at_k"] == {} and named(both, "LCRec")["seeds"] == [1]
    detailed = with_details(both, "recall@2")
    assert detailed["users"] and "LCRec" not in str([detailed["users"], detailed["breakdowns"]])
    (other / "rankings.npz").unlink()
    assert with_details(table([RowRuns("LCRec", [other])], metric="recall@2"), "recall@2")["users"] == []

    write_rankings(run, lists[:2], wanted[:2], 4)
    (refused,) = table([RowRuns("BPR", [run])], metric="recall@2")["rows"][0]["refused"]
    assert "of different users" in refused["reason"]
    write_rankings(run, lists[::-1], wanted, 4)
    (refused,) = table([RowRuns("BPR", [run])], metric="recall@2")["rows"][0]["refused"]
    assert "rankings.npz of" in refused["reason"] and "does not agree" in refused["reason"]


def test_a_metric_that_is_no_mean_over_users_is_shown_without_tests(tmp_path: Path) -> None:
    rows = []
    for name, coverage in (("BPR", 0.5), ("GLTA", 0.7)):
        run = write_run(tmp_path / name, name, 1, around(0.2, len(name)))
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        result["test"]["itemcoverage@10"] = coverage
        (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
        rows.append(RowRuns(name, [run]))
    figure = named(table(rows, metrics=["NDCG@10", "ItemCoverage@10"]), "GLTA")["metrics"]["itemcoverage@10"]
    assert figure == {
        "mean": 0.7, "low": None, "high": None, "std": None, "valid": None, "bold": False, "against": {},
        "own": None,
    }  # fmt: skip


def test_what_rows_do_not_share_stands_with_each(tmp_path: Path) -> None:
    rows = []
    for name, sees in (("BPR", False), ("SASRec", True)):
        run = write_run(tmp_path / name, name, 1, around(0.2, len(name)))
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        result["evaluation"]["valid_rows_in_test_input"] = sees
        (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
        rows.append(RowRuns(name, [run]))
    made = table(rows)
    assert "valid_rows_in_test_input" not in made["evaluation"] and made["evaluation"]["topk"] == [2]
    assert named(made, "SASRec")["evaluation"] == {"valid_rows_in_test_input": True}
    assert unshared(made) == ["valid_rows_in_test_input: true for SASRec; false for BPR."]
    assert unshared(table(rows[:1])) == []


def test_what_a_rows_seeds_do_not_share_is_their_mean(tmp_path: Path) -> None:
    runs = []
    for seed, share in ((1, 0.1), (2, 0.2)):
        runs.append(write_run(tmp_path / str(seed), "LCRec", seed, around(0.2, seed)))
        result = json.loads((runs[-1] / "result.json").read_text(encoding="utf-8"))
        result["evaluation"] |= {"invalid_share": share, "tied_targets": 20 * seed, "merge_valid": seed == 1}
        (runs[-1] / "result.json").write_text(json.dumps(result), encoding="utf-8")
    made = table([RowRuns("LCRec", runs)])
    wanted = {"invalid_share": pytest.approx(0.15), "tied_targets": 30, "merge_valid": True}
    assert made["rows"][0]["evaluation"] == wanted
    assert not any("tied" in line for line in unshared(made))


def test_a_papers_figures_stand_beside_ours(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "GLTA", 1, around(0.3, 1))
    printed = {"T": {"GLTA": {"NDCG@10": 0.4, "Recall@10": 0.2}}}
    whole = {"source": "x", "beside": {"toy": "T"}, "rows": {"GLTA": "GLTA"}, "figures": printed}
    paper = beside_paper(whole, "toy", table([RowRuns("GLTA", [run])]))
    assert paper is not None
    metrics = paper["rows"][0]["metrics"]
    assert metrics["ndcg@10"] == pytest.approx({"paper": 0.4, "ours": 0.3, "deviation": -0.25})
    assert metrics["recall@10"] == {"paper": 0.2, "ours": None, "deviation": None}


def test_rows_with_bases_of_their_own_are_a_family_of_tests_of_their_own(tmp_path: Path) -> None:
    means = {"BPR": 0.30, "one": 0.31, "one taught": 0.33, "two": 0.29, "two taught": 0.297, "three taught": 0.28}
    bases = {"one taught": "one", "two taught": "two", "three taught": "two"}
    seeds = {
        name: [around(mean, 10 * place + seed) for seed in (1, 2)] for place, (name, mean) in enumerate(means.items())
    }
    rows = [
        RowRuns(
            name,
            [write_run(tmp_path / f"{name}{seed}", "BPR", seed, own) for seed, own in enumerate(found)],
            against=bases.get(name, ""),
        )
        for name, found in seeds.items()
    ]
    made = table(rows, baselines=["BPR"], reference="one")
    values = {name: np.mean(found, axis=0) for name, found in seeds.items()}
    pairs = list(bases.items())
    # The formula of the paired t-test, and Holm's steps one by one.
    plain = []
    for name, base in pairs:
        difference = values[name] - values[base]
        t = difference.mean() / (difference.std(ddof=1) / math.sqrt(len(difference)))
        plain.append(2 * stats.t.sf(abs(t), len(difference) - 1))
    expected, highest = {}, 0.0
    for step, place in enumerate(np.argsort(plain)):
        highest = max(highest, min(1.0, plain[place] * (len(pairs) - step)))
        expected[pairs[place]] = highest
    assert made["pairs"] == 3 and made["tests"] == 9, "best baseline and reference, as without bases"
    signs = []
    for (name, base), p in expected.items():
        found = named(made, name)["metrics"][METRIC]["own"]
        assert found["row"] == base and found["p_adjusted"] == pytest.approx(p)
        assert found["difference"] == pytest.approx(means[name] - means[base])
        assert found["gain"] == pytest.approx(means[name] / means[base] - 1)
        signs.append(found["mark"])
        assert found["mark"] == ("" if p >= 0.05 else "+" if means[name] > means[base] else "-")
    assert len(set(signs)) > 1, "else the marks show nothing"
    for name in means.keys() - bases.keys():
        assert named(made, name)["metrics"][METRIC]["own"] is None and named(made, name)["against"] is None
    (line,) = own_bases({"metric": METRIC, "alpha": 0.05}, made)
    assert "2 of 3 rows are above it" in line and f"{signs.count('+')} significantly; 1 below" in line


def test_a_base_that_has_no_figures_leaves_its_row_untested(tmp_path: Path) -> None:
    rows = [
        RowRuns("BPR", [write_run(tmp_path / "bpr", "BPR", 1, around(0.3, 1))], against="EASE"),
        RowRuns("EASE", failed=[{"seed": 1, "reason": "no memory"}], model="EASE"),
    ]
    made = table(rows)
    assert made["pairs"] == 0 and named(made, "BPR")["metrics"][METRIC]["own"] is None


def taught(folder: Path, seed: int, shared: np.ndarray, whole: bool = True, **changes: Any) -> Path:
    """A run with a teacher; ``whole``: with each user's agreement."""
    run = write_run(folder, "TCA4Rec", seed, around(0.4, seed), **changes)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    result["consistency"] = {"cf_model": {"overlap@10": float(shared.mean()), "rbo@10": 0.5}}
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    if whole:
        with np.load(run / "per_user.npz") as arrays:
            content = dict(arrays)
        place = [int(user[1:]) for user in content["user_id"]]
        np.savez(run / "per_user.npz", **content, **{"cf_model.overlap@10": shared[place]})
    return run


def test_agreement_with_a_teacher_is_shown_with_its_interval_and_not_tested(tmp_path: Path) -> None:
    one, two = (np.random.default_rng(seed).integers(0, 11, 200) / 10 for seed in (1, 2))
    rows = [
        RowRuns("taught", [taught(tmp_path / "1", 1, one), taught(tmp_path / "2", 2, two)], against="BPR"),
        RowRuns("other", [taught(tmp_path / "3", 1, two, whole=False)]),
        RowRuns("BPR", [write_run(tmp_path / "4", "BPR", 1, around(0.3, 5))]),
    ]
    made = table(rows, metrics=["NDCG@10", "consistency@10"], reference="other")
    figure = named(made, "taught")["metrics"]["consistency@10"]
    low, high = stats.ttest_1samp((one + two) / 2, 0).confidence_interval(0.95)
    assert (figure["mean"], figure["low"], figure["high"]) == pytest.approx(((one + two).mean() / 2, low, high))
    assert figure["std"] == pytest.approx(np.std([one.mean(), two.mean()], ddof=1))
    assert not figure["bold"] and figure["against"] == {} and figure["own"] is None and figure["valid"] is None
    other = named(made, "other")["metrics"]["consistency@10"]
    assert other["mean"] == pytest.approx(two.mean()) and other["low"] is None
    assert "consistency@10" not in named(made, "BPR")["metrics"]
    assert agreement(made) and not agreement(table(rows[2:]))


def test_altered_agreement_is_refused(tmp_path: Path) -> None:
    run = taught(tmp_path / "1", 1, np.full(200, 0.5))
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    result["consistency"]["cf_model"]["overlap@10"] = 0.6
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (refused,) = named(table([RowRuns("taught", [run])]), "taught")["refused"]
    assert "cf_model.overlap@10 is 0.500000 over its users and 0.6 in the result" in refused["reason"]
