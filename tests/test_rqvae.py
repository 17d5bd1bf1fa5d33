"""The residual-quantised autoencoder: its loss and gradients by hand, its training, its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recbole_llm.errors import TrainingStoppedError, UserError
from recbole_llm.itemid import rqvae_training
from recbole_llm.itemid.collapse import check_collapse
from recbole_llm.itemid.kmeans import kmeans
from recbole_llm.itemid.rqvae import DESCRIPTION, RQVAE, WEIGHTS, RQVAESettings
from recbole_llm.itemid.rqvae_training import look, reseed_dead, start_codes, train_rqvae
from recbole_llm.training import state
from recbole_llm.training.state import ResumeFile

SMALL = RQVAESettings(
    hidden_sizes=(12,),
    latent_size=4,
    levels=3,
    codes=8,
    epochs=6,
    batch_size=64,
    learning_rate=5e-3,
    warm_up=1,
    kmeans_points=0,
    kmeans_iterations=10,
    sinkhorn_levels=0,
    check_every=2,
    least_usage=0.0,
)


def clusters(rows: int = 200, width: int = 6, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    centres = 3 * rng.standard_normal((12, width))
    return torch.from_numpy(centres[rng.integers(12, size=rows)] + rng.standard_normal((rows, width))).float()


def settings(**changes: Any) -> RQVAESettings:
    return dataclasses.replace(SMALL, **changes)


def untrained(x: Tensor, text_size: int = 0, **changes: Any) -> RQVAE:
    torch.manual_seed(3)
    model = RQVAE(x.shape[1], settings(**changes), text_size)
    start_codes(model, x, seed=0)
    return model.eval()


def by_hand(model: RQVAE, x: Tensor, texts: Tensor | None = None) -> Tensor:
    """The loss written out level by level and, where the commitment is the first level's, as LC-Rec's code has it."""
    own = model.settings
    z = model.encoder(x)
    residual, total, levels = z, torch.zeros_like(z), []
    text = []
    for codes in model.levels:
        nearest = (residual[:, None] - codes[None]).square().sum(2).argmin(1)
        vector = codes[nearest]
        square = [(vector - residual.detach()) ** 2, own.commitment * (vector.detach() - residual) ** 2]
        levels.append(sum(part.mean() if own.reduction == "mean" else part.sum(1).mean() for part in square))
        if texts is not None:
            gap = (vector - texts @ model.text_projector.weight.T - model.text_projector.bias) ** 2
            text.append(gap.mean() if own.reduction == "mean" else gap.sum(1).mean())
        through = residual + (vector - residual).detach()
        residual = residual - vector.detach() if own.commit_all_levels else residual - through
        total = total + vector
    gap = (model.decoder(z + (total - z).detach()) - x) ** 2
    reconstruction = gap.mean() if own.reduction == "mean" else gap.sum(1).mean()
    over = len(levels) if own.reduction == "mean" else 1
    return reconstruction + own.quantisation_weight * sum(levels) / over + own.text_weight * sum(text) / over


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("commit_all_levels", [False, True])
@pytest.mark.parametrize("text_weight", [0.0, 0.7])
def test_loss_and_every_gradient_equal_the_formula(reduction: str, commit_all_levels: bool, text_weight: float) -> None:
    x = clusters(60)
    texts = clusters(60, 5, seed=1) if text_weight else None
    model = untrained(
        x,
        5 if text_weight else 0,
        reduction=reduction,
        commit_all_levels=commit_all_levels,
        quantisation_weight=0.6,
        text_weight=text_weight,
    )
    parts, _ = model.losses(x, texts)
    expected = by_hand(model, x, texts)
    torch.testing.assert_close(parts["loss"], expected)
    weights = dict(model.named_parameters())
    found = torch.autograd.grad(parts["loss"], list(weights.values()))
    right = torch.autograd.grad(expected, list(weights.values()))
    for name, one, other in zip(weights, found, right, strict=True):
        torch.testing.assert_close(one, other, msg=name)
        assert other.abs().sum() > 0, name


def test_the_commitment_of_deeper_levels_reaches_the_encoder_only_where_asked() -> None:
    x = clusters(60)
    gradients = []
    for everywhere in (False, True):
        model = untrained(x, commit_all_levels=everywhere)
        latent = model.encoder(x).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model.quantise(latent).commitment_loss, latent)
        first = (
            2 * (latent - model.levels[0][model.choose(0, latent)]).detach() / latent.numel() / model.settings.levels
        )
        gradients.append(torch.allclose(gradient, first, atol=1e-7))
    assert gradients == [True, False]


def test_the_decoders_gradient_goes_straight_through_the_codes() -> None:
    x = clusters(40)
    model = untrained(x)
    latent = model.encoder(x).detach().requires_grad_()
    made = model.quantise(latent)
    (through,) = torch.autograd.grad((model.decoder(made.latent) - x).square().mean(), latent)
    codes = made.vectors.sum(1).detach().requires_grad_()
    (direct,) = torch.autograd.grad((model.decoder(codes) - x).square().mean(), codes)
    torch.testing.assert_close(through, direct)


def test_codes_start_at_k_means_centres_of_each_levels_inputs() -> None:
    x = clusters()
    model = untrained(x)
    inputs = model.encoder(x).detach().numpy()
    for level in range(3):
        centres, near = kmeans(inputs, 8, seed=level, iterations=10)
        np.testing.assert_allclose(model.levels[level].detach().numpy(), centres, rtol=1e-5, atol=1e-6)
        inputs = inputs - centres[near]


def test_codes_start_from_a_sample_where_asked() -> None:
    x = clusters()
    all_items, sample = untrained(x), untrained(x, kmeans_points=50)
    assert not torch.allclose(all_items.levels, sample.levels)


def test_more_levels_give_clustered_items_back_better() -> None:
    x = clusters(300)
    kept = []
    for levels in (1, 2, 3):
        model = train_rqvae(x, settings(levels=levels, epochs=80, learning_rate=0.01, hidden_sizes=(32,)), seed=0)
        missed = (model.reconstruct(x) - x).square().sum() / (x - x.mean(0)).square().sum()
        assert model.figures["explained"] == pytest.approx(1 - missed.item(), abs=1e-5)
        kept.append(model.figures["explained"])
    assert kept[0] < kept[1] < kept[2]
    assert kept[2] > 0.5


def test_the_codebook_chooses_what_the_autoencoder_chooses() -> None:
    x = clusters()
    model = train_rqvae(x, SMALL, seed=0)
    codes, _ = model.codebook.encode(model.latent(x, batch=37))
    assert torch.equal(codes, look(model, x, None).codes)
    assert (model.codebook.distance, model.codebook.residual) == ("l2", "signed")
    assert model.figures["collision_rate"] == pytest.approx(1 - len({tuple(row) for row in codes.tolist()}) / len(x))
    assert model.figures["used"] == [len(set(column)) for column in codes.T.tolist()]


def test_balanced_assignment_is_for_training_and_the_last_levels() -> None:
    x = clusters(256)
    model = untrained(x, sinkhorn_levels=1, sinkhorn_epsilon=0.003)
    latent = model.encoder(x).detach()
    greedy = model.quantise(latent).codes
    model.train()
    balanced = model.quantise(latent).codes
    assert torch.equal(greedy[:, :2], balanced[:, :2])
    spread = [torch.bincount(codes[:, 2], minlength=8).float().std() for codes in (greedy, balanced)]
    assert spread[1] < spread[0]


def assert_same(one: RQVAE, other: RQVAE) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_seed_gives_one_result_and_leaves_the_callers_streams_alone() -> None:
    x = clusters()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = train_rqvae(x, settings(dropout=0.2), seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert_same(one, train_rqvae(x.numpy(), settings(dropout=0.2), seed=1))
    assert not torch.equal(one.levels, train_rqvae(x, settings(dropout=0.2), seed=2).levels)


class Cut(ResumeFile):
    """Cuts its training off after some saves."""

    def __init__(self, path: Path, saves: int) -> None:
        super().__init__(path)
        self.left = saves

    def save(self, kept: Any) -> None:
        super().save(kept)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("saves", [1, 3, 6])
def test_a_resumed_training_equals_one_that_was_not_cut_off(
    saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "RESUME_SECONDS", 0.0)
    x, texts = clusters(), clusters(width=5, seed=1)
    own = settings(dropout=0.2, batch_norm=True, reseed_dead=True, text_weight=0.5, sinkhorn_levels=1)
    whole = train_rqvae(x, own, seed=1, texts=texts)
    path = tmp_path / "resume.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_rqvae(x, own, seed=1, texts=texts, resume=Cut(path, saves))
    epochs: list[int] = []
    train_epoch = rqvae_training._Training._train_epoch

    def counted(self: Any) -> None:
        epochs.append(self.epoch)
        train_epoch(self)

    monkeypatch.setattr(rqvae_training._Training, "_train_epoch", counted)
    resumed = train_rqvae(x, own, seed=1, texts=texts, resume=ResumeFile(path))
    assert epochs == list(range(saves, 6))
    assert_same(resumed, whole)
    assert resumed.figures | {"seconds": 0} == whole.figures | {"seconds": 0}


def test_what_another_training_left_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "RESUME_SECONDS", 0.0)
    path = tmp_path / "resume.safetensors"
    train_rqvae(clusters(), SMALL, seed=1, resume=ResumeFile(path))
    other = clusters(seed=5)
    assert_same(train_rqvae(other, SMALL, seed=1, resume=ResumeFile(path)), train_rqvae(other, SMALL, seed=1))


def test_steps_stand_instead_of_epochs() -> None:
    # 200 items in batches of 64 are four steps an epoch.
    assert train_rqvae(clusters(), settings(steps=9), seed=0).figures["steps"] == 12
    assert train_rqvae(clusters(), settings(epochs=2), seed=0).figures["steps"] == 8


@pytest.mark.parametrize(("schedule", "last"), [("linear", 0.1), ("constant", 1.0)])
def test_the_learning_rate_rises_and_then_follows_its_schedule(schedule: str, last: float) -> None:
    rates = [rqvae_training._rate(5, 15, schedule)(step) for step in range(15)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1 and rates[-1] == pytest.approx(last)
    assert rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize("checkpoint", ["reconstruction", "loss", "collision"])
def test_the_best_weights_are_kept(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float, float, float]] = []
    see = rqvae_training._Training._look

    def recorded(self: Any) -> Any:
        found = see(self)
        seen.append((self.epoch, found.collision_rate, found.parts["loss"], found.parts["reconstruction"]))
        return found

    monkeypatch.setattr(rqvae_training._Training, "_look", recorded)
    model = train_rqvae(clusters(), settings(epochs=20, learning_rate=0.05, checkpoint=checkpoint), seed=0)
    orders: dict[str, Any] = {"loss": lambda row: row[2], "collision": lambda row: row[1:3]}
    best = min(seen, key=orders.get(checkpoint, lambda row: row[3]))
    assert [row[0] for row in seen] == list(range(2, 21, 2))
    assert model.figures["best_epoch"] == best[0]
    assert [model.figures[name] for name in ("collision_rate", "loss", "reconstruction")] == pytest.approx(best[1:])


def test_texts_pull_the_codes() -> None:
    x, texts = clusters(), clusters(width=5, seed=1)
    # The projection learns in each of them; by the weight, the codes come towards the texts.
    gaps = [
        train_rqvae(x, settings(text_weight=weight, epochs=40), seed=0, texts=texts).figures["text"]
        for weight in (1e-6, 1.0, 5.0)
    ]
    assert gaps == sorted(gaps, reverse=True) and gaps[2] < 0.7 * gaps[0]
    assert train_rqvae(x, settings(text_weight=0.0), seed=0, texts=texts).text_projector is None


def test_texts_alone_find_the_codes_of_their_items() -> None:
    """Where texts tell what the points tell, most items' texts lead to the codes that the items themselves have."""
    x = clusters(300)
    texts = 5 + 0.01 * x @ clusters(6, 9, seed=2)
    own = settings(levels=1, epochs=80, learning_rate=0.01, hidden_sizes=(32,), text_weight=1.0)
    model = train_rqvae(x, own, seed=0, texts=texts)
    by_text, by_point = (model.codebook.encode(found)[0][:, 0] for found in (model.project(texts), model.latent(x)))
    assert (by_text == by_point).float().mean() > 0.6
    with pytest.raises(UserError, match=r"for vectors of 9 dimensions, but was given \(4,\)"):
        model.project(texts[:, :4])
    with pytest.raises(UserError, match="trained without texts"):
        untrained(x).project(texts)


def test_dead_codes_move_to_items_far_from_theirs() -> None:
    x = clusters()
    model = untrained(x, levels=2)
    optimizer = torch.optim.AdamW(model.parameters())
    model.losses(x)[0]["loss"].backward()
    optimizer.step()
    with torch.no_grad():
        model.levels[0, 2:5] = 1000.0
    before = look(model, x, None)
    alive = sorted(set(range(8)) - {2, 3, 4})
    kept = model.levels[0, alive].clone()
    assert before.used[0] == 5
    reseed_dead(model, x, before.codes, optimizer)
    assert look(model, x, None).used[0] == 8
    assert torch.equal(model.levels[0, alive], kept)
    latent = model.latent(x)
    assert all((latent == code).all(1).any() for code in model.levels[0, 2:5])
    assert not optimizer.state[model.levels]["exp_avg"][0, 2:5].any()
    assert optimizer.state[model.levels]["exp_avg"][0, alive].any()


def test_a_collapse_stops_the_training_in_one_line() -> None:
    three = clusters(3).repeat(30, 1)
    with pytest.raises(
        TrainingStoppedError, match=r"at level 1 items use 3 of 8 codes \(37.5%.*50.0%\).*reseed"
    ) as told:
        train_rqvae(three, settings(least_usage=0.5), seed=0)
    assert "\n" not in str(told.value)
    train_rqvae(three, settings(least_usage=0.3, levels=1), seed=0)


def test_a_collapse_that_reseeding_mends_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clusters()
    used: list[int] = []
    plain = rqvae_training.reseed_dead

    def watched(model: RQVAE, points: torch.Tensor, codes: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        used.append(min(len(column.unique()) for column in codes.T))
        plain(model, points, codes, optimizer)

    monkeypatch.setattr(rqvae_training, "reseed_dead", watched)

    def far_away(model: RQVAE, *more: Any) -> None:
        model.levels.data.fill_(1e3)
        model.levels.data[:, 0] = 0

    # All items begin with one code, so that the first look finds a collapse.
    monkeypatch.setattr(rqvae_training, "start_codes", far_away)
    with pytest.raises(TrainingStoppedError, match="has collapsed"):
        train_rqvae(x, settings(least_usage=0.5), seed=0)
    made = train_rqvae(x, settings(least_usage=0.5, reseed_dead=True, epochs=30), seed=0)
    assert used[0] < 4
    assert min(look(made, x, None).used) >= 4


def test_few_items_are_no_collapse() -> None:
    check_collapse([10, 9], 256, 10, 0.9, "nothing")
    with pytest.raises(TrainingStoppedError, match="at level 2 items use 8 of 10 codes"):
        check_collapse([10, 8], 256, 10, 0.9, "nothing")


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    with pytest.raises(TrainingStoppedError, match=r"the loss is no number in epoch .*code_learning_rate"):
        train_rqvae(clusters(), settings(learning_rate=1e30, max_norm=0.0), seed=0)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    x = clusters()
    model = train_rqvae(x, settings(batch_norm=True, text_weight=0.1), seed=0, texts=clusters(width=5))
    model.save(tmp_path)
    found = RQVAE.load(tmp_path)
    assert_same(found, model)
    assert (found.settings, found.figures) == (model.settings, model.figures)
    assert torch.equal(found.reconstruct(x), model.reconstruct(x))
    assert torch.equal(found.project(clusters(width=5)), model.project(clusters(width=5)))


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION])
def test_damaged_files_are_told_in_one_line(name: str, tmp_path: Path) -> None:
    train_rqvae(clusters(), settings(epochs=0), seed=0).save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(UserError, match="holds no whole RQ-VAE") as told:
        RQVAE.load(tmp_path)
    assert "\n" not in str(told.value)


def broken() -> Tensor:
    x = clusters()
    x[7, 2] = float("nan")
    return x


@pytest.mark.parametrize(
    ("x", "changes", "texts", "words"),
    [
        (broken(), {}, None, "1 of 200 points to quantise .*row 7"),
        (clusters()[0], {}, None, "should be a table"),
        (clusters(7), {}, None, "fewer items than codes: 7 items for 8 codes"),
        (clusters(), {"text_weight": 1.0}, None, "there are no text embeddings"),
        (clusters(), {"text_weight": 1.0}, clusters(100), "100 text embeddings for 200 points"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(x: Tensor, changes: dict[str, Any], texts: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train_rqvae(x, settings(**changes), seed=0, texts=texts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reduction": "none"}, "reduction is 'none'; it can be mean or sum"),
        ({"checkpoint": "lost"}, "checkpoint is 'lost'"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
        ({"sinkhorn_levels": 4}, "sinkhorn_levels is 4; it should be from 0 to 3"),
        ({"codes": 0}, "codes is 0; it should be at least 1"),
        ({"kmeans_points": 4}, "kmeans_points is 4, too few to start 8 codes"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        settings(**changes)
