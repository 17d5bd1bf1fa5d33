"""Search that a collaborative recommender has a say in: against plain sums over all items, and against its own runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from searches import PROMPTS, TITLES, assert_same_ranking, exhaustive, random_codes, searcher
from small_models import SMALL
from test_aligntokenrec import build, users
from test_errors import refused
from test_glta import N_ITEMS

from recbole_llm.config import Config
from recbole_llm.decoding.guide import Guide
from recbole_llm.errors import UserError
from recbole_llm.evaluation.rankings import Rankings
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.serving.recommender import Recommender
from recbole_llm.training.runs import run

KINDS = {"codes": random_codes(12), "shared codes": random_codes(14, distinct=False), "titles": TITLES}


def scores_of(item_tokens: ItemTokens, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(len(PROMPTS), item_tokens.n_items, generator=torch.Generator().manual_seed(1)) * spread


def shares_of(item_tokens: ItemTokens, scores: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Logarithms of the softmax over the items that have tokens, float64."""
    return (scores.double() / beta).masked_fill(item_tokens.lengths == 0, -torch.inf).log_softmax(1)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_sums_over_all_items(llama: Any, kind: str, weight: float) -> None:
    item_tokens = KINDS[kind]
    scores, beta = scores_of(item_tokens), 0.7
    search = searcher(llama, item_tokens, beams=item_tokens.n_items - 1)
    found = search(PROMPTS, guide=Guide(search.trie, scores, weight, beta))
    shares = shares_of(item_tokens, scores, beta)
    for row, prompt in enumerate(PROMPTS):
        told = exhaustive(llama, item_tokens, prompt, "vocabulary").masked_fill(item_tokens.lengths == 0, 0)
        wanted = weight * told + (1 - weight) * shares[row]
        assert_same_ranking(found.items[row].tolist(), found.scores[row], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_the_weight_the_language_model_is_alone(llama: Any, kind: str) -> None:
    item_tokens = KINDS[kind]
    search = searcher(llama, item_tokens, beams=6)
    alone, guided = (
        search(PROMPTS, k=4, guide=guide) for guide in (None, Guide(search.trie, scores_of(item_tokens), 1.0))
    )
    assert torch.equal(alone.items, guided.items) and torch.equal(alone.scores, guided.scores)


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_the_recommenders_ranking_comes_out(llama: Any, kind: str) -> None:
    item_tokens = KINDS[kind]
    # Of such scores most shares are below the last digit of their sum.
    scores = scores_of(item_tokens, spread=60.0)
    scores[0, 3] = -torch.inf
    search = searcher(llama, item_tokens, beams=item_tokens.n_items - 1)
    found = search(PROMPTS, guide=Guide(search.trie, scores, 0.0))
    told = scores.clone()
    # What it rules out comes last.
    told[0, 3] = scores[0][scores[0].isfinite()].min() - 1
    count = int((item_tokens.lengths > 0).sum())
    wanted = told.masked_fill(item_tokens.lengths == 0, -torch.inf).argsort(dim=1, descending=True)[:, :count]
    assert torch.equal(found.items, wanted) and bool(found.scores.isfinite().all())


def test_what_is_excluded_stays_out_and_moves_no_score(llama: Any) -> None:
    item_tokens = KINDS["shared codes"]
    search = searcher(llama, item_tokens, beams=8)
    whole = searcher(llama, item_tokens, beams=14)
    scores = scores_of(item_tokens)
    barred = [[int(row.argmax()) or 1, 5] for row in scores]
    exclude = Exclusion(search.trie, torch.tensor(barred))
    found = search(PROMPTS, exclude=exclude, guide=Guide(search.trie, scores, 0.5))
    every = whole(PROMPTS, guide=Guide(whole.trie, scores, 0.5))
    for row in range(len(PROMPTS)):
        worth = dict(zip(every.items[row].tolist(), every.scores[row].tolist()))
        kept = [item for item in every.items[row].tolist() if item not in barred[row]]
        assert not set(found.items[row].tolist()) & set(barred[row])
        assert found.items[row].tolist()[:3] == kept[:3]
        assert [worth[item] for item in found.items[row].tolist()] == pytest.approx(
            found.scores[row].tolist(), abs=1e-4
        )


def test_a_model_is_asked_about_the_users_that_it_ranks(folders: Callable[[str], Path]) -> None:
    scores = torch.randn(12, N_ITEMS, generator=torch.Generator().manual_seed(4))
    asked: list[int] = []

    def told(users: torch.Tensor) -> torch.Tensor:
        asked.extend(users.tolist())
        return scores[users]

    model = build(folders("llama"), beams=N_ITEMS - 1, cf_guidance=0.0, eval_unit="user")
    model.take_guidance(SimpleNamespace(scores=told))
    rows = [1, 2, 3, 4, 5, 6]
    found = model.full_sort_predict(users(*rows))
    assert asked == rows
    for place, user in enumerate(rows):
        order = found[place, 1:].argsort(descending=True)
        assert torch.equal(order, scores[user, 1:].argsort(descending=True))


# --- runs ------------------------------------------------------------------------------------------------------------


def small(settings_of: Callable[..., dict[str, Any]], model: str = "AlignTokenRec", **more: Any) -> dict[str, Any]:
    """Raw ids are one token each, so that no prefix is left on the way."""
    teacher = {key: value for key, value in SMALL["TCA4Rec"].items() if key.startswith("cf_model.")}
    own = SMALL[model] | teacher | {"item_tokens": "raw", "item_text": "{movie_title} {class}"}
    own = {key: value for key, value in own.items() if not key.startswith(("code_", "embedding_model"))}
    return settings_of(**own, epochs=1, eval_step=1, tasks=["sequential"]) | more


def test_with_no_weight_a_run_ranks_as_the_recommender_does(settings_of: Callable[..., dict[str, Any]]) -> None:
    settings = small(settings_of, cf_guidance=0.0)
    made = run("AlignTokenRec", "small", config_dict=settings)
    theirs = made["parts"]["cf_model"]
    assert [stage["name"] for stage in made["stages"]].count("cf_model") == 1
    assert made["test"] == pytest.approx(theirs["test"]) and made["valid"] == pytest.approx(theirs["valid"])
    assert all(value == pytest.approx(1) for value in made["consistency"]["cf_model"].values())
    again = run("AlignTokenRec", "small", config_dict=settings)
    assert all(stage["cached"] for stage in again["stages"]) and again["test"] == made["test"]

    # What is served is what was ranked at test.
    recommender = Recommender.of_run(made["result_file"], ("train", "valid"))
    rankings = Rankings.read(Path(made["result_file"]).with_name("rankings.npz"))
    for row in (0, 7):
        served = recommender.recommend([rankings.user_id[row]], k=5)[0]
        assert [item for item, _, _ in served] == rankings.item_id[rankings.top[row, :5]].tolist()
    with pytest.raises(UserError, match=r"guided by SASRec \(cf_guidance\).* a history alone is not enough"):
        recommender.recommend_history([str(rankings.item_id[1])])


def test_a_little_weight_changes_the_ranking_of_a_wrapper(settings_of: Callable[..., dict[str, Any]]) -> None:
    plain = run("TCA4Rec", "small", config_dict=small(settings_of, "TCA4Rec"))
    guided = run("TCA4Rec", "small", config_dict=small(settings_of, "TCA4Rec", cf_guidance=0.5))
    # Its own teacher guides, and one validation picks no epoch: nothing trains.
    assert all(stage["cached"] for stage in guided["stages"])
    assert guided["curves"]["loss"] == plain["curves"]["loss"]
    agreement = "overlap@10"
    assert guided["consistency"]["cf_model"][agreement] > plain["consistency"]["cf_model"][agreement]


@pytest.mark.parametrize("base", ["BIGRec", "MSL", "CoLLM"])
def test_those_that_generate_titles_are_guided_too(base: str, settings_of: Callable[..., dict[str, Any]]) -> None:
    teacher = {key: value for key, value in SMALL["TCA4Rec"].items() if key.startswith("cf_model.")}
    own = SMALL[base] | teacher | {"item_text": "{movie_title}", "epochs": 1, "eval_step": 0}
    own |= {"grounding": "trie"} if base == "BIGRec" else {}
    # A teacher of one epoch is of one mind about all items, unless his scores are sharpened.
    own |= {"cf_guidance_beta": 0.05}
    little, much = (
        run(base, "small", config_dict=settings_of(**own) | {"cf_guidance": weight}) for weight in (0.95, 0.05)
    )
    found = [made["consistency"]["cf_model"]["overlap@10"] for made in (little, much)]
    assert found[0] < 0.3 and found[1] > 0.5


def test_what_is_off_is_no_part_of_a_run() -> None:
    plain = Config("AlignTokenRec", "tiny", command_line=[])
    other = Config("AlignTokenRec", "tiny", command_line=["--cf_model=LightGCN", "--cf_guidance_beta=2"])
    assert plain.stage_keys() == other.stage_keys() and "cf_model" not in plain.parts()
    guided = [
        Config("LCRec", "tiny", command_line=["--cf_guidance=.8", f"--cf_model={name}"]) for name in ("EASE", "BPR")
    ]
    assert guided[0].stage_keys() != guided[1].stage_keys() and "cf_model" in guided[0].parts()
    wrapped = [Config("TCA4Rec", "tiny", command_line=[f"--cf_model={name}"]) for name in ("EASE", "BPR")]
    assert wrapped[0].stage_keys() != wrapped[1].stage_keys() and "cf_model" in wrapped[0].parts()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["cf_guidance=1.5"], ["cf_guidance should be float 0..1", "1.5"]),
        (["cf_guidance_beta=0"], ["cf_guidance_beta should be float > 0"]),
        (["cf_guidance=.5", "constraint=level"], ["cf_guidance below 1 needs constraint: trie"]),
        (["cf_guidance=.5", "eval_unit=row"], ["cf_guidance below 1 needs eval_unit: user"]),
        (["cf_guidance=.5", "cf_model=TIGER"], ["cf_model should be a recommender that scores every item", "TIGER"]),
        (["cf_guidance=.5", "cf_model.epoch=3"], ["unknown setting 'cf_model.epoch'", "'epochs'"]),
    ],
)
def test_wrong_input_gets_one_line(settings: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--{setting}" for setting in settings]
    said = refused(capsys, "run", "--model=AlignTokenRec", "--dataset=tiny", *given)
    for word in words:
        assert word in said


def test_what_searches_nothing_cannot_be_guided(capsys: pytest.CaptureFixture[str]) -> None:
    assert "set grounding: trie" in refused(capsys, "run", "--model=BIGRec", "--dataset=tiny", "--cf_guidance=.5")
