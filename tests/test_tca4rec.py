"""TCA4Rec: what it changes of a base's loss and what not, what its teacher is asked, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from catalogues import dictionary
from small_models import SMALL
from test_aligntokenrec import OPTIONS, SETTINGS, loader, shipped, tokens
from test_errors import refused
from test_glta import N_ITEMS, dataset, histories
from test_soft_labels import naive
from tiny_folders import KINDS, write

from recbole_llm import registry
from recbole_llm.backbone.load import load_backbone, load_with_head
from recbole_llm.config import Config
from recbole_llm.data.instructions import TokenBatch
from recbole_llm.data.phases import TRAIN
from recbole_llm.errors import UserError
from recbole_llm.evaluation.rankings import Rankings
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.aligntokenrec import FINE_TUNING, AlignTokenRec
from recbole_llm.model.lcrec import LCRec
from recbole_llm.model.letter import LETTER
from recbole_llm.model.tca4rec import TCA4Rec
from recbole_llm.objectives.soft_loss import FORMS
from recbole_llm.schema import Loader, properties_dir
from recbole_llm.tasks import number
from recbole_llm.tasks.behaviour import SEQUENTIAL
from recbole_llm.training.found import config_of
from recbole_llm.training.pipeline import code_mark, fit, prepared, store_of
from recbole_llm.training.runs import run
from recbole_llm.training.store import StageStore
from recbole_llm.training.teacher import Teacher
from recbole_llm.training.teacher_labels import cached_labels

BASES = {"AlignTokenRec": (AlignTokenRec, {}), "LCRec": (LCRec, {"prompts": "lcrec", "tasks": [SEQUENTIAL]})}
# Another temperature than 1 has to be that of the loss against soft labels too.
BASES["LETTER"] = (LETTER, {"prompts": "lcrec", "tasks": [SEQUENTIAL], "loss_temperature": 0.7})
TEACHERS = (
    "SASRec",
    "BERT4Rec",
    "GRU4Rec",
    "LightGCN",
    "DCCF",
    "BPR",
    "ItemKNN",
    "EASE",
    "Pop",
    "FM",
    "LightGCNPlus",
    "RLMRecGen",
    "GLTA",
)


def own() -> dict[str, Any]:
    return yaml.load((properties_dir() / "model" / "TCA4Rec.yaml").read_text(encoding="utf-8"), Loader=Loader)


def scores(moments: torch.Tensor) -> torch.Tensor:
    """A teacher's, different for every interaction."""
    rows = [torch.randn(N_ITEMS, generator=torch.Generator().manual_seed(int(moment))) for moment in moments]
    return torch.stack(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(KINDS["llama"], tmp_path_factory.mktemp("llama"))


def build(folder: Path, model_class: Any, item_tokens: ItemTokens | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    made = model_class({**shipped(), **own(), **SETTINGS, **settings}, dataset())
    made.prepare(
        item_tokens=item_tokens or tokens(), backbone=load_backbone(folder, **OPTIONS),
        head_model=load_with_head(folder, **OPTIONS), tie_order=torch.arange(N_ITEMS), texts={},
    )  # fmt: skip
    made.begin_stage(FINE_TUNING)
    if hasattr(made, "take_teacher"):
        made.take_teacher(SimpleNamespace(logits=scores))
    return made.eval()


def sampled(model: Any, **settings: Any) -> tuple[Any, TokenBatch]:
    torch.manual_seed(3)
    samples = next(iter(loader(**{"tasks": model.config["tasks"], "train_batch_size": 24, **settings})))
    return samples, model.training_batch(samples)


def lists_of(model: Any, batch: TokenBatch, row: int) -> list[tuple[int, int]]:
    """Places among the labels, and labels, of a prompt."""
    return [(place, int(batch.labels[place])) for place in (batch.rows == row).nonzero().squeeze(1).tolist()]


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("base", BASES)
def test_alpha_0_is_the_bases_loss_and_gradient(base: str, positions: str, form: str, folder: Path) -> None:
    plain_class, more = BASES[base]
    settings = {**more, "train_positions": positions}
    plain = build(folder, plain_class, **settings)
    wrapped = build(folder, TCA4Rec.over(base), **settings, base_model=base, alpha=0.0, tca_loss=form)
    assert isinstance(wrapped, plain_class) and type(wrapped).__name__ == "TCA4Rec"
    gradients, losses = [], []
    for model in (plain, wrapped):
        loss = model.stage_loss(FINE_TUNING, sampled(model)[1])
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    mixed = build(folder, TCA4Rec.over(base), **settings, base_model=base, alpha=0.5, tca_loss=form)
    assert abs(mixed.stage_loss(FINE_TUNING, sampled(mixed)[1]).item() - losses[0]) > 1e-4


@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize("positions", ["all", "response"])
def test_the_tokens_of_next_items_get_the_teachers_shares_and_no_others(
    positions: str, mask_history: bool, folder: Path
) -> None:
    model = build(folder, TCA4Rec, train_positions=positions, mask_history=mask_history)
    samples, batch = sampled(model)
    soft, counted = model.soft_labels(batch)
    assert counted is None and len(soft) == len(batch.labels) and torch.equal(soft.labels, batch.labels)
    dense = soft.dense(int(model._lm_ids[-1]) + 1)
    nodes, first = dictionary(tokens()), int(model._lm_ids[0])
    items, offsets = histories().items, histories().offsets
    seen = {"soft": 0, "hard": 0}
    for row in range(len(batch.ids)):
        told = lists_of(model, batch, row)
        answer: list[int] = []
        if int(samples["task"][row]) == number(SEQUENTIAL):
            stop = int(samples["stop"][row])
            target = int(items[stop])
            assert int(batch.moments[row]) == stop and target == int(samples["target"][row])
            user_start = max(int(offset) for offset in offsets if offset <= stop)
            excluded = set(items[user_start:stop].tolist()) - {target} if mask_history else set()
            answer = tokens().of(target)
            logits = scores(torch.tensor([stop]))[0].clone()
            logits[0] = -math.inf
            # The answer's tokens are the last labels but the end token.
            for depth, (place, label) in enumerate(told[-len(answer) - 1 : -1]):
                assert label == first + answer[depth]
                expected = naive(nodes, tuple(answer[:depth]), answer[depth], logits, excluded)
                wanted = torch.zeros(dense.shape[1])
                for token, share in expected.items():
                    wanted[first + token] = share
                torch.testing.assert_close(dense[place], wanted, rtol=1e-4, atol=1e-6)
                seen["soft"] += 1
        else:
            assert int(batch.moments[row]) == -1
        for place, label in told[: len(told) - len(answer) - 1] + told[-1:] if answer else told:
            assert dense[place, label] == 1 and dense[place].sum() == 1
            seen["hard"] += 1
    assert seen["soft"] and seen["hard"] and sum(seen.values()) == len(batch.labels)


def test_skipped_and_dropped_labels_are_not_in_the_mean(folder: Path) -> None:
    items = torch.arange(N_ITEMS)
    codes = torch.stack([items % 3, items // 3, items % 2], dim=1)
    codes[0] = -1
    sequential = {"tasks": [SEQUENTIAL], "train_positions": "response"}
    forced = build(folder, TCA4Rec, ItemTokens.from_codes(codes, [3, 10, 2]), skip_forced=True, **sequential)
    _, batch = sampled(forced)
    # Two codes tell the items apart, so the third is forced; the end token, no item's, counts.
    _, counted = forced.soft_labels(batch)
    assert counted is not None and counted.tolist() == [True, True, False, True] * len(batch.ids)
    # Soft labels on the items shown leave these in the mean.
    shown = sequential | {"train_positions": "all", "skip_forced": True, "alpha": 0.0}
    pair = [build(folder, TCA4Rec, forced.item_tokens, soft_history=soft, **shown) for soft in (False, True)]
    batches = [sampled(model)[1] for model in pair]
    masks = [model.soft_labels(batch)[1] for model, batch in zip(pair, batches, strict=True)]
    assert masks[0] is not None and not masks[0].all() and torch.equal(*masks)
    quirky = build(folder, TCA4Rec, official_quirks=True, alpha=0.0, **sequential)
    _, batch = sampled(quirky)
    _, counted = quirky.soft_labels(batch)
    # Of the codes and the end token of each answer the last two are none, and what is no label is not ranked by.
    assert quirky._searched()[0] is quirky.item_tokens and forced._searched()[0].size == forced.item_tokens.size + 1
    assert counted is not None and counted.tolist() == [True, True, False, False] * len(batch.ids)
    logits = torch.randn(len(batch.labels), int(quirky._lm_ids[-1]) + 1, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(logits[counted], batch.labels[counted])
    assert quirky.label_loss(logits, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_several_processes_have_the_loss_of_one(folder: Path) -> None:
    model = build(folder, TCA4Rec, alpha=0.5)
    _, batch = sampled(model)
    with torch.no_grad():
        whole = model.stage_loss(FINE_TUNING, batch).item()
        parts = [batch.share(rank, 3) for rank in range(3)]
        shares = [model.stage_loss(FINE_TUNING, part).item() * part.targets_count() for part in parts]
    assert sum(shares) / batch.targets_count() == pytest.approx(whole, rel=1e-5)


def test_prompts_that_are_left_out_take_their_moments_along(folder: Path) -> None:
    plain = build(folder, TCA4Rec, alpha=0.5)
    _, whole = sampled(plain)
    lengths = torch.zeros(len(whole.ids), dtype=torch.long).scatter_reduce(0, whole.rows, whole.places, "amax") + 2
    room = int(lengths.float().median())
    tight = build(folder, TCA4Rec, alpha=0.5)
    tight.writer.leave_room(room, drop=True)
    _, batch = sampled(tight)
    kept = lengths <= room
    assert 0 < len(batch.ids) < len(whole.ids) and torch.equal(batch.moments, whole.moments[kept])
    assert (batch.moments >= 0).any() and torch.isfinite(tight.stage_loss(FINE_TUNING, batch))


def prepared_labels(model: Any, store: StageStore, **settings: Any) -> dict[str, Any]:
    """What training does before it begins, where the labels are to be made once."""
    more = {"show_progress": False, "eval_max_cells": 100, "eval_batch_size": 4096, "cf_model": "SASRec", **settings}
    model.teacher.fingerprint = "none"
    own = dataset()
    own.item_num = N_ITEMS
    return cached_labels({**model.config, **more}, own, model, store)


@pytest.mark.parametrize(
    "more", [{}, {"mask_history": True, "beta": 0.5}, {"soft_history": True}, {"official_quirks": True}]
)
def test_labels_made_before_are_those_that_are_asked_for(more: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    live = build(folder, TCA4Rec, alpha=0.5, **more)
    cached = build(folder, TCA4Rec, alpha=0.5, **more)
    line = prepared_labels(cached, StageStore(tmp_path), teacher_cache_mib=1)
    assert line["name"] == "teacher_labels" and line["dropped_max"] < 1e-6 and 0 < line["mib"] <= 1
    cached.take_teacher(SimpleNamespace())
    batch = sampled(live)[1]
    for part in (batch, batch.share(1, 3)):
        losses = [model.stage_loss(FINE_TUNING, part).item() for model in (live, cached)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        pairs = zip(*(vars(model.soft_labels(part)[0]).items() for model in (live, cached)))
        for (name, one), (_, other) in pairs:
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7, msg=name)


def test_labels_are_found_again_and_follow_what_they_depend_on(folder: Path, tmp_path: Path) -> None:
    store, made = StageStore(tmp_path), []
    for more in ({}, {}, {"alpha": 0.9}, {"beta": 2.0}, {"mask_history": True}):
        made.append(prepared_labels(build(folder, TCA4Rec, **more), store, teacher_cache_mib=1))
    # As many MiB more, where all is in it: the same.
    made.append(prepared_labels(build(folder, TCA4Rec), store, teacher_cache_mib=2))
    assert [line["cached"] for line in made] == [False, True, True, False, False, True]


def items_labels(model: Any, batch: TokenBatch) -> dict[int, list[torch.Tensor]]:
    """Of every item that labels of a batch are tokens of, by its interaction: their distributions, a copy a prompt."""
    dense = model.soft_labels(batch)[0].dense(int(model._lm_ids[-1]) + 1)
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    for row, moment, labels in zip(batch.rows.tolist(), batch.origins.tolist(), dense):
        if moment >= 0:
            found.setdefault((moment, row), []).append(labels)
    by_moment: dict[int, list[torch.Tensor]] = {}
    for (moment, _), rows in found.items():
        by_moment.setdefault(moment, []).append(torch.stack(rows))
    return by_moment


@pytest.mark.parametrize("more", [{}, {"history_dropout": 0.5}, {"mask_history": True}, {"room": 30}])
def test_items_shown_have_the_labels_that_they_have_as_answers(more: dict[str, Any], folder: Path) -> None:
    more, room = {key: value for key, value in more.items() if key != "room"}, more.get("room")
    settings = {"tasks": [SEQUENTIAL, "negative"], **more}
    shown = build(folder, TCA4Rec, soft_history=True, **settings)
    told = build(folder, TCA4Rec, train_positions="response", **settings)
    answers = items_labels(told, sampled(told, train_batch_size=10_000)[1])
    if room:
        shown.writer.leave_room(shown.writer.shortest() + 12, drop=False)
    batch = sampled(shown, train_batch_size=10_000)[1]
    if room:
        assert shown.writer.too_long
    labels = items_labels(shown, batch)
    copies = 0
    for moment, rows in labels.items():
        item = tokens().of(int(histories().items[moment]))
        for one in rows:
            assert one.shape[0] == len(item)
            assert bool((one[torch.arange(len(item)), shown._lm_ids[torch.tensor(item)]] > 0).all())
            torch.testing.assert_close(one, rows[0])
        if moment in answers and len(answers[moment][0]) == len(item):
            torch.testing.assert_close(rows[0], answers[moment][0])
            copies += len(rows) - 1
    assert copies > 20
    # Hard labels are left for end tokens, and for items of prompts that no moment is known of.
    hard = (batch.origins < 0).nonzero().squeeze(1)
    soft = shown.soft_labels(batch)[0]
    assert bool((soft.samples[hard] == -1).all()) and bool((soft.samples[batch.origins >= 0] >= 0).all())
    plain = build(folder, TCA4Rec, **settings)
    assert plain.stage_loss(FINE_TUNING, batch).item() != shown.stage_loss(FINE_TUNING, batch).item()


# --- the teacher -----------------------------------------------------------------------------------------------------


def small(settings_of: Callable[..., dict[str, Any]], **more: Any) -> dict[str, Any]:
    return settings_of(item_text="{movie_title} {class}", **SMALL["TCA4Rec"]) | more


def raw_rows(folder: Path) -> dict[str, list[str]]:
    """Users' items by time, ties as in the file, by plain reading."""
    head, *lines = (folder / "small" / "small.inter").read_text(encoding="utf-8").splitlines()
    names = [name.partition(":")[0] for name in head.split("\t")]
    rows = [dict(zip(names, line.split("\t"))) for line in lines]
    by_user: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: float(row["timestamp"])):
        by_user.setdefault(row["user_id"], []).append(row["item_id"])
    return by_user


def test_a_teacher_reads_nothing_from_the_target_on_and_learns_nothing(
    settings_of: Callable[..., dict[str, Any]], small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recbole_llm.model.sasrec import SASRec

    read: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    asked: list[torch.Tensor] = []
    states: list[dict[str, torch.Tensor]] = []
    score, ask = SASRec.full_sort_predict, Teacher.logits

    def watched(self: Any, interaction: Any) -> torch.Tensor:
        read.append((interaction["user_id"], interaction["item_id_list"], interaction["item_length"]))
        return score(self, interaction)

    def asking(self: Teacher, moments: torch.Tensor) -> torch.Tensor:
        if not states:
            states.append({name: value.clone() for name, value in self.model.state_dict().items()})
        asked.append(moments.clone())
        read.clear()
        found = ask(self, moments)
        told.extend(read)
        assert found.dtype == torch.float32 and not found.requires_grad and not self.model.training
        return found

    told: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(SASRec, "full_sort_predict", watched)
    monkeypatch.setattr(Teacher, "logits", asking)
    config = Config("TCA4Rec", "small", config_dict=small(settings_of, alpha=0.5, epochs=1, eval_step=0))
    trained = fit(config, store_of(config))
    teacher = trained.parts["cf_model"].model
    assert all(weight.grad is None for weight in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, states[0][name]), name
    assert not set(map(id, teacher.parameters())) & set(map(id, trained.model.parameters()))

    split = trained.train_data._dataset.split
    raw_user, raw_item = (trained.dataset.field2id_token[field] for field in ("user_id", "item_id"))
    by_user, count = raw_rows(small_data), 0
    targets = split.items[split.phases == TRAIN]
    for moments, (users, lists, lengths) in zip(asked, told, strict=True):
        for moment, user, row, length in zip(moments.tolist(), users.tolist(), lists.tolist(), lengths.tolist()):
            shown, target = raw_item[row[:length]].tolist(), raw_item[targets[moment]]
            # Leave one out: the last two are valid and test.
            sequence = by_user[raw_user[user]][:-2]
            place = sequence.index(target)
            assert sequence.count(target) == 1 and shown == sequence[:place][-10:] and not any(row[length:])
            count += 1
    assert count > 50


@pytest.mark.parametrize("name", TEACHERS)
def test_whatever_scores_the_catalogue_can_teach(
    name: str, settings_of: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    quick = SMALL.get(name, {}) | {"eval_step": 0, "epochs": 1} | ({"history_length": 5} if name == "GLTA" else {})
    more = {f"cf_model.{key}": value for key, value in quick.items()}
    given = {key: value for key, value in small(settings_of).items() if not key.startswith("cf_model.")}
    config = Config("TCA4Rec", "small", config_dict=given | more | {"cf_model": name})
    _, train_data, _, _ = prepared(config)
    made = fit(config.part("cf_model"), store_of(config))
    with caplog.at_level("INFO", logger="recbole_llm"):
        teacher = Teacher(made, train_data._dataset)
    sequential = name in ("SASRec", "BERT4Rec", "GRU4Rec", "GLTA")
    told = "is told of what stood before an interaction" if sequential else "reads no history"
    assert f"{name} {told}, and was trained on all train interactions" in caplog.text
    moments = train_data.stops[[3, 40, 41, 3]]
    found = teacher.logits(moments)
    assert found.shape == (4, train_data._dataset.item_num) and found.dtype == torch.float32
    assert torch.equal(found[0], found[3]) and bool((found[:, 0] == -math.inf).all()) and not found.isnan().any()
    alone = torch.cat([teacher.logits(moment.view(1)) for moment in moments])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    assert name == "Pop" or found[0, 1:].unique().numel() > 1


def test_the_teacher_is_the_leaderboards_own_row(settings_of: Callable[..., dict[str, Any]]) -> None:
    settings = small(settings_of)
    del settings["cf_model.eval_step"]
    inside = run("TCA4Rec", "small", config_dict=settings)
    names = [stage["name"] for stage in inside["stages"]]
    assert names.index("item_tokens") < names.index("cf_model") < names.index("fine_tuning")
    assert inside["config"]["base_model"] == "AlignTokenRec" and inside["config"]["cf_model"] == "SASRec"
    plain = {key: value for key, value in settings.items() if key in settings_of()}
    teachers = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith("cf_model.")}
    alone = run("SASRec", "small", config_dict=plain | teachers)
    assert alone["stages"][0]["cached"]
    assert inside["parts"]["cf_model"]["test"] == alone["test"]
    assert inside["stages"][names.index("cf_model")]["fingerprint"] == alone["stages"][0]["fingerprint"]
    # Both rank the same users; at 20 beams the base gives 20 items, whatever they are.
    ranked = [Rankings.read(Path(result["result_file"]).with_name("rankings.npz")) for result in (inside, alone)]
    assert ranked[0].user_id.tolist() == ranked[1].user_id.tolist()
    for k in (5, 10, 20):
        shared = [
            len({*one[:k]} & {*other[:k]}) / k for one, other in zip(ranked[0].top.tolist(), ranked[1].top.tolist())
        ]
        assert inside["consistency"]["cf_model"][f"overlap@{k}"] == pytest.approx(sum(shared) / len(shared))
    assert "consistency" not in alone
    # Another share of the teacher is another fine-tuning, of the same parts.
    other = run("TCA4Rec", "small", config_dict=settings | {"alpha": 0.25})
    assert [stage["name"] for stage in other["stages"] if not stage["cached"]] == ["fine_tuning"]
    # And another teacher too.
    taught = run("TCA4Rec", "small", config_dict=settings | {"cf_model.learning_rate": 0.01})
    assert [stage["name"] for stage in taught["stages"] if not stage["cached"]] == ["cf_model", "fine_tuning"]


def test_a_run_with_alpha_0_takes_the_bases_steps(settings_of: Callable[..., dict[str, Any]]) -> None:
    settings = small(settings_of, epochs=1)
    bases = {key: value for key, value in settings.items() if not key.startswith(("cf_model", "alpha"))}
    plain = run("AlignTokenRec", "small", config_dict=bases)
    wrapped = run("TCA4Rec", "small", config_dict=settings | {"alpha": 0.0})
    assert wrapped["curves"]["loss"] == pytest.approx(plain["curves"]["loss"], rel=1e-5)
    shared = [name for name in ("embedding_model", "backbone", "item_texts", "item_tokens")]
    cached = {stage["name"]: stage["cached"] for stage in wrapped["stages"]}
    assert all(cached[name] for name in shared)


def test_a_run_reads_labels_made_before(
    settings_of: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(settings_of, epochs=1, eval_step=0)
    live = run("TCA4Rec", "small", config_dict=settings | {"evaluate_parts": True})
    # Frozen since, it has trained all that it has.
    taught = live["parts"]["cf_model"]["parameters"]
    assert taught["trainable"] == taught["total"] > 0
    made = run("TCA4Rec", "small", config_dict=settings | {"teacher_cache_mib": 64})
    assert [stage["name"] for stage in made["stages"] if not stage["cached"]] == ["teacher_labels", "fine_tuning"]
    assert made["curves"]["loss"] == pytest.approx(live["curves"]["loss"], rel=1e-5)
    assert "consistency" in made
    # Another share of the teacher reads the same; a second run finds all.
    other = run("TCA4Rec", "small", config_dict=settings | {"teacher_cache_mib": 64, "alpha": 0.2})
    assert [stage["name"] for stage in other["stages"] if not stage["cached"]] == ["fine_tuning"]
    (line,) = [stage for stage in other["stages"] if stage["name"] == "teacher_labels"]
    assert line["dropped_max"] < 1e-6 < line["mib"] < 64
    # What was learned from labels made otherwise is learned anew.
    monkeypatch.setattr("recbole_llm.training.teacher_labels.LABELS_VERSION", -1)
    anew = run("TCA4Rec", "small", config_dict=settings | {"teacher_cache_mib": 64, "alpha": 0.2})
    assert [stage["name"] for stage in anew["stages"] if not stage["cached"]] == ["teacher_labels", "fine_tuning"]
    # Raw ids have one position with all items: a mebibyte keeps few of them.
    few = {"teacher_cache_mib": 1, "item_tokens": "raw"}
    few = {key: value for key, value in settings.items() if not key.startswith(("code_", "embedding_model"))} | few
    cut = run("TCA4Rec", "small", config_dict=few)
    (line,) = [stage for stage in cut["stages"] if stage["name"] == "teacher_labels"]
    assert 0 < line["dropped_mean"] < line["dropped_max"] <= 1 and line["mib"] <= 1
    assert "likeliest tokens" in Path(cut["log_file"]).read_text(encoding="utf-8")


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_base_brings_its_own_settings() -> None:
    plain = Config("LCRec", "tiny", command_line=[])
    wrapped = Config("TCA4Rec", "tiny", config_dict={"base_model": "LCRec"}, command_line=[])
    mine = {*own(), "model"}
    assert {key: wrapped[key] for key in plain.final_config_dict if key not in mine} == {
        key: value for key, value in plain.final_config_dict.items() if key not in mine
    }
    assert wrapped.model_class is TCA4Rec.over("LCRec") and registry.parts_of(wrapped.model_class)[-1] == "cf_model"
    assert own()["base_model"] == TCA4Rec.wraps


def test_the_bases_keys_may_be_given_by_its_name() -> None:
    words = ["--base_model.epochs=3", "--base_model.embedding_model.epochs=2", "--cf_model.epochs=7"]
    config = Config("TCA4Rec", "tiny", command_line=words)
    assert config["epochs"] == 3 and config.part("embedding_model")["epochs"] == 2
    assert config.part("cf_model")["epochs"] == 7
    with pytest.raises(UserError, match=r"base_model\.epochs and epochs are one setting"):
        Config("TCA4Rec", "tiny", command_line=[*words, "--epochs=4"])
    with pytest.raises(UserError, match="unknown setting 'epoch'"):
        Config("TCA4Rec", "tiny", command_line=["--base_model.epoch=3"])


class Edited(AlignTokenRec):
    """A base of a user's own."""


def test_a_users_own_base_is_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {**registry.entries(), "Edited": registry.Entry("Edited", __name__, "external")}
    monkeypatch.setattr(registry, "entries", lambda: entries)
    config = Config("TCA4Rec", "tiny", config_dict={"base_model": "Edited"}, command_line=[])
    assert config["beams"] == shipped()["beams"] and config["alpha"] == own()["alpha"]
    assert issubclass(config.model_class, Edited) and code_mark(config.model_class) == code_mark(Edited) is not None
    assert code_mark(TCA4Rec) is None and code_mark(TCA4Rec.over("LCRec")) is None


def test_how_much_history_a_model_reads_is_its_own_affair() -> None:
    plain = Config("TCA4Rec", "tiny", command_line=[]).part("cf_model")
    longer = {"MAX_ITEM_LIST_LENGTH": 20, "history_length": 20}
    assert Config("TCA4Rec", "tiny", config_dict=longer, command_line=[]).part("cf_model").stage_keys() == (
        plain.stage_keys()
    )
    told = Config("TCA4Rec", "tiny", config_dict=longer | {"cf_model.MAX_ITEM_LIST_LENGTH": 30}, command_line=[])
    assert told.part("cf_model")["MAX_ITEM_LIST_LENGTH"] == 30 and told["MAX_ITEM_LIST_LENGTH"] == 20


def test_a_run_is_found_with_its_base() -> None:
    given = {"base_model": "LCRec", "cf_model": "LightGCN", "cf_model.epochs": 4, "alpha": 0.3, "fusion_samples": 7}
    config = Config("TCA4Rec", "tiny", config_dict=given, command_line=[])
    found = config_of({"model": "TCA4Rec", "dataset": "tiny", "config": config.as_dict()})
    assert found.model_class is config.model_class is TCA4Rec.over("LCRec")
    assert found.stage_keys() == config.stage_keys()
    assert found.part("cf_model").stage_keys() == config.part("cf_model").stage_keys()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "base_model=SASRec",
            ["base_model should generate items", "AlignTokenRec, LCRec, LETTER", " do; SASRec does not"],
        ),
        ("base_model=GLTA", ["do; GLTA does not"]),
        ("base_model=TCA4Rec", ["base_model should generate items", "TCA4Rec is what wraps one"]),
        ("base_model=AlignTokenRce", ["unknown model 'AlignTokenRce'", "'AlignTokenRec'"]),
        ("cf_model=SASRecCodes", ["cf_model should be a recommender that scores every item", "not SASRecCodes"]),
        ("cf_model=AlignTokenRec", ["cf_model should be", "not AlignTokenRec"]),
        ("cf_model=XGBoost", ["XGBoost"]),
        ("cf_model=DIEN", ["cf_model should be", "not DIEN"]),
        ("cf_model=SASRce", ["unknown model 'SASRce'", "'SASRec'"]),
        ("cf_model.epoch=3", ["unknown setting 'cf_model.epoch'", "'epochs'"]),
        ("cf_model.split_seed=3", ["another split", "split_seed"]),
        ("cf_model.time_scope=global", ["another split", "time_scope"]),
        ("cf_model.dataset=ml-100k", ["cf_model.dataset: SASRec has the run's dataset"]),
        ("cf_model.data_path=elsewhere", ["cf_model.data_path: SASRec has the run's data_path"]),
        ("alpha=1.5", ["alpha should be float 0..1", "1.5"]),
        ("alpha=-0.1", ["alpha should be float 0..1"]),
        ("teacher_cache_mib=-1", ["teacher_cache_mib should be int >= 0"]),
        ("beta=0", ["beta should be float > 0"]),
        ("beta=.inf", ["beta is the temperature", "not inf"]),
        ("beta=1e-320", ["beta is the temperature", "not 1e-320"]),
        # Its inverse is a number, and over log 2 infinite.
        ("beta=6e-309", ["beta is the temperature", "not 6e-309"]),
        ("tau=0", ["tau should be float > 0"]),
        ("tca_loss=ce", ["tca_loss should be", "log_mixture", "soft_ce", "kl"]),
    ],
)
def test_wrong_input_gets_one_line(setting: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "run", "--model=TCA4Rec", "--dataset=tiny", f"--{setting}")
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["soft_history=true", "train_positions=response"], "soft_history mixes labels of the items shown"),
        (["soft_history=true", "official_quirks=true"], "official_quirks is the release"),
        (["item_tokens=raw", "official_quirks=true"], "no item here has more than one: nothing would be learned"),
        (["skip_forced=true", "official_quirks=true"], "official_quirks is the release, where forced tokens count"),
        (
            ["base_model=P5", "tasks=[straightforward]"],
            "has no next item, whose labels TCA4Rec changes; add sequential",
        ),
    ],
)
def test_settings_that_go_against_each_other_are_refused(
    settings: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "run", "--model=TCA4Rec", "--dataset=tiny", *(f"--{one}" for one in settings))


def test_a_teacher_of_another_split_is_refused(settings_of: Callable[..., dict[str, Any]]) -> None:
    plain = {key: value for key, value in small(settings_of, epochs=1, eval_step=0).items() if key in settings_of()}
    config = Config("EASE", "small", config_dict=plain)
    made = fit(config, store_of(config))
    other = Config("EASE", "small", config_dict=plain | {"eval_args": {"split": {"LS": "test_only"}}})
    _, train_data, _, _ = prepared(other)
    with pytest.raises(UserError, match="cf_model: EASE was trained on other rows"):
        Teacher(made, train_data._dataset)
