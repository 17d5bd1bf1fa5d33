"""LETTER: its two terms by hand, what they do to codes, its stages, and its loss of generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import SMALL
from test_item_token_stage import COLD, Recorder, quick, tokenized
from test_rqvae import Cut, assert_same, clusters, settings, untrained
from test_tca4rec import build, sampled
from torch import Tensor

from recbole_llm.config import Config
from recbole_llm.errors import UserError
from recbole_llm.evaluation.rankings import Rankings
from recbole_llm.itemid import letter, rqvae_training
from recbole_llm.itemid.even_kmeans import LEAST, MOST, bounded_clusters, even_residual_kmeans
from recbole_llm.itemid.letter import cluster_codes, collaborative_loss, diversity_loss, draw_partners
from recbole_llm.itemid.rqvae import RQVAE
from recbole_llm.itemid.rqvae_training import look, train_rqvae
from recbole_llm.model.aligntokenrec import AlignTokenRec
from recbole_llm.model.generative import FINE_TUNING
from recbole_llm.model.letter import LETTER
from recbole_llm.model.tca4rec import TCA4Rec
from recbole_llm.serving.recommender import Recommender
from recbole_llm.tasks.behaviour import SEQUENTIAL
from recbole_llm.training import state
from recbole_llm.training.codebooks import AUTOENCODER
from recbole_llm.training.embeddings import item_embeddings
from recbole_llm.training.item_tokens import CARD, tokenize_items
from recbole_llm.training.pipeline import fit_parts_of, prepared, store_of
from recbole_llm.training.runs import run
from recbole_llm.training.state import ResumeFile


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return scores - np.log(np.exp(scores).sum())


# --- the terms -------------------------------------------------------------------------------------------------------


def test_the_collaborative_term_is_its_formula_over_the_items_that_have_an_embedding() -> None:
    z, e = normal(6, 3), normal(6, 3, seed=1)
    e[[1, 4]] = torch.nan
    known = [0, 2, 3, 5]
    scores = z.double().numpy() @ e.double().numpy().T
    expected = np.mean([-log_softmax(scores[row, known])[place] for place, row in enumerate(known)])
    assert collaborative_loss(z, e).item() == pytest.approx(expected, rel=1e-6)
    z.requires_grad_()
    collaborative_loss(z, e).backward()
    assert z.grad is not None and z.grad.isfinite().all()
    assert not z.grad[[1, 4]].any() and z.grad[known].all(dim=1).all()
    nobody = collaborative_loss(z, torch.full_like(e, torch.nan))
    assert nobody.item() == 0 and nobody.requires_grad


def test_the_diversity_term_is_its_formula_with_the_code_itself_left_out() -> None:
    level, codes, aims = normal(5, 3), torch.tensor([0, 3, 3, 1]), torch.tensor([2, 4, 0, 0])
    q = level.double().numpy()
    terms = []
    for own, aim in zip(codes.tolist(), aims.tolist(), strict=True):
        others = [code for code in range(5) if code != own]
        terms.append(-log_softmax(q[others] @ q[own])[others.index(aim)])
    found = diversity_loss(level[codes], codes, level, aims)
    assert found.item() == pytest.approx(np.mean(terms), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_both_terms_stand_in_the_loss_with_their_weights(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, e = clusters(60), normal(60, 4)
    model = untrained(x, reduction=reduction, cf_weight=0.3, diversity_weight=0.2, quantisation_weight=0.6)
    groups = cluster_codes(model.levels, 3, seed=0)
    # Whom a code is drawn to is random; here it is the next one.
    monkeypatch.setattr(letter, "draw_partners", lambda codes, clusters: (codes + 1) % 8)
    plain, codes = model.losses(x)
    parts, again = model.losses(x, None, e, groups)
    assert torch.equal(codes, again) and not {"cf", "diversity"} & plain.keys()
    by_level = [
        diversity_loss(model.levels[n][codes[:, n]], codes[:, n], model.levels[n], (codes[:, n] + 1) % 8).item()
        for n in range(3)
    ]
    vectors = torch.stack([model.levels[n][codes[:, n]] for n in range(3)]).sum(0)
    cf = collaborative_loss(vectors, e).item()
    diversity = sum(by_level) / (3 if reduction == "mean" else 1)
    assert parts["cf"].item() == pytest.approx(cf, rel=1e-4)
    assert parts["diversity"].item() == pytest.approx(diversity, rel=1e-5)
    expected = plain["loss"].item() + 0.6 * 0.2 * diversity + 0.3 * cf
    assert parts["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_the_diversity_moves_the_codes_and_the_collaborative_term_the_encoder() -> None:
    x, e = clusters(60), normal(60, 4)
    model = untrained(x, cf_weight=1.0, diversity_weight=1.0)
    codes = model.losses(x)[1]
    torch.manual_seed(0)
    parts, _ = model.losses(x, None, e, cluster_codes(model.levels, 3, seed=0))
    named = dict(model.named_parameters())

    def gradients(name: str) -> dict[str, Tensor | None]:
        found = torch.autograd.grad(parts[name], list(named.values()), retain_graph=True, allow_unused=True)
        return dict(zip(named, found, strict=True))

    diversity = gradients("diversity")
    assert diversity["levels"] is not None
    # Every code, also one that no item has.
    assert diversity["levels"].abs().sum(-1).bool().all() and len(codes[:, 2].unique()) <= 8
    assert all(value is None for name, value in diversity.items() if name != "levels")
    cf = gradients("cf")
    assert all(value is not None and value.any() for name, value in cf.items() if name.startswith("encoder"))
    assert all(value is None for name, value in cf.items() if not name.startswith("encoder"))


@given(sizes=st.lists(st.integers(2, 7), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_partner_is_any_other_code_of_the_cluster(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels))]
    codes = torch.arange(len(labels)).repeat(120)
    found = draw_partners(codes, labels)
    assert (found != codes).all() and torch.equal(labels[found], labels[codes])
    for code in range(len(labels)):
        others = set((labels == labels[code]).nonzero().squeeze(1).tolist()) - {code}
        # 120 draws of at most six others miss one once in a billion times.
        assert set(found[codes == code].tolist()) == others


# --- clusters --------------------------------------------------------------------------------------------------------


@given(points=st.integers(2, 60), size=st.integers(1, 12), seed=st.integers(0, 9))
def test_clusters_keep_within_their_bounds(points: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Most points on one heap: plain k-means would put them together.
    x = (rng.standard_normal((points, 3)) * (rng.random((points, 1)) < 0.2)).astype(np.float32)
    labels = bounded_clusters(x, size, seed)
    made = min(size, points // 2)
    counts = np.bincount(labels, minlength=made)
    share = points / made
    assert len(counts) == made and counts.min() >= max(2, int(LEAST * share)) and counts.max() <= MOST * share
    assert np.array_equal(labels, bounded_clusters(x, size, seed))


def test_the_authors_bounds_are_met_at_their_sizes() -> None:
    assert (int(LEAST * 25.6), int(MOST * 25.6)) == (10, 60)


def test_clusters_of_equal_size_are_found_and_kept() -> None:
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(4), 8))
    x = (10 * np.eye(4)[truth] + rng.standard_normal((32, 4))).astype(np.float32)
    labels = bounded_clusters(x, 4, seed=1)
    assert len(set(zip(truth.tolist(), labels.tolist(), strict=True))) == 4
    moved = bounded_clusters(x + np.float32(0.1), 4, seed=2, before=labels)
    assert np.array_equal(moved, labels), "numbers of clusters stay where they start from others"


def test_codes_start_from_about_as_many_items_each() -> None:
    x = np.concatenate([0.1 * normal(150, 4).numpy(), 5 + normal(50, 4, seed=1).numpy()])
    model = untrained(torch.from_numpy(x), kmeans_even=True)
    latent = model.encoder(torch.from_numpy(x)).detach().numpy()
    assert np.allclose(model.levels.detach().numpy(), even_residual_kmeans(latent, 3, 8, seed=0))
    largest = [
        torch.bincount(start.codebook.encode(start.latent(torch.from_numpy(x)))[0][:, 0], minlength=8).max()
        for start in (model, untrained(torch.from_numpy(x)))
    ]
    assert largest[0] < largest[1]


# --- training --------------------------------------------------------------------------------------------------------


def test_weights_of_0_are_the_plain_autoencoder_bit_for_bit() -> None:
    x = clusters()
    plain = train_rqvae(x, settings(dropout=0.1), seed=0)
    off = settings(dropout=0.1, cf_weight=0.0, diversity_weight=0.0, diversity_clusters=3, diversity_every=2)
    same = train_rqvae(x, off, seed=0, behaviour=normal(200, 4))
    assert_same(plain, same)
    assert {**plain.figures, "seconds": 0} == {**same.figures, "seconds": 0}
    for weight in ("cf_weight", "diversity_weight"):
        other = train_rqvae(x, dataclasses.replace(off, **{weight: 0.1}), seed=0, behaviour=normal(200, 4))
        assert not torch.equal(plain.levels, other.levels), weight


def planted(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Texts that say nothing of two groups, embeddings that say little else, and the groups."""
    group = torch.from_numpy(np.random.default_rng(seed).permutation(np.arange(80) % 2))
    way = normal(4, seed=seed + 10)
    told = torch.where(group[:, None] == 1, way, -way) + 0.1 * normal(80, 4, seed=seed + 20)
    return normal(80, 12, seed=seed), told, group


@pytest.mark.parametrize("seed", [0, 1])
def test_groups_that_only_behaviour_knows_get_different_first_codes(seed: int) -> None:
    x, told, group = planted(seed)
    own = settings(codes=4, levels=2, hidden_sizes=(64,), epochs=120, learning_rate=0.01, schedule="constant")
    pure = []
    for weight in (0.0, 1.0):
        model = train_rqvae(
            x, dataclasses.replace(own, cf_weight=weight), seed=seed, behaviour=told, show_progress=False
        )
        first = look(model, x, None).codes[:, 0]
        pure.append(sum(torch.bincount(group[first == code]).max().item() for code in first.unique()) / len(x))
    assert pure[0] < 0.75 and pure[1] > 0.9


def perplexities(codes: Tensor, size: int) -> list[float]:
    shares = [torch.bincount(column, minlength=size) / len(column) for column in codes.T]
    return [torch.special.entr(share).sum().exp().item() for share in shares]


def test_diversity_spreads_codes_that_collapse_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def near_zero(model: RQVAE, x: Tensor, seed: int) -> None:
        """The start without k-means, after which a few codes take all items and the rest never move."""
        model.levels.data.uniform_(-1 / 32, 1 / 32)

    monkeypatch.setattr(rqvae_training, "start_codes", near_zero)
    own = settings(
        codes=32, levels=2, hidden_sizes=(32,), epochs=100, learning_rate=0.02, schedule="constant", batch_size=300,
        diversity_clusters=4,
    )  # fmt: skip
    x = clusters(300)
    plain, spread = (
        look(train_rqvae(x, dataclasses.replace(own, diversity_weight=weight), seed=0, show_progress=False), x, None)
        for weight in (0.0, 1e-4)
    )
    assert max(plain.used) < 32, "nothing fell out of use"
    assert all(one < other for one, other in zip(plain.used, spread.used, strict=True))
    pairs = zip(perplexities(plain.codes, 32), perplexities(spread.codes, 32), strict=True)
    assert all(one < other for one, other in pairs)


def test_codes_are_clustered_anew_after_so_many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    given_before: list[bool] = []

    def watched(levels: Tensor, count: int, seed: int, before: Tensor | None = None) -> Tensor:
        given_before.append(before is not None)
        return cluster_codes(levels, count, seed, before)

    monkeypatch.setattr(rqvae_training, "cluster_codes", watched)
    train_rqvae(clusters(), settings(epochs=5, diversity_weight=0.1, diversity_every=2), seed=0)
    assert given_before == [False, True, True]


@pytest.mark.parametrize("saves", [1, 3])
def test_a_training_with_both_terms_goes_on_as_if_not_cut_off(
    saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "RESUME_SECONDS", 0.0)
    own = settings(cf_weight=0.1, diversity_weight=0.1, diversity_every=2, kmeans_even=True)
    x, told = clusters(), normal(200, 4)
    told[::7] = torch.nan
    whole = train_rqvae(x, own, seed=0, behaviour=told)
    with pytest.raises(KeyboardInterrupt):
        train_rqvae(x, own, seed=0, behaviour=told, resume=Cut(tmp_path / "state", saves))
    assert_same(whole, train_rqvae(x, own, seed=0, behaviour=told, resume=ResumeFile(tmp_path / "state")))


@pytest.mark.parametrize(
    ("told", "changes", "words"),
    [
        (None, {"cf_weight": 0.1}, "no embeddings of a collaborative model"),
        (normal(200, 5), {"cf_weight": 0.1}, r"codes of 4 numbers with embeddings of \(5,\)"),
        (normal(100, 4), {"cf_weight": 0.1}, "100 embeddings for 200 points"),
        (None, {"cf_weight": -0.1}, "cf_weight is -0.1; it should be at least 0"),
        (None, {"diversity_weight": 0.1, "codes": 1}, "a level of one code has no other"),
        (None, {"diversity_clusters": 0}, "diversity_clusters is 0; it should be at least 1"),
    ],
)
def test_what_the_terms_cannot_be_made_of_is_refused(told: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        train_rqvae(clusters(), settings(**changes), seed=0, behaviour=told)


# --- the stages ------------------------------------------------------------------------------------------------------


def small(output: Path, **more: Any) -> dict[str, Any]:
    """Settings of LETTER's small codebooks of the data set ``tiny``."""
    own = quick(output, item_tokens="letter", code_dim=8, **SMALL_PART, **more)
    del own["embedding_model.embedding_size"]
    return own


SMALL_PART = {key: value for key, value in SMALL["LETTER"].items() if key.startswith("embedding_model.")}


def test_texts_are_quantised_and_embeddings_of_seen_items_draw_the_codes(tmp_path: Path) -> None:
    made = tokenized(small(tmp_path, **COLD))
    assert [line["name"] for line in made.sources.lines][:1] == ["embedding_model"]
    assert "item_texts" in [line["name"] for line in made.sources.lines]
    sources, fit = made.sources, made.sources.parts["embedding_model"]
    assert fit.config["model"] == "SASRec" and np.array_equal(sources.points, sources.texts)
    assert sources.behaviour is not None and (~sources.seen[1:]).sum() > 10
    table = item_embeddings(fit.model, "SASRec", "final")
    assert np.array_equal(sources.behaviour[sources.seen], table[sources.seen])
    assert np.isnan(sources.behaviour[~sources.seen]).all()
    figures = RQVAE.load(made.stage.folder / AUTOENCODER).figures
    assert np.isfinite(figures["cf"]) and figures["cf"] > 0 and (made.stage.folder / CARD).is_file()


def test_each_weight_makes_the_stage_anew_and_without_the_first_no_model_is_trained(tmp_path: Path) -> None:
    settings = small(tmp_path)
    config = Config("SASRecCodes", "tiny", config_dict=settings)
    _, train_data, _, _ = prepared(config)
    store = Recorder(store_of(config).root)

    def noted(**more: Any) -> dict[str, Any]:
        changed = Config("SASRecCodes", "tiny", config_dict=settings | more)
        with pytest.raises(StopIteration):
            tokenize_items(changed, train_data._dataset, store, fit_parts_of(changed, store))
        return store.noted

    before = noted()
    assert noted() == before
    weights: list[dict[str, Any]] = [
        {"code_cf_weight": 0.3}, {"code_diversity_weight": 0.3}, {"embedding_model.learning_rate": 0.5},
    ]  # fmt: skip
    for more in weights:
        assert noted(**more) != before, more
    off = tmp_path / "off"
    made = tokenized(small(off, code_cf_weight=0.0))
    assert made.sources.behaviour is None and not made.sources.parts


def test_embeddings_of_another_width_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(code_dim 16\) with the item embeddings of SASRec \(8\): set embedding_mo"):
        tokenized(small(tmp_path) | {"code_dim": 16})


@pytest.mark.parametrize("outer", ["LETTER", "SASRecCodes"])
@pytest.mark.parametrize(
    ("part", "key"), [("SASRec", "hidden_size"), ("LightGCN", "embedding_size"), ("GRU4Rec", "embedding_size")]
)
def test_the_recipe_makes_any_collaborative_model_as_wide_as_the_codes(outer: str, part: str, key: str) -> None:
    given = {"item_tokens": "letter", "embedding_model": part}
    config = Config(outer, "tiny", config_dict=given)
    assert config.part("embedding_model")[key] == config["code_dim"] == 32
    alone = Config(part, "tiny", config_dict={key: 32})
    assert config.part("embedding_model").stage_keys().get(key) == alone.stage_keys()[key]
    wider = Config(outer, "tiny", config_dict=given | {f"embedding_model.{key}": 64})
    assert wider.part("embedding_model")[key] == 64
    # As a finished run's settings are read again.
    kept = {name: value for name, value in config.as_dict().items() if name.startswith("embedding_model.")}
    assert kept and Config(outer, "tiny", config_dict=given | kept).part("embedding_model")[key] == 32


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(folders: Callable[[str], Path]) -> Path:
    return folders("llama")


TASK: dict[str, Any] = {"tasks": [SEQUENTIAL], "prompts": "lcrec"}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_loss_is_the_cross_entropy_of_scores_over_the_temperature(temperature: float, folder: Path) -> None:
    model = build(folder, LETTER, loss_temperature=temperature, **TASK)
    _, batch = sampled(model)
    logits = normal(len(batch.labels), int(model._lm_ids[-1]) + 1)
    scores = logits.double().numpy() / temperature
    labels = batch.labels.tolist()
    expected = np.mean([-log_softmax(row)[label] for row, label in zip(scores, labels, strict=True)])
    assert model.label_loss(logits, batch).item() == pytest.approx(expected, rel=1e-5)
    if temperature == 1:
        plain = build(folder, AlignTokenRec, **TASK)
        assert torch.equal(model.stage_loss(FINE_TUNING, batch), plain.stage_loss(FINE_TUNING, sampled(plain)[1]))


def test_tca4recs_own_temperature_divides_what_this_one_leaves(folder: Path) -> None:
    wrapped = [
        build(folder, TCA4Rec.over("LETTER"), base_model="LETTER", alpha=0.5, tau=tau, loss_temperature=own, **TASK)
        for tau, own in ((1.0, 0.5), (0.5, 1.0), (2.0, 0.25), (1.0, 1.0))
    ]
    losses = [model.stage_loss(FINE_TUNING, sampled(model)[1]).item() for model in wrapped]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert abs(losses[0] - losses[3]) > 1e-3


@pytest.mark.parametrize("model", ["LETTER", "TCA4Rec"])
def test_a_finished_run_recommends_as_it_was_measured(model: str, tmp_path: Path) -> None:
    own = SMALL["LETTER"] | {
        "output_dir": str(tmp_path), "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 1,
    }  # fmt: skip
    if model == "TCA4Rec":
        own |= {"base_model": "LETTER", "cf_model": "EASE", "loss_temperature": 0.8}
    result = run(model, "tiny", config_dict=own)
    names = [stage["name"] for stage in result["stages"]]
    assert names[0] == "embedding_model" and "item_tokens" in names and names[-1] == "fine_tuning"
    assert result["parts"]["embedding_model"]["model"] == "SASRec"
    folder = Path(result["result_file"]).parent
    rankings = Rankings.read(folder / "rankings.npz")
    recommender = Recommender.of_run(folder, phases=("train", "valid"))
    assert isinstance(recommender.fit.model, LETTER)
    given = recommender.recommend(rankings.user_id.tolist(), 10)
    assert [[item for item, _, _ in one] for one in given] == rankings.item_id[rankings.top[:, :10]].tolist()
