"""AlignTokenRec: its prompts, what is learned where, what trains, and what is recommended."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from peft.tuners.lora import LoraLayer
from small_models import SMALL
from test_glta import N_ITEMS, N_USERS, dataset, histories
from test_processes import FILES, LAUNCH, command
from transformers import AutoModelForCausalLM

from recbole_llm.backbone.base import Backbone
from recbole_llm.backbone.load import load_backbone, load_with_head
from recbole_llm.config import Config
from recbole_llm.data.histories import Histories
from recbole_llm.data.instructions import InstructionWriter, TokenBatch
from recbole_llm.data.phases import TRAIN
from recbole_llm.data.prompts import Ragged
from recbole_llm.data.task_loader import TaskLoader, history_groups
from recbole_llm.data.templates import INFERENCE, PLACE, read_templates
from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.aligntokenrec import FINE_TUNING, AlignTokenRec
from recbole_llm.schema import Loader, properties_dir
from recbole_llm.tasks import TaskTexts, known_tasks, number
from recbole_llm.tasks.behaviour import NEGATIVE, SEQUENTIAL
from recbole_llm.tasks.language import QUERY, TEXT
from recbole_llm.training.fine_tuning import _check_beams
from recbole_llm.training.language import read_item_text
from recbole_llm.training.pipeline import fit, prepared, store_of
from recbole_llm.training.task_texts import read_task_texts
from recbole_llm.training.trainer import TrainerMixin

SIZES = [3, 4, 5]
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "attention": "sdpa", "quantization": "none", "trust_remote_code": False, "device": "cpu",
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_",
    "ITEM_LIST_LENGTH_FIELD": "item_length", "MAX_ITEM_LIST_LENGTH": 20, "device": "cpu", "seed": 1, "topk": [5],
    "beams": 8, "history_length": 4, "train_batch_size": 6, "inference_batch_size": 4, "llm_quantization": "none",
    "llm_dtype": "float32", "shuffle": True, "prefixes_per_user": None,
}  # fmt: skip


def shipped() -> dict[str, Any]:
    return yaml.load((properties_dir() / "model" / "AlignTokenRec.yaml").read_text(encoding="utf-8"), Loader=Loader)


def tokens() -> ItemTokens:
    """Every item has codes of its own."""
    items = torch.arange(N_ITEMS)
    codes = torch.stack([items % 3, items // 3 % 4, items // 12], dim=1)
    codes[0] = -1
    return ItemTokens.from_codes(codes, SIZES)


def build(folder: Path, texts: dict[str, list[str]] | None = None, **settings: Any) -> AlignTokenRec:
    torch.manual_seed(0)
    made = AlignTokenRec(SimpleConfig({**shipped(), **SETTINGS, **settings}), dataset())
    made.prepare(
        item_tokens=tokens(), backbone=load_backbone(folder, **OPTIONS), head_model=load_with_head(folder, **OPTIONS),
        tie_order=torch.arange(N_ITEMS), texts=texts or {},
    )  # fmt: skip
    made.begin_stage(FINE_TUNING)
    return made.eval()


def loader(**settings: Any) -> TaskLoader:
    own = dataset()
    own.split = SimpleNamespace(candidates=np.arange(N_ITEMS) > 0)
    own.item_num = N_ITEMS
    # RecBole's loaders ask for these of any Config.
    more = {"worker": 0, "dl_format": None, "train_neg_sample_args": None, "single_spec": True}
    return TaskLoader(SimpleConfig({**shipped(), **SETTINGS, **more, **settings}), own)


class SimpleConfig(dict):  # type: ignore[type-arg]
    """RecBole's Config gives ``None`` for what it does not have."""

    def __missing__(self, key: str) -> None:
        return None


def users(*rows: int) -> dict[str, torch.Tensor]:
    own = Ragged(torch.from_numpy(histories().items), torch.from_numpy(histories().offsets)).take(torch.tensor(rows))
    return {"user_id": torch.tensor(rows), "item_id_list": own.padded(0), "item_length": own.lengths}


def batch(model: AlignTokenRec, **settings: Any) -> TokenBatch:
    torch.manual_seed(3)
    return model.training_batch(next(iter(loader(**settings))))


# --- prompts ---------------------------------------------------------------------------------------------------------


def plain(
    template: str, backbone: Backbone, history: list[int], target: int | None, lm_ids: list[int], every: bool
) -> tuple[list[int], list[int]]:
    """A prompt token by token, and which of its tokens are labels."""
    own = tokens()
    ids = [] if backbone.bos_id is None else [backbone.bos_id]
    labels = [0] * len(ids)
    before, _, after = PLACE.split(template)

    def add(more: list[int], label: int = 0) -> None:
        ids.extend(more)
        labels.extend([label] * len(more))

    add(backbone.encode(before))
    for place, item in enumerate(history):
        if place:
            add(backbone.encode(", "))
        add([lm_ids[token] for token in own.of(item)], int(every and place > 0))
    add(backbone.encode(after))
    if target is not None:
        add([*(lm_ids[token] for token in own.of(target)), backbone.eos_id], 1)
    return ids, labels


@pytest.mark.parametrize("every", [False, True])
def test_prompts_are_what_they_would_be_one_by_one(every: bool, folders: Any) -> None:
    backbone = load_backbone(folders("llama"), **OPTIONS)
    first = backbone.embed_tokens.num_embeddings
    templates = read_templates("aligntokenrec")
    prompts = {task: templates.instructions(task, []) for task in (SEQUENTIAL, NEGATIVE, INFERENCE)}
    own = tokens()
    writer = InstructionWriter(
        prompts, backbone.encode_batch, bos_id=backbone.bos_id, eos_id=backbone.eos_id,
        items=Ragged(own.tokens + first, own.offsets), separator=", ", texts={}, label_history=every,
    )  # fmt: skip
    lm_ids = list(range(first, first + own.size))
    generator = torch.Generator().manual_seed(0)
    shown = [[5, 7, 1], [2], [29, 28, 27, 26], [3, 3]]
    tasks = torch.tensor([number(task) for task in (SEQUENTIAL, NEGATIVE, SEQUENTIAL, NEGATIVE)])
    targets = torch.tensor([9, 10, 11, 12])
    drawn = writer.draw(tasks, generator)
    made = writer.write(drawn, Ragged.from_lists(shown), torch.zeros(4, dtype=torch.long), targets)
    # Those of a task in the order of their words, so that its samples open like another's of the same history.
    flat = [wording.ask for wordings in prompts.values() for wording in sorted(wordings)]
    lengths = writer.lengths(tasks, torch.tensor([3, 1, 4, 2]), torch.zeros(4, dtype=torch.long))
    for row, (template, history, target) in enumerate(zip(drawn.tolist(), shown, targets.tolist(), strict=True)):
        wording = prompts[list(known_tasks())[tasks[row]]]
        assert flat[template] in [one.ask for one in wording]
        learned = every and tasks[row] == number(SEQUENTIAL)
        ids, labels = plain(flat[template], backbone, history, target, lm_ids, learned)
        width = made.ids.shape[1]
        assert made.ids[row].tolist()[: len(ids)] == ids[:width]
        here = made.rows == row
        assert made.places[here].tolist() == [place - 1 for place, label in enumerate(labels) if label]
        assert made.labels[here].tolist() == [ids[place] for place, label in enumerate(labels) if label]
        assert len(ids) <= writer.longest(4)
        always = plain(min(wording).ask, backbone, history, target, lm_ids, every)[0]
        assert lengths[row] == len(always) + len(backbone.encode(", ")), "all items are counted with a separator"
    asked = writer.ask(Ragged.from_lists(shown))
    for row, history in enumerate(shown):
        expected = plain(prompts[INFERENCE][0].ask, backbone, history, None, lm_ids, False)[0]
        assert asked.take(torch.tensor([row])).values.tolist() == expected
    parts = [made.share(rank, 3) for rank in range(3)]
    assert sum(part.targets_count() for part in parts) == made.targets_count()
    for rank, part in enumerate(parts):
        assert torch.equal(part.ids, made.ids[rank::3])
        assert torch.equal(part.labels, made.labels[made.rows % 3 == rank])
        assert torch.equal(part.ids[part.rows, part.places], made.ids[made.rows, made.places][made.rows % 3 == rank])


def test_the_papers_own_wording() -> None:
    templates = read_templates("aligntokenrec")
    asked = templates.instructions(INFERENCE, [])
    assert [wording.ask for wording in asked] == [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nThe user has interacted with items {history} in chronological order. Can you predict "
        "the next possible item that the user may expect?\n\n### Response:"
    ]
    assert asked[0].answer == ""
    (first,) = templates.instructions(SEQUENTIAL, [], only_first=True)
    assert first == (asked[0].ask, "{target}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("inference: ", "asked: "), "says nothing for 'inference'"),
        (("{history}, what will", "{histroy}, what will"), "should name {history} once at most"),
        (("{instruction}", "the task"), "should name {instruction} once"),
    ],
)
def test_broken_templates_are_refused(change: tuple[str, str], words: str, tmp_path: Path) -> None:
    text = (ROOT / "properties" / "prompts" / "aligntokenrec.yaml").read_text(encoding="utf-8")
    file = tmp_path / "own.yaml"
    file.write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_templates(str(file))
    with pytest.raises(UserError, match="did you mean 'aligntokenrec'"):
        read_templates("alingtokenrec")


def test_samples_of_one_history_open_alike_and_lose_the_same_items(folders: Any) -> None:
    templates = read_templates("aligntokenrec")
    backbone = load_backbone(folders("llama"), **OPTIONS)
    prompts = {task: templates.instructions(task, []) for task in (SEQUENTIAL, NEGATIVE, INFERENCE)}
    own = tokens()
    writer = InstructionWriter(
        prompts, backbone.encode_batch, bos_id=backbone.bos_id, eos_id=backbone.eos_id,
        items=Ragged(own.tokens + 300, own.offsets), separator=", ", texts={},
    )  # fmt: skip
    flat = [wording.ask for wordings in prompts.values() for wording in sorted(wordings)]
    tasks = torch.tensor([number(SEQUENTIAL), number(NEGATIVE), number(NEGATIVE)] * 50)
    groups = torch.arange(50).repeat_interleave(3)
    drawn = writer.draw(tasks, torch.Generator().manual_seed(1), groups=groups).view(50, 3)
    opens = [[flat[one].partition("{history}")[0] for one in row] for row in drawn.tolist()]
    assert all(len(set(row)) == 1 for row in opens), "the shipped wording has a pair for each opening"
    assert len({row[0] for row in opens}) == len(prompts[SEQUENTIAL])


def test_samples_of_one_history_stand_side_by_side() -> None:
    samples = loader(negative_ratio=3)
    samples.length_of = lambda drawn: drawn["stop"] - drawn["start"] + 2 * drawn["task"]
    whole = [(rows["start"], rows["stop"]) for rows in samples]
    runs = sum(int((stops.diff() != 0).sum()) + 1 for _, stops in whole)
    # A batch's end cuts a run in two at most.
    assert runs <= samples.prefixes + len(whole)
    groups = history_groups(torch.tensor([0, 3, 3, 0, 0]), torch.tensor([2, 3, 3, 2, 5]))
    assert groups[0] == groups[3]
    assert len(groups.unique()) == 4


# --- samples ---------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_prefix_once_and_negatives_that_the_user_has_not_had() -> None:
    samples = loader(negative_ratio=2)
    own = Ragged(torch.from_numpy(histories().items), torch.from_numpy(histories().offsets))
    expected, had = [], {}
    for items in (part.tolist() for part in own.values.split(own.lengths.tolist())):
        for place in range(1, len(items)):
            history = tuple(items[max(0, place - 4) : place])
            expected.append((history, items[place]))
            had[history] = set(items)
    for _ in range(2):
        found: dict[int, list[Any]] = {number(SEQUENTIAL): [], number(NEGATIVE): []}
        count = 0
        for rows in samples:
            count += 1
            shown = Ragged.from_slices(samples.items, rows["start"], rows["stop"])
            for task, items, target in zip(
                rows["task"].tolist(), shown.values.split(shown.lengths.tolist()), rows["target"].tolist(), strict=True
            ):
                found[task].append((tuple(items.tolist()), target))
        assert count == len(samples)
        assert sorted(found[number(SEQUENTIAL)]) == sorted(expected)
        negatives = found[number(NEGATIVE)]
        assert sorted(history for history, _ in negatives) == sorted(2 * [history for history, _ in expected])
        assert all(target not in had[history] for history, target in negatives)


def test_what_a_user_rated_low_is_what_he_hates(small_data: Path, settings_of: Any) -> None:
    more = SMALL["AlignTokenRec"] | {"dislike_below": 3, "negative_ratio": 2}
    with pytest.raises(UserError, match="no column 'rating' is loaded"):
        prepared(Config("AlignTokenRec", "small", config_dict=settings_of(**more)))
    columns = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    train = prepared(Config("AlignTokenRec", "small", config_dict=settings_of(load_col=columns, **more)))[1]
    names, split = train._dataset.field2id_token, train._dataset.split
    lines = (small_data / "small" / "small.inter").read_text(encoding="utf-8").splitlines()[1:]
    low = {tuple(line.split("\t")[:2]) for line in lines if float(line.split("\t")[2]) < 3}
    owners = np.repeat(np.arange(split.n_users), split.histories(TRAIN).lengths)
    pairs = [
        (str(names["user_id"][user]), str(names["item_id"][item]))
        for user, item in zip(owners, train.items.tolist(), strict=True)
    ]
    ends = split.histories(TRAIN).offsets[1:]
    true, sampled = 0, 0
    for rows in train:
        for task, stop, target in zip(rows["task"].tolist(), rows["stop"].tolist(), rows["target"].tolist()):
            if task != number(NEGATIVE):
                continue
            user = int(owners[stop])
            to_come = [pair for pair in pairs[stop : ends[user]] if pair in low]
            pair = (str(names["user_id"][user]), str(names["item_id"][target]))
            if to_come:
                assert pair in to_come
                true += 1
            else:
                assert target not in split.histories(TRAIN).of(user)
                sampled += 1
    assert true and sampled


def test_every_tasks_own_randomness_is_kept_with_a_run() -> None:
    own, more = loader(), torch.Generator()
    assert own.tasks[1].sampler is not None
    own.tasks[2].sampler = SimpleNamespace(generator=more)
    trainer: Any = object.__new__(TrainerMixin)
    trainer._train_data, trainer.model = own, SimpleNamespace()
    kept = trainer._generators()
    assert all(any(one is other for other in kept) for one in (own.generator, own.tasks[1].sampler.generator, more))


def test_some_prefixes_a_user_are_drawn_anew() -> None:
    samples = loader(negative_ratio=0, prefixes_per_user=2)
    lengths = np.diff(histories().offsets)
    epochs = [sorted(torch.cat([rows["stop"] for rows in samples]).tolist()) for _ in range(8)]
    for stops in epochs:
        owner = np.searchsorted(histories().offsets, stops, side="right") - 1
        assert np.bincount(owner, minlength=N_USERS).tolist() == np.minimum(np.maximum(lengths - 1, 0), 2).tolist()
        assert len(set(stops)) == len(stops)
    assert len({tuple(stops) for stops in epochs}) > 1


def test_batches_are_of_like_length(folders: Any) -> None:
    model, samples = build(folders("llama")), loader(negative_ratio=3, train_batch_size=8)

    def filling() -> int:
        spread = 0
        for rows in samples:
            lengths = model.sample_lengths(rows)
            spread += int((lengths.max() - lengths).sum())
        return spread

    before = filling()
    samples.length_of = model.sample_lengths
    assert filling() < before / 2


def with_reviews(source: Path, folder: Path, review: Any) -> Path:
    """The data set ``small`` with a column of reviews."""
    (folder / "small").mkdir(parents=True)
    head, *lines = (source / "small" / "small.inter").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    text = [f"{head}\treview:token_seq", *("\t".join([*row, review(row[0], row[1])]) for row in rows)]
    (folder / "small" / "small.inter").write_text("\n".join(text) + "\n", encoding="utf-8")
    (folder / "small" / "small.item").write_bytes((source / "small" / "small.item").read_bytes())
    return folder


def read_texts(folder: Path, settings_of: Any, **more: Any) -> tuple[TaskTexts, Any]:
    more = SMALL["AlignTokenRec"] | {"item_text": "{movie_title}", "data_path": str(folder)} | more
    config = Config("AlignTokenRec", "small", config_dict=settings_of(**more))
    data = prepared(config)[1]._dataset
    return read_task_texts(config, data, read_item_text(config, data)), data


def test_queries_are_reviews_of_train_rows_only(small_data: Path, settings_of: Any, tmp_path: Path) -> None:
    def own(user: str, item: str) -> str:
        return "" if int(item) % 7 == 0 else f"{user} of <a_1> {item}"

    made, data = read_texts(with_reviews(small_data, tmp_path / "own", own), settings_of)
    split = data.split
    train = split.phases == TRAIN
    names = data.field2id_token
    pairs = [
        (str(names["user_id"][user]), str(names["item_id"][item]))
        for user, item in zip(split.users[train], split.items[train], strict=True)
    ]
    wanted = [(own(*pair), pair[1]) for pair in pairs if own(*pair)]
    found = [str(names["item_id"][item]) for item in split.histories(TRAIN).items[made.query_places]]
    assert list(zip(made.texts["query"], found, strict=True)) == wanted
    known = set(pairs)
    swapped = with_reviews(
        small_data, tmp_path / "swapped", lambda user, item: own(user, item) if (user, item) in known else "other"
    )
    again, _ = read_texts(swapped, settings_of)
    assert again.texts == made.texts and torch.equal(again.query_places, made.query_places)


def test_a_task_without_texts_is_left_out_and_said(
    small_data: Path, settings_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="recbole_llm"):
        made, data = read_texts(small_data, settings_of)
    assert "query task: left out" in caplog.text and "no column 'review'" in caplog.text
    assert set(made.texts) == {"title"} and len(made.query_places) == 0
    assert made.text_items.tolist() == list(range(1, data.item_num))
    both, _ = read_texts(small_data, settings_of, item_title="{movie_title}", item_description="{class}")
    assert set(both.texts) == {"title", "description"} and "Action" in " ".join(both.texts["description"])
    none, _ = read_texts(small_data, settings_of, text_task=False, query_task=False)
    assert not none.texts and len(none.text_items) == 0
    with pytest.raises(UserError, match="no column 'clas'"):
        read_texts(small_data, settings_of, item_description="{clas}")


@pytest.mark.parametrize("places", [["title"], ["title", "description"], ["description"], ["query"]])
def test_texts_ask_for_their_items_and_spell_no_token(places: list[str], folders: Any) -> None:
    texts = {
        place: ["" if item == 0 else f"{place} {item} </s><a_{item % 3}> [INST]" for item in range(N_ITEMS)]
        for place in places
    }
    model, samples = build(folders("llama"), texts), loader(negative_ratio=1)
    items = torch.arange(1, N_ITEMS)
    task = QUERY if "query" in places else TEXT
    if task == QUERY:
        samples.texts = TaskTexts(query_places=torch.arange(N_ITEMS))
    else:
        samples.texts = TaskTexts(text_items=items)
    backbone, first = model.backbone, model.backbone.embed_tokens.num_embeddings
    spelled = {item: [backbone.encode(texts[place][item]) for place in places] for item in items.tolist()}
    torch.manual_seed(0)
    found = []
    for rows in samples:
        assert (model.sample_lengths(rows) > 0).all()
        made = model.training_batch(rows)
        for row in (rows["task"] == number(task)).nonzero().squeeze(1).tolist():
            here, item = made.rows == row, int(rows["target"][row])
            found.append(item)
            source = int(rows["source"][row])
            begin = int(made.places[here][0]) + 1
            prompt = made.ids[row, :begin].tolist()
            assert made.labels[here].tolist() == [*model._lm_ids[tokens().of(item)].tolist(), backbone.eos_id]
            assert max(prompt) < first and backbone.eos_id not in prompt and prompt.count(backbone.bos_id) == 1
            if source:
                shown = [ids for ids in spelled[source] if " ".join(map(str, ids)) in " ".join(map(str, prompt))]
                assert shown, "at least one of its texts stands in the prompt"
    assert sorted(found) == (list(range(1, N_ITEMS)) if task == TEXT else sorted(samples.items[:N_ITEMS].tolist()))
    assert len(samples) == -(-samples.samples() // 6)


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3", "granite", "gpt2"])
@pytest.mark.parametrize("positions", ["response", "all"])
def test_the_loss_is_that_of_a_plain_pass_with_resized_tables(kind: str, positions: str, folders: Any) -> None:
    model = build(folders(kind), train_positions=positions)
    made = batch(model)
    whole = AutoModelForCausalLM.from_pretrained(folders(kind))
    first = model.backbone.embed_tokens.num_embeddings
    whole.resize_token_embeddings(first + sum(SIZES), mean_resizing=False)
    with torch.no_grad():
        whole.get_output_embeddings().weight[first:] = model.code_tokens.outputs
        whole.get_input_embeddings().weight[first:] = model.code_tokens.inputs
    labels = torch.full_like(made.ids, -100)
    labels[made.rows, made.places] = made.labels
    logits = whole.eval()(input_ids=made.ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(model.stage_loss(FINE_TUNING, made), expected, rtol=1e-4, atol=1e-5)
    expected.backward()
    model.stage_loss(FINE_TUNING, made).backward()
    wanted = whole.get_input_embeddings().weight.grad[first:]
    torch.testing.assert_close(model.code_tokens.inputs.grad, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "kind"), [("none", "llama"), ("lora", "llama"), ("full", "llama"), ("full", "qwen3")]
)
def test_what_trains(adapter: str, kind: str, folders: Any) -> None:
    model = build(folders(kind), adapter=adapter)
    before = {name: value.clone() for name, value in model.backbone.decoder.state_dict().items()}
    head = load_with_head(folders(kind), **OPTIONS).get_output_embeddings().weight
    optimizer = torch.optim.Adam(model.begin_stage(FINE_TUNING), lr=0.1)
    for _ in range(2):  # LoRA's second matrix starts at zero
        optimizer.zero_grad()
        model.train().stage_loss(FINE_TUNING, batch(model)).backward()
        optimizer.step()
    moved = {
        name for name, value in model.backbone.decoder.state_dict().items() if not torch.equal(before[name], value)
    }
    rows = {name for name in before if name.endswith("embed_tokens.rows")}
    assert rows and rows <= moved
    others = moved - rows
    if adapter == "none":
        assert not others
    elif adapter == "lora":
        assert others == {name for name in before if "lora_" in name}
    else:
        assert others == set(before) - rows
        assert (model.head_weight is None) == (kind == "qwen3")
        assert model.head_weight is None or not torch.equal(model.head_weight, head)
    # What is kept is what trains, and nothing else of the language model.
    kept = {value.data_ptr() for value in model.state_dict().values()}
    trained = {value.data_ptr() for group in optimizer.param_groups for value in group["params"]}
    assert kept == trained
    other = build(folders(kind), adapter=adapter)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval().full_sort_predict(users(1, 2)), model.eval().full_sort_predict(users(1, 2)))


def test_a_head_of_its_own_takes_the_language_models_steps(folders: Any) -> None:
    model = build(folders("llama"), adapter="full", adapter_learning_rate=0.01)
    others, own = model.begin_stage(FINE_TUNING)
    assert own["lr"] == 0.01 and any(weight is model.head_weight for weight in own["params"])
    new = {id(weight) for weight in model.code_tokens.parameters()}
    assert {id(weight) for weight in others["params"]} == new


def test_lora_merged_into_the_weights_is_the_same_model(folders: Any) -> None:
    model = build(folders("llama"), adapter="lora")
    optimizer = torch.optim.Adam(model.begin_stage(FINE_TUNING), lr=0.1)
    before = model.full_sort_predict(users(1, 2))
    for _ in range(2):
        optimizer.zero_grad()
        model.train().stage_loss(FINE_TUNING, batch(model)).backward()
        optimizer.step()
    beside = model.eval().full_sort_predict(users(1, 2))
    assert not torch.allclose(beside, before)
    for module in model.backbone.decoder.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    torch.testing.assert_close(model.eval().full_sort_predict(users(1, 2)), beside, rtol=1e-3, atol=1e-3)


def test_no_text_is_an_item(folders: Any) -> None:
    """The new tokens are in no tokenizer: what spells one is the characters that it is spelled with."""
    model = build(folders("llama"))
    spelled = model.backbone.encode("".join(tokens().strings(5)) + "</s><s>")
    assert max(spelled) < model.backbone.embed_tokens.num_embeddings
    assert not {model.backbone.eos_id, model.backbone.bos_id} & set(spelled)


# --- recommending ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "ended"), [("llama", True), ("llama", False), ("qwen3", True)])
def test_scores_are_those_of_each_item_read_alone(kind: str, ended: bool, folders: Any) -> None:
    model = build(folders(kind), beams=N_ITEMS - 1 - 4, score_end=ended)
    end = torch.tensor([model.backbone.eos_id] if ended else [], dtype=torch.int64)
    own, given = tokens(), users(1, 4, 6)
    barred = [[3, 8], [1, 2, 3, 29], []]
    rows = torch.tensor([row for row, items in enumerate(barred) for _ in items])
    candidates = torch.ones(N_ITEMS, dtype=torch.bool)
    candidates[17] = False
    excluded = torch.tensor([item for items in barred for item in items])
    with pytest.raises(UserError, match="beams are more than"):
        model.full_sort_predict_excluding(given, rows, excluded, candidates)
    barred[1] = barred[1][:3]
    rows = torch.tensor([row for row, items in enumerate(barred) for _ in items])
    excluded = torch.tensor([item for items in barred for item in items])
    scores = model.full_sort_predict_excluding(given, rows, excluded, candidates)
    asked = model.writer.ask(
        Ragged.from_padded(
            given["item_id_list"],
            (torch.arange(12) < given["item_length"][:, None])
            & (torch.arange(12) >= given["item_length"][:, None] - 4),
        )
    )
    for row, prompt in enumerate(asked.values.split(asked.lengths.tolist())):
        found = []
        for item in range(1, N_ITEMS):
            if item in barred[row] or item == 17:
                assert scores[row, item] == -torch.inf
                continue
            answer = torch.cat((model._lm_ids[own.of(item)], end))
            with torch.no_grad():
                states = model.backbone.decoder(input_ids=torch.cat([prompt, answer])[None]).last_hidden_state[0]
                logs = model.head.logits(states).log_softmax(-1)
            each = logs[range(len(prompt) - 1, len(prompt) + len(answer) - 1), answer]
            found.append((float(each[:3].sum()), float(each.sum()), item))
        # Beams are chosen by the codes; all of them are read to their end.
        found.sort(reverse=True)
        best, rest = found[: N_ITEMS - 5], [item for *_, item in found[N_ITEMS - 5 :]]
        wanted = torch.tensor([score for _, score, _ in best])
        torch.testing.assert_close(scores[row, [item for *_, item in best]], wanted, rtol=1e-4, atol=1e-4)
        assert (scores[row, rest] < wanted.min()).all() and len(set(scores[row, rest].tolist())) <= 1
        assert scores[row, 0] == -torch.inf


@pytest.mark.parametrize(("ended", "answer"), [(True, "{target}."), (False, "{target}."), (True, "It is {target}")])
def test_a_score_with_its_end_token_needs_it_behind_the_item(
    ended: bool, answer: str, folders: Any, tmp_path: Path
) -> None:
    asked = {"ask": "After {history}", "answer": answer}
    content = {"wrapper": "{instruction}", "separator": ", ", "inference": "After {history}", "sequential": [asked]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    given = {"prompts": str(tmp_path / "own.yaml"), "tasks": ["sequential"], "score_end": ended}
    if ended and answer.endswith("."):
        with pytest.raises(UserError, match=r"should end with \{target\} for .*score_end"):
            build(folders("llama"), **given)
    else:
        build(folders("llama"), **given)


def test_a_search_sees_what_was_learned_since(folders: Any) -> None:
    model = build(folders("llama"))
    before = model.full_sort_predict(users(1))
    optimizer = torch.optim.Adam(model.begin_stage(FINE_TUNING), lr=0.1)
    model.train().stage_loss(FINE_TUNING, batch(model)).backward()
    optimizer.step()
    assert not torch.equal(before, model.eval().full_sort_predict(users(1)))
    scores = model.full_sort_predict(users(1, 2, 6))
    assert torch.equal(scores[:1], model.full_sort_predict(users(1))) or torch.allclose(
        scores[:1], model.full_sort_predict(users(1)), atol=1e-4
    )
    assert model.predict({**users(1, 2), "item_id": torch.tensor([4, 5])}).shape == (2,)


def test_it_learns_from_the_history_that_it_reads(folders: Any, tmp_path: Path) -> None:
    short = tmp_path / "short.yaml"
    asks = {"inference": "{history}", "sequential": ["{history}"], "negative": ["{history}"]}
    wording = {"wrapper": "{instruction}:", "separator": ", ", "text": ["{title}"], "query": ["{query}"], **asks}
    short.write_text(json.dumps(wording), encoding="utf-8")
    model = build(folders("qwen3"), adapter_learning_rate=0.01, prompts=str(short))
    samples = loader(negative_ratio=0, train_batch_size=13)
    optimizer = torch.optim.Adam(model.begin_stage(FINE_TUNING), lr=0.01)
    torch.manual_seed(0)
    for _ in range(60):
        for rows in samples:
            optimizer.zero_grad()
            model.train().calculate_loss(rows).backward()
            optimizer.step()
    own = next(iter(loader(negative_ratio=0, train_batch_size=99)))
    order = torch.randperm(len(own["task"]))
    other = {name: own[name] for name in ("task", "source", "target")} | {
        name: own[name][order] for name in ("start", "stop")
    }
    with torch.no_grad():
        assert model.eval().calculate_loss(own) < 0.5 * model.calculate_loss(other)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    small = SMALL["AlignTokenRec"] | {"epochs": 2, "train_batch_size": 32, "state": "DEBUG"}
    flags = [f"--{key}={value}" for key, value in small.items()]
    words = [
        "run_recbole_llm.py",
        "--model=AlignTokenRec",
        "--dataset=tiny",
        "--tensorboard=false",
        "--gpu_id=",
        *flags,
    ]
    several = [*LAUNCH, "--main_process_port", "0", "--config_file", str(FILES / "ddp.yaml")]
    found = []
    for name, launcher in (("one", [sys.executable]), ("two", several)):
        done = command([*launcher, *words, f"--output_dir={tmp_path / name}"], tmp_path / name)
        assert done.status == 0, done.err
        (log,) = done.saved.glob("AlignTokenRec-tiny-*/run.log")
        steps = re.findall(r"fine_tuning: step \d+, loss (\S+)$", log.read_text(encoding="utf-8"), re.MULTILINE)
        found.append([float(loss) for loss in steps])
    assert len(found[0]) > 20 and found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[0] != found[1], "sums in another order move the last bits: were there several processes?"


# --- refused before any work -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_count_every_sequence_that_is_no_item(tmp_path: Path) -> None:
    more = {"epochs": 1, "train_batch_size": 32, "state": "DEBUG", "constraint": "level", "inference_prompts": "all"}
    more |= {"gradient_accumulation_steps": 3, "tensorboard": False, "gpu_id": "", "eval_batch_size": 16}
    flags = [f"--{key}={value}" for key, value in (SMALL["LCRec"] | more).items()]
    several = [*LAUNCH, "--main_process_port", "0", "--config_file", str(FILES / "ddp.yaml")]
    found = []
    for name, launcher in (("one", [sys.executable]), ("two", several)):
        words = [*launcher, "run_recbole_llm.py", "--model=LCRec", "--dataset=tiny", *flags]
        done = command([*words, f"--output_dir={tmp_path / name}"], tmp_path / name)
        assert done.status == 0, done.err
        (file,) = done.saved.glob("LCRec-tiny-*/result.json")
        found.append(json.loads(file.read_text(encoding="utf-8")))
    one, two = found
    assert two["curves"]["loss"] == pytest.approx(one["curves"]["loss"], rel=1e-4)
    assert two["test"] == pytest.approx(one["test"], abs=0.01)
    assert 0 < one["evaluation"]["invalid_share"] < 1
    assert two["evaluation"]["invalid_share"] == pytest.approx(one["evaluation"]["invalid_share"], abs=1e-4)


def test_more_items_than_beams_and_prompts_too_long_are_refused(folders: Any) -> None:
    with pytest.raises(UserError, match="set beams to 9"):
        build(folders("llama"), topk=[9])
    with pytest.raises(UserError, match="set MAX_ITEM_LIST_LENGTH to 21"):
        build(folders("llama"), history_length=21)
    with pytest.raises(UserError, match="lower history_length"):
        build(folders("llama"), history_length=1000, MAX_ITEM_LIST_LENGTH=1000)


def test_beams_beyond_what_is_left_are_refused_before_any_stage(settings_of: Any, small_data: Path) -> None:
    more = SMALL["AlignTokenRec"] | {"beams": 5000, "item_text": "{movie_title}"}
    config = Config("AlignTokenRec", "small", config_dict=settings_of(**more))
    with pytest.raises(UserError, match="beams 5000 is above the"):
        fit(config, store_of(config))
    assert not list(Path(config["output_dir"]).rglob("stage.json"))


@pytest.mark.parametrize(("exclude", "left"), [(True, 7), (False, 10), ("recbole", 10)])
def test_what_is_left_for_the_search_is_counted_in_items(exclude: bool | str, left: int) -> None:
    """A user who had one item six times leaves more than one who had three; ``recbole`` leaves out nothing here."""
    own = Histories.from_rows(np.array([1] * 6 + [2] * 4), np.array([4] * 6 + [1, 2, 2, 9]), 3)
    candidates = np.arange(11) > 0
    split = SimpleNamespace(candidates=candidates, n_users=3, n_items=11, histories=lambda *phases: own)
    config = {"exclude_history": exclude, "beams": left}
    _check_beams(config, SimpleNamespace(split=split))
    with pytest.raises(UserError, match=f"beams {left + 1} is above the {left} items that"):
        _check_beams(config | {"beams": left + 1}, SimpleNamespace(split=split))
