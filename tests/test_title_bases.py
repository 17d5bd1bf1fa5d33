"""Recommenders that generate titles: their prompts, their losses, what they recommend, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_models import SMALL
from test_aligntokenrec import OPTIONS, SETTINGS, loader, users
from test_errors import refused
from test_glta import N_ITEMS, dataset, histories
from test_ranking import Fixed
from test_tca4rec import own as wrappers
from test_tca4rec import scores
from tiny_folders import KINDS, write

from recbole_llm.backbone.load import load_backbone
from recbole_llm.config import Config
from recbole_llm.data import create_dataset, data_preparation
from recbole_llm.data.instructions import TokenBatch
from recbole_llm.data.phases import TRAIN, VALID
from recbole_llm.errors import UserError
from recbole_llm.evaluation.ranking import measure
from recbole_llm.inspection import inspect
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.bigrec import BIGRec
from recbole_llm.model.generative import FINE_TUNING, GenerativeRecommender
from recbole_llm.model.msl import MSL
from recbole_llm.model.tallrec import TALLRec
from recbole_llm.model.tca4rec import TCA4Rec, _around
from recbole_llm.objectives.adaptive_temperature import HIGHEST, LOWEST, SHARE, adaptive_temperature
from recbole_llm.objectives.soft_loss import FORMS
from recbole_llm.registry import get_model, yaml_base
from recbole_llm.schema import Loader, properties_dir
from recbole_llm.serving.recommender import Recommender
from recbole_llm.training.item_tokens import KEPT
from recbole_llm.training.pipeline import fit, prepared, store_of
from recbole_llm.training.prepare import prepare
from recbole_llm.training.runs import run
from recbole_llm.training.store import StageStore
from recbole_llm.training.titles import tokenize_titles

BASES = {"TALLRec": TALLRec, "BIGRec": BIGRec, "MSL": MSL}
FIRST = ("The", "robot", "blue", "film", "number", "1995")
# Each begins like one other, which it goes on where that ends; the last two are equal.
TITLES = [
    "", *(f"{FIRST[item % 6]} ship {item // 12}{' of 1995' * (item // 6 % 2)}" for item in range(1, N_ITEMS - 2)),
    "robot", "robot",
]  # fmt: skip
ASK = """###Instruction:
Given the user interaction history, please recommend the game that user is most likely to view.

###Input:
User Interaction Histories: "{history}".

Then the game that user is most likely to view is:
###Response:
"""


def shipped(name: str) -> dict[str, Any]:
    files = [properties_dir() / "model" / f"{one}.yaml" for one in dict.fromkeys((yaml_base(name), name))]
    read = [yaml.load(file.read_text(encoding="utf-8"), Loader=Loader) for file in files]
    return {key: value for values in read for key, value in values.items()}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(KINDS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(KINDS["llama"], tmp_path_factory.mktemp("plain"))


def own_settings(name: str, **settings: Any) -> dict[str, Any]:
    told = {"model": name, "domain": "game", "gradient_accumulation_steps": 1}
    return {**shipped(name), **wrappers(), **SETTINGS, **told, **settings}


def build(folder: Path, model: Any, name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    backbone = load_backbone(folder, **OPTIONS, with_head=True)
    made = model(own_settings(name, **settings), dataset())
    made.prepare(
        item_tokens=ItemTokens.from_sequences([[], *backbone.encode_batch(TITLES[1:])], backbone.eos_id),
        backbone=backbone, head_model=backbone.causal, tie_order=torch.arange(N_ITEMS), texts={},
    )  # fmt: skip
    made.begin_stage(FINE_TUNING)
    if hasattr(made, "take_teacher"):
        made.take_teacher(SimpleNamespace(logits=scores))
    return made.eval()


def sampled(model: Any) -> tuple[Any, TokenBatch]:
    torch.manual_seed(3)
    own = {key: model.config[key] for key in ("tasks", "packing")}
    samples = next(iter(loader(**own, train_batch_size=24)))
    return samples, model.training_batch(samples)


def asked(model: Any, items: list[int]) -> list[int]:
    """The prompt of a history, put together by hand."""
    encode, (before, behind) = model.backbone.encode, ASK.split("{history}")
    told = [] if model.backbone.bos_id is None else [model.backbone.bos_id]
    told += encode(before)
    for place, item in enumerate(items):
        told += (encode('", "') if place else []) + encode(TITLES[item])
    return told + encode(behind)


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_prompts_show_titles_up_to_the_answer_which_ends_once(base: str, folder: Path) -> None:
    model = build(folder, BASES[base], base)
    samples, batch = sampled(model)
    items, starts, stops = histories().items, samples["start"].tolist(), samples["stop"].tolist()
    assert len(batch.ids) == len(stops) and int((samples["stop"] - samples["start"]).max()) == 4
    for row, (start, stop) in enumerate(zip(starts, stops)):
        mine = batch.rows == row
        labels, places = batch.labels[mine].tolist(), batch.places[mine].tolist()
        answer = [*model.backbone.encode(TITLES[items[stop]]), model.backbone.eos_id]
        answer = told_from_all(model, answer) if base == "MSL" else answer
        assert labels == answer and batch.answers[mine].all()
        prompt = asked(model, items[start:stop].tolist())
        # The last token is read from nowhere; what the prompt shows ends before the item that is asked for.
        read = len(prompt) + len(answer) - 1
        assert batch.ids[row, :read].tolist() == [*prompt, *answer[:-1]]
        assert places == list(range(len(prompt) - 1, read))
        assert int(batch.moments[row]) == stop
    assert model.writer.longest(4) >= int(batch.places.max()) + 2


def test_a_prompt_is_cut_to_its_room_and_keeps_its_answer(llama: Path) -> None:
    whole = build(llama, TALLRec, "TALLRec")
    longest = int(sampled(whole)[1].places.max()) + 2
    model = build(llama, TALLRec, "TALLRec", prompt_tokens=longest - 1)
    samples, batch = sampled(model)
    assert batch.ids.shape[1] < longest - 1 and model.writer.too_long["sequential"]
    for row, target in enumerate(samples["target"].tolist()):
        told = batch.labels[batch.rows == row].tolist()
        assert told == [*model.backbone.encode(TITLES[target]), model.backbone.eos_id]


def test_the_official_prompt_has_the_releases_words(llama: Path) -> None:
    plain, official = (build(llama, TALLRec, "TALLRec", official_prompt=own).templates for own in (False, True))
    assert plain.tasks["inference"][0].ask == ASK
    said = official.tasks["inference"][0].ask
    assert "please recommendate the game" in said and "Then the movie that user is most likely to watch is:" in said


# --- losses ----------------------------------------------------------------------------------------------------------


def sequences(model: Any) -> list[list[int]]:
    return [[*model.backbone.encode(title), model.backbone.eos_id] for title in TITLES[1:]]


def legal_after(model: Any, prefix: list[int]) -> list[int]:
    return sorted(
        {one[len(prefix)] for one in sequences(model) if one[: len(prefix)] == prefix and len(one) > len(prefix)}
    )


def told_from_all(model: Any, title: list[int]) -> list[int]:
    """The shortest beginning of a title that no other title has."""
    others = [one for one in sequences(model) if one != title]
    return next(title[:end] for end in range(1, len(title) + 1) if all(one[:end] != title[:end] for one in others))


def labels_of(batch: TokenBatch) -> Iterator[tuple[int, list[int], int]]:
    """Of each label its place among all, the tokens of the answer before it, and itself."""
    for row in range(len(batch.ids)):
        places = (batch.rows == row).nonzero().squeeze(1).tolist()
        told = batch.labels[places].tolist()
        for depth, place in enumerate(places):
            yield place, told[:depth], told[depth]


@pytest.mark.parametrize("forced_in_mean", [False, True])
@pytest.mark.parametrize("tau", [1.0, 4.5])
def test_msls_loss_is_a_dense_masked_softmax(tau: float, forced_in_mean: bool, folder: Path) -> None:
    model = build(folder, MSL, "MSL", temperature=tau, forced_in_mean=forced_in_mean)
    _, batch = sampled(model)
    size = model.backbone.embed_tokens.num_embeddings
    logits = 3 * torch.randn(len(batch.labels), size, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_(True)
    losses, forced = [], 0
    for place, prefix, label in labels_of(batch):
        legal = legal_after(model, prefix)
        mask = torch.full((size,), -torch.inf)
        mask[legal] = 0.0
        forced += len(legal) == 1
        if forced_in_mean or len(legal) > 1:
            losses.append(-(logits[place] / tau + mask).log_softmax(0)[label])
    expected = torch.stack(losses).mean()
    assert forced and len(losses) == len(batch.labels) - (0 if forced_in_mean else forced)
    (wanted,) = torch.autograd.grad(expected, logits)
    found = model.label_loss(logits, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "more",
    [
        {}, {"packing": "user"}, {"temperature": "ats"}, {"adapter": "full", "packing": "user"},
        {"forced_in_mean": True},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("loss", ["", *FORMS])
def test_what_msl_does_not_read_of_a_title_adds_nothing_to_loss_or_gradient(
    loss: str, more: dict[str, Any], llama: Path
) -> None:
    class Whole(MSL):
        def take_item_tokens(self, tokens: ItemTokens) -> None:
            self.forced_in_mean, asked_for = True, self.forced_in_mean
            super().take_item_tokens(tokens)
            self.forced_in_mean = asked_for

        def _loss_of(self, states: torch.Tensor, which: torch.Tensor | None, batch: TokenBatch) -> torch.Tensor:
            return GenerativeRecommender._loss_of(self, states, which, batch)

    found = []
    for base in (MSL, Whole):
        around = _around(base, "MSL") if loss else base
        model = build(llama, around, "MSL", base_model="MSL", tca_loss=loss or FORMS[0], alpha=0.4, **more)
        batch = sampled(model)[1]
        value = model.stage_loss(FINE_TUNING, batch)
        value.backward()
        found.append((value, batch, {name: weight.grad for name, weight in model.named_parameters()}))
    (short, read, ours), (whole, all_read, theirs) = found
    shorter = len(read.labels) < len(all_read.labels)
    assert shorter == ("forced_in_mean" not in more) and read.targets_count() == all_read.targets_count()
    torch.testing.assert_close(short, whole, rtol=1e-5, atol=0)
    assert ours.keys() == theirs.keys() and any(bool(gradient.any()) for gradient in ours.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_msls_prompts_are_those_of_whole_titles_where_there_is_little_room(llama: Path) -> None:
    whole = build(llama, TALLRec, "TALLRec")
    longest, room = whole.writer.longest(4), int(sampled(whole)[1].places.max()) - 7
    found = []
    for base in (MSL, TALLRec):
        model = build(llama, base, base.__name__, prompt_tokens=room)
        batch = sampled(model)[1]
        asked_for = [batch.places[batch.rows == row].min() for row in range(len(batch.ids))]
        found.append([ids[: place + 1].tolist() for ids, place in zip(batch.ids, asked_for, strict=True)])
        assert model.writer.longest(4) == longest and model.writer.too_long["sequential"]
        assert model.writer.longest_asked(4) == room
    assert found[0] == found[1]


def test_a_loss_of_ones_own_around_msl_is_trained(llama: Path) -> None:
    class Own(MSL):
        def label_loss(self, logits: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
            return 0.5 * super().label_loss(logits, batch)

    values = []
    for base in (MSL, Own):
        model = build(llama, base, "MSL")
        values.append(model.stage_loss(FINE_TUNING, sampled(model)[1]).item())
    assert values[1] == pytest.approx(0.5 * values[0], rel=1e-6)


def test_a_token_that_no_title_goes_on_with_moves_no_loss_of_msl_and_any_of_tallrec(llama: Path) -> None:
    msl, tallrec = build(llama, MSL, "MSL"), build(llama, TALLRec, "TALLRec")
    _, batch = sampled(msl)
    logits = torch.randn(len(batch.labels), msl.backbone.embed_tokens.num_embeddings)
    moved = logits.clone()
    used = {token for one in sequences(msl) for token in one}
    moved[:, [token for token in range(logits.shape[1]) if token not in used]] += 5
    assert torch.equal(msl.label_loss(moved, batch), msl.label_loss(logits, batch))
    assert tallrec.label_loss(moved, batch) > tallrec.label_loss(logits, batch) + 1
    plain = torch.nn.functional.cross_entropy(logits, batch.labels)
    assert torch.equal(tallrec.label_loss(logits, batch), plain)


def direct(scores: np.ndarray, labels: np.ndarray, eta: float) -> float:
    """The formula, row by row."""
    ahead, variances = [], []
    for row, label in zip(scores, labels):
        others = np.delete(row, label)
        ahead.append(row[label] - others.mean())
        variances.append(((others - others.mean()) ** 2).mean())
    share, d, v = math.log(scores.shape[1] * eta), float(np.mean(ahead)), float(np.mean(variances))
    tau = (d + math.sqrt(max(d * d - 2 * share * v, 0))) / (2 * share)
    return min(max(tau, LOWEST), HIGHEST)


@pytest.mark.parametrize("ahead", [-3.0, 4.0, 8.0, 10.0, 60.0])
def test_the_adaptive_temperature_is_the_formulas(ahead: float) -> None:
    draw = np.random.default_rng(2)
    scores, labels = draw.normal(size=(5, 40)) * 2, draw.integers(0, 40, 5)
    scores[np.arange(5), labels] += ahead
    found = adaptive_temperature(torch.from_numpy(scores), torch.from_numpy(labels), 0.25)
    assert found == pytest.approx(direct(scores, labels, 0.25), rel=1e-12)
    if ahead in (8.0, 10.0):
        # Within the bounds it is where normal scores give the label the share that is asked for.
        assert LOWEST < found < HIGHEST
        others = np.array([np.delete(row, label) for row, label in zip(scores, labels)])
        d = float((scores[np.arange(5), labels] - others.mean(1)).mean())
        assert d / found - others.var(1).mean() / (2 * found**2) == pytest.approx(math.log(40 * 0.25))


def test_few_tokens_give_a_label_its_share_at_any_temperature() -> None:
    for count in (1, 2, 4):
        assert adaptive_temperature(torch.zeros(3, count), torch.zeros(3, dtype=torch.long), 0.25) == HIGHEST


def test_msl_adapts_its_temperature_to_first_tokens_and_averages_it(tmp_path: Path) -> None:
    # Of its tokens several begin a title; of a SentencePiece model's so small it is always the blank.
    folder = write(KINDS["qwen2"], tmp_path)
    model = build(folder, MSL, "MSL", temperature="ats", ats_eta=1.0)
    fixed = build(folder, MSL, "MSL", temperature=2.0)
    _, batch = sampled(model)
    size = model.backbone.embed_tokens.num_embeddings
    first = legal_after(model, [])
    rows = [place for place, prefix, _ in labels_of(batch) if not prefix]
    model.train()
    running = None
    for step in range(3):
        logits = torch.randn(len(batch.labels), size, generator=torch.Generator().manual_seed(step))
        logits[torch.arange(len(batch.labels)), batch.labels] += 1.0 + step
        own = np.array([first.index(int(batch.labels[row])) for row in rows])
        now = direct(logits[rows][:, first].double().numpy(), own, 1.0)
        running = now if running is None else (1 - SHARE) * running + SHARE * now
        loss = model.label_loss(logits, batch)
        assert float(model.running_temperature) == pytest.approx(running, rel=1e-6)
        fixed.config["temperature"] = running
        # Multiplied by the temperature, as the authors' script does.
        assert loss.item() == pytest.approx(running * fixed.label_loss(logits, batch).item(), rel=1e-6)
    assert "running_temperature" in model.state_dict() and "running_temperature" not in fixed.state_dict()
    model.eval()
    model.label_loss(logits, batch)
    assert float(model.running_temperature) == pytest.approx(running, rel=1e-6)


@pytest.mark.parametrize("parts", ["processes", "batches"])
def test_msl_does_not_adapt_to_a_part_of_a_batch(parts: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if parts == "processes":
        monkeypatch.setenv("WORLD_SIZE", "2")
    steps = 1 if parts == "processes" else 2
    with pytest.raises(UserError, match="temperature: ats is taken from a whole batch"):
        MSL(own_settings("MSL", temperature="ats", gradient_accumulation_steps=steps), dataset())
    MSL(own_settings("MSL", gradient_accumulation_steps=steps), dataset())


@pytest.mark.parametrize(
    ("base", "answer", "words"),
    [
        ("TALLRec", "{target}.", r"should end with \{target\} for TALLRec.*but is '\{target\}.'"),
        ("MSL", "The title is {target}", r"should be \{target\} for MSL"),
        ("TALLRec", "The title is {target}", ""),
    ],
)
def test_answers_that_the_loss_cannot_take_are_refused(base: str, answer: str, words: str, tmp_path: Path) -> None:
    asked = {"ask": "After {history}", "answer": answer}
    content = {"wrapper": "{instruction}", "separator": ", ", "inference": "After {history}", "sequential": [asked]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    settings = own_settings(base, prompts=str(tmp_path / "own.yaml"))
    if not words:
        assert BASES[base](settings, dataset()).templates.tasks["sequential"][0].answer == answer
        return
    for model in (BASES[base], TCA4Rec.over(base)):
        with pytest.raises(UserError, match=words):
            model(settings, dataset())


@pytest.mark.parametrize("base", ["TALLRec", "MSL"])
def test_several_processes_have_the_loss_of_one(base: str, llama: Path) -> None:
    for model in (build(llama, BASES[base], base), build(llama, TCA4Rec.over(base), base, alpha=0.5)):
        _, batch = sampled(model)
        with torch.no_grad():
            whole = model.stage_loss(FINE_TUNING, batch).item()
            parts = [batch.share(rank, 3).to("cpu") for rank in range(3)]
            shares = [model.stage_loss(FINE_TUNING, part).item() * part.targets_count() for part in parts]
        assert (batch.targets_count() < len(batch.labels)) == (base == "MSL")
        assert sum(shares) / batch.targets_count() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("base", ["TALLRec", "MSL"])
@pytest.mark.parametrize("key", ["skip_forced", "official_quirks"])
def test_labels_that_do_not_count_weigh_nothing_among_processes(key: str, base: str, llama: Path) -> None:
    model = build(llama, TCA4Rec.over(base), base, alpha=0.5, **{key: True})
    _, batch = sampled(model)
    _, counted = model.soft_labels(batch)
    assert counted is not None and batch.targets_count() == int(counted.sum()) < len(batch.labels)
    with torch.no_grad():
        whole = model.stage_loss(FINE_TUNING, batch).item()
        parts = [batch.share(rank, 3).to("cpu") for rank in range(3)]
        shares = [model.stage_loss(FINE_TUNING, part).item() * part.targets_count() for part in parts]
    assert sum(shares) / batch.targets_count() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("base", "more"),
    [("TALLRec", {}), ("BIGRec", {}), ("MSL", {}), ("MSL", {"temperature": "ats"}), ("MSL", {"forced_in_mean": True})],
    ids=str,
)
def test_alpha_0_is_the_bases_loss_and_gradient(base: str, more: dict[str, Any], form: str, llama: Path) -> None:
    plain = build(llama, BASES[base], base, **more)
    around = {**more, "base_model": base, "tca_loss": form}
    wrapped = build(llama, TCA4Rec.over(base), base, alpha=0.0, **around)
    assert isinstance(wrapped, BASES[base]) and type(wrapped).__name__ == "TCA4Rec"
    losses, gradients = [], []
    for model in (plain, wrapped):
        loss = model.stage_loss(FINE_TUNING, sampled(model)[1])
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys() and any(one.abs().max() > 0 for one in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    mixed = build(llama, TCA4Rec.over(base), base, alpha=0.5, **around)
    assert abs(mixed.stage_loss(FINE_TUNING, sampled(mixed)[1]).item() - losses[0]) > 1e-4


def test_around_msl_soft_labels_are_over_legal_tokens(llama: Path) -> None:
    model = build(llama, TCA4Rec.over("MSL"), "MSL", alpha=0.3, tau=1.0, temperature=2.0, base_model="MSL")
    _, batch = sampled(model)
    logits = torch.randn(len(batch.labels), model.backbone.embed_tokens.num_embeddings)
    soft, _ = model.soft_labels(batch)
    shares = soft.dense(logits.shape[1])
    losses = []
    for place, prefix, label in labels_of(batch):
        legal = legal_after(model, prefix)
        chances = (logits[place, legal] / 2).softmax(0)
        mixed = 0.3 * shares[place, legal] + 0.7 * torch.tensor([float(token == label) for token in legal])
        if len(legal) > 1:
            losses.append(-(chances @ mixed).log())
    assert model.label_loss(logits, batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_official_quirks_around_a_title_leave_its_last_token_and_its_end_out(llama: Path) -> None:
    model = build(llama, TCA4Rec.over("MSL"), "MSL", alpha=0.0, official_quirks=True, temperature=1.0)
    _, batch = sampled(model)
    _, counted = model.soft_labels(batch)
    logits = torch.randn(len(batch.labels), model.backbone.embed_tokens.num_embeddings)
    losses = []
    assert counted is not None
    for row in range(len(batch.ids)):
        assert counted[batch.rows == row].tolist()[-2:] == [False, False] and counted[batch.rows == row][:-2].all()
    for place, prefix, label in labels_of(batch):
        if counted[place]:
            legal = legal_after(model, prefix)
            losses.append(-logits[place, legal].log_softmax(0)[legal.index(label)])
    # Forced labels count, as there.
    assert model.label_loss(logits, batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


# --- what trains, and what is recommended ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_head_is_the_language_models_and_moves_with_it(
    adapter: str, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = build(write(KINDS[kind], tmp_path_factory.mktemp(kind)), TALLRec, "TALLRec", adapter=adapter)
    assert all(name.startswith(("adapter.", "head_weight")) for name, _ in model.named_parameters())
    assert (model.head_weight is not None) == (adapter == "full" and kind == "llama")
    causal = model.backbone.causal
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, batch = sampled(model)
    before = model.stage_loss(FINE_TUNING, batch)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = model.stage_loss(FINE_TUNING, batch)
        logits = causal(input_ids=batch.ids).logits[batch.rows, batch.places]
        states = causal.get_decoder()(input_ids=batch.ids).last_hidden_state[batch.rows, batch.places]
    assert after < before
    # transformers' own forward has the weights that were trained, and so has a search that is made now.
    assert torch.nn.functional.cross_entropy(logits, batch.labels).item() == pytest.approx(after.item(), rel=1e-5)
    search = model.head.for_search()
    tokens = search.tokens(torch.arange(logits.shape[1]))
    torch.testing.assert_close(search.logits(states, tokens), logits, rtol=1e-4, atol=1e-4)


def by_hand(model: Any, prompt: list[int], beams: int) -> torch.Tensor:
    """The last state of what the language model writes after one prompt."""
    backbone, causal = model.backbone, model.backbone.causal
    written: list[int] = []
    if beams == 1:
        while len(written) < model.item_tokens.longest:
            logits = causal(input_ids=torch.tensor([prompt + written])).logits[0, -1]
            if not written:
                logits[backbone.eos_id] = -torch.inf
            token = int(logits.argmax())
            if token == backbone.eos_id:
                break
            written.append(token)
    else:
        made = causal.generate(
            torch.tensor([prompt]), num_beams=beams, do_sample=False, min_new_tokens=1,
            max_new_tokens=model.item_tokens.longest, eos_token_id=backbone.eos_id, pad_token_id=backbone.pad_id,
            attention_mask=torch.ones(1, len(prompt)),
        )[0, len(prompt) :].tolist()  # fmt: skip
        written = made[: made.index(backbone.eos_id)] if backbone.eos_id in made else made
    return state_of(model, written)


def state_of(model: Any, text: list[int]) -> torch.Tensor:
    backbone = model.backbone
    opening = [] if backbone.bos_id is None else [backbone.bos_id]
    read = backbone.causal(input_ids=torch.tensor([opening + text]), output_hidden_states=True)
    return read.hidden_states[-1][0, -1]


@pytest.mark.parametrize(("beams", "gamma"), [(1, 0.0), (4, 0.0), (4, 0.7)])
@torch.no_grad()
def test_bigrec_ranks_by_the_distance_to_what_it_writes(beams: int, gamma: float, folder: Path) -> None:
    model = build(folder, BIGRec, "BIGRec", generation_beams=beams, popularity_gamma=gamma, inference_batch_size=2)
    asking = users(1, 2, 3, 4)
    candidates = torch.ones(N_ITEMS, dtype=torch.bool)
    candidates[7] = False
    found = model.full_sort_predict_excluding(asking, torch.tensor([1, 2]), torch.tensor([3, 4]), candidates)
    counts = np.bincount(histories().items, minlength=N_ITEMS)[1:].astype(float)
    popular = (counts - counts.min()) / (counts.max() - counts.min())
    titles = [state_of(model, one[:-1]) for one in sequences(model)]
    for row in range(4):
        shown = asking["item_id_list"][row, : int(asking["item_length"][row])][-4:].tolist()
        text = by_hand(model, asked(model, shown), beams)
        distances = np.array([float((text - title).norm()) for title in titles])
        if gamma:
            distances = (distances - distances.min()) / (distances.max() - distances.min())
            distances = (1 + popular) ** -gamma * distances
        legal = [item for item in range(1, N_ITEMS) if item != 7 and (row, item) not in {(1, 3), (2, 4)}]
        assert torch.isfinite(found[row]).nonzero().squeeze(1).tolist() == legal
        np.testing.assert_allclose(-found[row, legal].numpy(), distances[np.array(legal) - 1], rtol=1e-3, atol=1e-4)
        # Items of one title are equally far; which of them is the more popular may still tell.
        assert gamma or found[row, N_ITEMS - 1] == pytest.approx(found[row, N_ITEMS - 2].item(), abs=1e-5)


def test_bigrec_reads_titles_anew_after_training(llama: Path) -> None:
    model = build(llama, BIGRec, "BIGRec")
    before = model.full_sort_predict(users(1))
    assert torch.equal(model.full_sort_predict(users(1)), before)
    model.train()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05)
    model.eval()
    assert not torch.allclose(model.full_sort_predict(users(1)), before)


def test_the_search_among_titles_sums_their_tokens_and_gives_equal_titles_one_score(llama: Path) -> None:
    for base, normaliser in (("TALLRec", "vocabulary"), ("MSL", "legal")):
        model = build(llama, BASES[base], base, beams=N_ITEMS - 1, topk=[5])
        assert model.config["normaliser"] == normaliser
        found = model.full_sort_predict(users(1, 3))
        asking = users(1, 3)
        for row in range(2):
            prompt = asked(model, asking["item_id_list"][row, : int(asking["item_length"][row])][-4:].tolist())
            for item in (1, 2, 7, N_ITEMS - 2, N_ITEMS - 1):
                tokens, score = sequences(model)[item - 1], 0.0
                with torch.no_grad():
                    logits = model.backbone.causal(input_ids=torch.tensor([prompt + tokens])).logits[0]
                for depth, token in enumerate(tokens):
                    own = logits[len(prompt) - 1 + depth]
                    base_ = own if normaliser == "vocabulary" else own[legal_after(model, tokens[:depth])]
                    score += float(own[token] - base_.logsumexp(0))
                assert float(found[row, item]) == pytest.approx(score, rel=1e-4, abs=1e-4)


def test_title_match_counts_equal_titles_as_one(settings_of: Callable[..., dict[str, Any]], llama: Path) -> None:
    model = build(llama, TALLRec, "TALLRec", title_match=True)
    assert model.counts_as.tolist() == [*range(N_ITEMS - 1), N_ITEMS - 2]
    assert build(llama, TALLRec, "TALLRec").counts_as is None
    config = Config("BPR", "small", config_dict=settings_of(topk=[1, 5], metrics=["Hit"], valid_metric="Hit@5"))
    train, _, test = data_preparation(config, create_dataset(config))
    split, draw = train._dataset.split, np.random.default_rng(0)
    # Every item has a twin, or is one.
    counts_as = torch.arange(split.n_items)
    counts_as[2::2] -= 1
    fixed: Any = Fixed(torch.from_numpy(draw.random(split.n_items)).float())
    alone = measure(fixed, test, config, train)
    fixed.counts_as = counts_as
    found = measure(fixed, test, config, train)
    known, wanted = split.histories(TRAIN, VALID), split.histories(2)
    hits = []
    for place, user in enumerate(found.users.tolist()):
        ranked: list[int] = []
        for item in torch.argsort(fixed.scores, descending=True).tolist():
            title = int(counts_as[item])
            if item and split.candidates[item] and item not in known.of(user).tolist() and title not in ranked:
                ranked.append(title)
        assert found.items[place].tolist() == ranked[:5]
        hits.append(int(counts_as[int(wanted.of(user)[0])]) in ranked[:5])
    assert found.metrics["hit@5"] == pytest.approx(np.mean(hits)) and alone.metrics["hit@5"] <= found.metrics["hit@5"]


# --- titles ----------------------------------------------------------------------------------------------------------


def tiny(output: Path, base: str = "TALLRec", **more: Any) -> Config:
    own = {"output_dir": str(output), "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 1}
    return Config(base, "tiny", config_dict=SMALL["TALLRec"] | own | more, command_line=[])


def test_a_head_that_was_exchanged_is_fine_tuned_anew(tmp_path: Path) -> None:
    folder = write(KINDS["llama"], tmp_path / "lm")
    given = {key: value for key, value in SMALL["TALLRec"].items() if not key.startswith("llm_")}
    own = {"llm": str(folder), "output_dir": str(tmp_path), "show_progress": False, "tensorboard": False, "gpu_id": ""}

    def stages() -> dict[str, bool]:
        config = Config("TALLRec", "tiny", config_dict=given | own | {"epochs": 1, "eval_step": 0}, command_line=[])
        return {stage["name"]: stage["cached"] for stage in fit(config, store_of(config)).stages}

    assert not any(stages().values()) and all(stages().values())
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    again = stages()
    # Nothing that only reads is made again.
    assert not again.pop("fine_tuning") and all(again.values())


def test_titles_are_the_first_column_cut_and_ended(
    tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(tmp_path, llm=str(llama), title_tokens=9)
    data = prepared(config)[1]._dataset
    caplog.set_level("INFO", logger="recbole_llm")
    made = tokenize_titles(config, data, StageStore(tmp_path / "cache"))
    backbone, tokens, raw = made.sources.backbone, made.tokens, data.field2id_token["item_id"].tolist()
    assert backbone is not None and tokens.lm_ids is not None
    lines = (Path(config["data_path"]) / "tiny.item").read_text(encoding="utf-8").splitlines()[1:]
    titles = {line.split("\t")[0]: line.split("\t")[1] for line in lines}
    long = 0
    for item in range(1, len(raw)):
        whole = backbone.encode(titles.get(raw[item], "").strip() or config["item_text_fallback"])
        long += len(whole) > 9
        assert tokens.lm_ids[tokens.of(item)].tolist() == [*whole[:9], backbone.eos_id]
    assert 0 < long and f"{long} titles are longer than 9 tokens" in caplog.text
    assert "items share their title with another" in caplog.text
    # Another limit makes other tokens; the same is found.
    assert tokenize_titles(config, data, StageStore(tmp_path / "cache")).stage.cached
    other = tiny(tmp_path, llm=str(llama), title_tokens=11)
    assert not tokenize_titles(other, data, StageStore(tmp_path / "cache")).stage.cached


def test_prepare_makes_the_titles_alone(tmp_path: Path, llama: Path) -> None:
    said = prepare(
        ["--model=MSL", "--dataset=tiny", f"--llm={llama}", f"--output_dir={tmp_path}", "--show_progress=false",
         "--tensorboard=false", "--title_tokens=99"]
    )  # fmt: skip
    folder = Path(said.splitlines()[-1].split()[-1])
    assert "item_tokens" in said and ItemTokens.load(folder).kind == "titles"
    assert {file.name for file in folder.iterdir()} & set(KEPT)


@pytest.mark.parametrize("given", [["--index_file={0}/x"], ["--index_file={0}/x", "--new_items={0}/new.item"]], ids=str)
def test_prepare_has_no_codes_of_titles_and_says_so_at_once(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "new.item").write_text("item_id:token\ttitle:token_seq\nn1\tNew\n", encoding="utf-8")
    with pytest.raises(UserError, match="--index_file has codes, and the items of MSL are titles"):
        prepare(["--model=MSL", "--dataset=tiny", f"--output_dir={tmp_path}", *(key.format(tmp_path) for key in given)])
    assert not (tmp_path / "cache").exists(), "it was refused after work"


def test_a_run_of_titles_has_no_codebook_nor_new_items(tmp_path: Path) -> None:
    own = SMALL["TALLRec"] | {"output_dir": str(tmp_path), "show_progress": False, "tensorboard": False, "gpu_id": ""}
    folder = Path(run("TALLRec", "tiny", config_dict=own | {"epochs": 0, "eval_step": 0})["result_file"]).parent
    with pytest.raises(UserError, match="has no codebook: TALLRec, its items are titles"):
        inspect(["codebook", str(folder)])
    index = tmp_path / "index.json"
    index.write_text('{"n1": ["<a_1>"]}', encoding="utf-8")
    with pytest.raises(UserError, match="the items of TALLRec are titles, and an index file has codes"):
        Recommender.of_run(folder, index_file=index)


def test_a_trained_temperature_is_found_again(tmp_path: Path) -> None:
    config = tiny(tmp_path, "MSL", temperature="ats", eval_step=0)
    made = fit(config, store_of(config))
    assert LOWEST - 1e-6 < float(made.model.running_temperature) < HIGHEST + 1e-6
    again = fit(tiny(tmp_path, "MSL", temperature="ats", eval_step=0), store_of(config))
    assert again.fingerprint == made.fingerprint
    for name, value in made.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "setting", "words"),
    [
        ("TALLRec", "title_tokens=2", ["the title of item 'i", "above title_tokens 2", "long_titles: truncate"]),
        ("TALLRec", "item_text=", ["needs item text", "item_text"]),
        ("TALLRec", "item_title={name}", ["no column 'name'"]),
        ("TALLRec", "long_titles=cut", ["long_titles should be", "truncate"]),
        ("TALLRec", "adapter=none", ["adapter should be", "lora"]),
        ("TALLRec", "train_positions=all", ["train_positions should be", "response"]),
        ("TALLRec", "tasks=[sequential, negative]", ["tasks: TALLRec learns next items alone", "negative"]),
        ("TALLRec", "prompts=tca4rce", ["there is no 'tca4rce'", "'tca4rec'"]),
        ("TALLRec", "beams=4", ["topk asks for", "4 beams"]),
        ("TALLRec", "item_tokens=raw", ["unknown setting 'item_tokens' for TALLRec"]),
        ("TALLRec", "grounding=trie", ["unknown setting 'grounding' for TALLRec"]),
        ("BIGRec", "grounding=embeding", ["grounding should be", "embedding", "trie"]),
        ("BIGRec", "popularity_gamma=-1", ["popularity_gamma should be float >= 0"]),
        ("BIGRec", "generation_beams=0", ["generation_beams should be int >= 1"]),
        ("MSL", "temperature=0", ["temperature should be float > 0", "ats"]),
        ("MSL", "temperature=adaptive", ["temperature should be float > 0", "ats"]),
        ("MSL", "ats_eta=0", ["ats_eta should be float > 0"]),
    ],
)
def test_wrong_input_gets_one_line(
    model: str, setting: str, words: list[str], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [f"--llm={llama}", f"--output_dir={tmp_path}"]
    said = refused(capsys, "run", f"--model={model}", "--dataset=tiny", *named, f"--{setting}")
    for word in words:
        assert word in said
    assert not list((tmp_path / "cache").glob("*-*")), "it was refused after work"


def test_a_title_without_a_token_is_told(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recbole_llm.backbone.base import Backbone

    encode = Backbone.encode_batch

    def without(self: Backbone, texts: list[str]) -> list[list[int]]:
        return [[] if text == "Copper Lantern 2" else one for text, one in zip(texts, encode(self, texts))]

    monkeypatch.setattr(Backbone, "encode_batch", without)
    config = tiny(tmp_path, llm=str(llama))
    with pytest.raises(UserError, match="the title of item 'i2', 'Copper Lantern 2', has no token"):
        fit(config, store_of(config))


def test_a_search_of_embeddings_asks_for_no_beams(tmp_path: Path) -> None:
    made = get_model("BIGRec")
    assert made.ranking == "beam", "its language model is loaded with its head"
    config = tiny(tmp_path, "BIGRec", beams=1, epochs=0, eval_step=0)
    assert fit(config, store_of(config)).model.ranking == "full"
    with pytest.raises(UserError, match="1 beams"):
        searching = tiny(tmp_path, "BIGRec", beams=1, epochs=0, eval_step=0, grounding="trie")
        fit(searching, store_of(searching))
