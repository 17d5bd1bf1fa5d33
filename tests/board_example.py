"""A made-up board for the tests of the page: every part of it filled, every figure drawn from one random state."""

from __future__ import annotations

import random
from typing import Any

# Texts that a page which built its markup from data would run, or show as something else.
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    '"><svg onload=window.hacked=3> & &amp; \u2028 {{css}} $& \\u003c',
)
METRICS = ["ndcg@10", "recall@10", "mrr@10", "ndcg@5"]
NAMED_SO = "LightGCN <b>4 layers</b>"
# name, model, kind, NDCG@10 on average, seconds, trainable parameters
MADE = [
    ("GLTA", "GLTA", "language", 0.0911, 612.0, 4_210_000),
    ("GLTA, no alignment", "GLTA", "language", 0.0836, 388.0, 3_900_000),
    ("SASRec", "SASRec", "sequential", 0.0848, 74.0, 213_000),
    ("BERT4Rec", "BERT4Rec", "sequential", 0.0790, 121.0, 231_000),
    (NAMED_SO, "LightGCN", "general", 0.0724, 41.0, 168_000),
    ("BPR", "BPR", "general", 0.0655, 17.0, 168_000),
    ("ItemKNN", "ItemKNN", "general", 0.0602, 1.4, 0),
    ("Pop", "Pop", "general", 0.0231, 0.3, 0),
]
FAILED = ("EASE", "RuntimeError: not enough memory for a matrix of 1349 x 1349 <i>numbers</i>")
REFUSED = ("SASRec, other split", "the split's fingerprint is 77aa01…, that of the other rows is e4095b…")
GROUPS = {
    ("user activity", "users", "ndcg@10"): ["6-19", "20-49", "50-99", "100-199", "≥200"],
    ("history length", "users", "ndcg@10"): ["<10", "10-24", "25-49", "50-99", "≥100"],
    ("item popularity", "test interactions", "hit rate@10"): ["1-4", "5-19", "20-99", "≥100"],
    ("seen and unseen items", "test interactions", "hit rate@10"): ["seen", "unseen"],
}


def board() -> dict[str, Any]:
    """Two tables, the second with a paper's figures and without curves, breakdowns and users."""
    rng = random.Random(7)
    return {
        "schema": 1,
        "title": "Collaborative, sequential and language models",
        "command": "recbole-llm leaderboard --suite=properties/suite/quick.yaml",
        "commit": "6f03ffb1c2a94b0b6e0f1d2c3b4a5968778695a4",
        "made": "2026-11-21T06:00:00+00:00",
        "versions": {"recbole_llm": "0.1.0", "recbole": "1.2.1", "torch": "2.13.0+cpu"},
        "metrics": [*METRICS, "consistency@10"],
        "metric": "ndcg@10",
        "alpha": 0.05,
        "tables": [_full_table(rng), _paper_table(rng)],
    }


def _full_table(rng: random.Random) -> dict[str, Any]:
    rows = [_row(rng, *made) for made in MADE]
    _with_base(rng, rows)
    rows[3]["failed"] = [{"seed": 2022, "reason": "the machine went down"}]
    rows[3]["seeds"] = [2020, 2021]
    rows.append(_without_figures(FAILED[0], "EASE", "general", failed=[{"seed": None, "reason": FAILED[1]}]))
    refused = [{"seed": seed, "reason": REFUSED[1]} for seed in (2020, 2021)]
    rows.append(_without_figures(REFUSED[0], "SASRec", "sequential", refused=refused))
    by_time = {"kind": "LS", "order": "time", "short_users": "drop", "leave_one_mode": "valid_and_test"}
    return {
        **_shared("ml-100k", by_time),
        "rows": rows,
        "breakdowns": [_breakdown(rng, *key, labels) for key, labels in GROUPS.items()],
        "users": [_user(rng, number) for number in range(6)],
        "curve": _curve_over_alpha(rng),
        "papers": [],
    }


def _with_base(rng: random.Random, rows: list[dict[str, Any]]) -> None:
    """A row has a base of its own and a setting that was chosen on valid, and agrees with a teacher."""
    row = rows[1]
    tried = [{"values": {"alpha": alpha}, "valid": 0.08 + alpha / 100, "reason": ""} for alpha in (0.05, 0.3)]
    tried.append({"values": {"alpha": 0.9}, "valid": None, "reason": "<b>the loss</b> is no number"})
    row |= {"against": "GLTA", "choice": {"values": {"alpha": 0.3}, "metric": "ndcg@10", "seed": 2020, "tried": tried}}
    for metric in METRICS:
        figures = [one["metrics"][metric]["mean"] for one in rows[:2]]
        row["metrics"][metric]["own"] = {"row": "GLTA", **_against(rng, figures[1], figures[0])}
    agreement = {"mean": 0.31, "low": 0.29, "high": 0.33, "std": 0.01, "valid": None, "bold": False, "against": {}}
    row["metrics"]["consistency@10"] = agreement | {"own": None}


def _curve_over_alpha(rng: random.Random) -> dict[str, Any]:
    values = {0.0: 0.0, 0.05: 1.1, 1.0: 3.7}
    lines = []
    for name in ("BPR teaches", NAMED_SO):
        points = []
        for value, at in values.items():
            seeds = [0.08 + rng.uniform(0, 0.02) for _ in range(3)]
            figure = {"mean": sum(seeds) / 3, "low": 0.07, "high": 0.11, "seeds": seeds}
            metrics = (
                {"ndcg@10": figure, "consistency@10": figure} if value or name != NAMED_SO else {"ndcg@10": figure}
            )
            points.append(
                {"value": value, "at": at, "row": f"{name}, {value:g}", "best": value == 0.05, "metrics": metrics}
            )
        lines.append({"name": name, "points": points})
    return {
        "setting": "alpha", "metrics": ["ndcg@10", "consistency@10"], "metric": "ndcg@10", "lines": lines,
        "ticks": [{"value": value, "at": at} for value, at in values.items()], "scaled": True, "picture": "curve.png",
    }  # fmt: skip


def _paper_table(rng: random.Random) -> dict[str, Any]:
    rows = [_row(rng, *made) for made in MADE if made[0] in ("GLTA", "SASRec", "BPR")]
    at_random = {"kind": "RS", "order": "random", "ratios": [0.8, 0.1, 0.1], "group_by": "user"}
    shared = _shared("amazon-scientific", at_random)
    read = shared["evaluation"].pop("valid_rows_in_test_input")
    for row in rows:
        row |= {"at_k": {}, "curves": [], "evaluation": {"valid_rows_in_test_input": read and row["kind"] != "general"}}
    figures = {"GLTA": 0.1012, "SASRec": 0.0805}
    ours = {row["name"]: row["metrics"]["ndcg@10"]["mean"] for row in rows}
    paper = [_beside_paper(name, value, ours[name]) for name, value in figures.items()]
    paper.append(_beside_paper("P5", 0.0511, None))
    return {
        **shared,
        "protocol": "random",
        "column": "lastfm <small>",
        "rows": rows,
        "breakdowns": [],
        "users": [],
        "papers": [
            {
                "source": "Table 2 of the paper",
                "note": "The paper trained a language model of 7 billion parameters.",
                "rows": paper,
                "missing": [{"name": "P5", "why": "not built here"}],
                "gains": [{"name": "GLTA", "over": "SASRec", "metric": "ndcg@10", "paper": 0.2571, "ours": 0.074}],
                "orders": [
                    {
                        "metric": "ndcg@10",
                        "systems": 5,
                        "spearman": -0.7,
                        "spearman_p": 0.2333,
                        "kendall": -0.6,
                        "kendall_p": 0.0004,
                    }
                ],
            }
        ],
    }


def _beside_paper(name: str, paper: float, ours: float | None) -> dict[str, Any]:
    deviation = None if ours is None else ours / paper - 1
    return {"name": name, "metrics": {"ndcg@10": {"paper": paper, "ours": ours, "deviation": deviation}}}


def _shared(dataset: str, protocol: dict[str, Any]) -> dict[str, Any]:
    counts = {"users": 943, "items": 1349, "train": 97_057, "valid": 943, "test": 943, "dropped_repeats": 12}
    return {
        "dataset": dataset,
        "protocol": "",
        "column": "",
        "split": {"fingerprint": "e4095be141019a77" * 4, "protocol": protocol, **counts},
        "evaluation": {
            "policy": "unified", "exclude_history": True, "eval_unit": "user", "ranking": "full", "topk": [5, 10],
            "test_users": 943, "valid_rows_in_test_input": True, "refit_on_valid": False,
        },
        "best_baseline": "SASRec",
        "reference": "BPR",
        "tests": 14,
    }  # fmt: skip


def _row(
    rng: random.Random, name: str, model: str, kind: str, quality: float, seconds: float, trainable: int
) -> dict[str, Any]:
    metrics = {metric: _measured(rng, name, quality * scale) for metric, scale in zip(METRICS, (1, 1.9, 0.72, 0.75))}
    language = kind == "language"
    return {
        "name": name,
        "model": model,
        "kind": kind,
        "baseline": not language,
        "seeds": [2020, 2021, 2022],
        "failed": [],
        "refused": [],
        "metrics": metrics,
        "at_k": {stem: _at_k(metrics[f"{stem}@10"]["mean"]) for stem in ("ndcg", "recall", "mrr")},
        "cost": {
            "seconds": seconds,
            "peak_memory_mb": 420.0 + seconds * 2.5,
            "parameters": max(trainable * (40 if language else 1), 1),
            "trainable": trainable,
            "tokens": 1_830_000 if language else None,
            "users_per_second": round(9000 / (1 + seconds), 1),
        },
        "curves": [_curve(rng, seed, metrics["ndcg@10"]["mean"]) for seed in (2020, 2021, 2022)] if trainable else [],
        "settings": {"learning_rate": 0.001, "n_layers": 2} if trainable else {},
        "runs": [f"saved/{model}-{seed}" for seed in (2020, 2021, 2022)],
    }


def _measured(rng: random.Random, name: str, mean: float) -> dict[str, Any]:
    mean *= rng.uniform(0.98, 1.02)
    against = {other: _against(rng, mean, mean - gap) for other, gap in _gaps(name, mean).items()}
    best = against.get("SASRec", {})
    half = 0.004 + mean * 0.06
    return {
        "mean": mean, "low": mean - half, "high": mean + half, "std": rng.uniform(0.0005, 0.002),
        "valid": mean * 1.04, "bold": best.get("mark") == "+", "against": against,
    }  # fmt: skip


def _gaps(name: str, mean: float) -> dict[str, float]:
    levels = {made[0]: made[3] for made in MADE}
    scale = mean / levels[name]
    return {other: (levels[name] - levels[other]) * scale for other in ("SASRec", "BPR") if other != name}


def _against(rng: random.Random, mean: float, other: float) -> dict[str, Any]:
    difference = mean - other
    p = min(1.0, 0.0001 + 4.0 ** (-abs(difference) * 900) * rng.uniform(0.5, 1.0))
    adjusted = min(1.0, p * 14)
    # Of large differences some are turned around by a seed.
    turn = -0.5 if difference > 0.02 else 0.8
    return {
        "difference": difference, "low": difference - 0.003, "high": difference + 0.003, "gain": difference / other,
        "effect": difference * 10, "p": p, "p_adjusted": adjusted, "wilcoxon_p": p * 1.2,
        "mark": "" if adjusted >= 0.05 else "+" if difference > 0 else "-",
        "by_seed": [
            {"seed": seed, "difference": difference * of} for seed, of in ((2020, 2.0), (2021, 1.5), (2022, turn))
        ],
        "seeds_alike": 3 - (turn < 0), "seeds_both": 3, "seeds_p": 0.064,
    }  # fmt: skip


def _at_k(at_ten: float) -> list[float]:
    return [at_ten * (k / 10) ** 0.45 for k in range(1, 21)]


def _curve(rng: random.Random, seed: int, level: float) -> dict[str, Any]:
    epochs = range(12)
    return {
        "seed": seed,
        "loss": [4.0 * 0.82**epoch + 1 + rng.uniform(0, 0.05) for epoch in epochs],
        "valid": [[epoch + 1, level * (1 - 0.6**(epoch + 1)) * rng.uniform(0.98, 1.02)] for epoch in epochs],
        "valid_metric": "ndcg@10",
    }  # fmt: skip


def _without_figures(name: str, model: str, kind: str, **why: Any) -> dict[str, Any]:
    nothing = {"seconds": None, "peak_memory_mb": None, "parameters": None, "trainable": None, "tokens": None}
    return {
        "name": name, "model": model, "kind": kind, "baseline": True, "seeds": [], "failed": [], "refused": [],
        "metrics": {}, "at_k": {}, "cost": {**nothing, "users_per_second": None}, "curves": [], "settings": {},
        "runs": [], **why,
    }  # fmt: skip


def _breakdown(rng: random.Random, name: str, unit: str, metric: str, labels: list[str]) -> dict[str, Any]:
    groups = [{"label": label, "count": rng.randrange(40, 400)} for label in labels]
    slope = [0.7 + 0.15 * place for place in range(len(labels))]
    rows = {made[0]: [made[3] * share * rng.uniform(0.9, 1.1) for share in slope] for made in MADE}
    if "unseen" in labels:
        # A model without item texts can say nothing about items that it never saw.
        rows = {name: [values[0], values[1] / 4 if "GLTA" in name else None] for name, values in rows.items()}
    return {"name": name, "unit": unit, "metric": metric, "groups": groups, "rows": rows}


def _user(rng: random.Random, number: int) -> dict[str, Any]:
    titles = [f"{one} {two} ({1950 + place})" for place, (one, two) in enumerate(_pairs())]
    items = [{"item": str(place), "title": title} for place, title in enumerate(titles)]
    if number < len(HOSTILE):
        items[0] = {"item": "0", "title": HOSTILE[number]}
    target, rest = items[0], items[1:]
    history = rng.sample(rest, 14)
    left = [item for item in rest if item not in history]
    top = {}
    for place, made in enumerate(MADE):
        shown = [{**item, "hit": False} for item in rng.sample(left, 10)]
        if (place + number) % 3:
            shown[rng.randrange(10)] = {**target, "hit": True}
        top[made[0]] = shown
    name = HOSTILE[0] if number == 1 else str(100 + number)
    return {"user": name, "history": history, "targets": [target], "top": top}


def _pairs() -> list[tuple[str, str]]:
    ones = ("Copper", "Silent", "Northern", "Last", "Paper", "Second", "Winter")
    twos = ("Lantern", "Harbour", "Orchestra", "Witness", "Letters", "Garden")
    return [(one, two) for one in ones for two in twos]
