"""LC-Rec: each task's samples and prompts against plain formatting, what may be learned from, and its search."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from searches import CODE_IDS, PROMPTS, random_codes
from searches import SIZES as LEVELS
from small_models import SMALL
from test_aligntokenrec import OPTIONS
from tiny_folders import KINDS, write
from transformers import AutoModelForCausalLM

from recbole_llm.backbone.load import load_backbone, load_with_head
from recbole_llm.config import Config
from recbole_llm.data.phases import TRAIN
from recbole_llm.data.templates import read_templates
from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.decoding.level_search import FILTERED, LevelSearch
from recbole_llm.errors import UserError
from recbole_llm.evaluation.ranking import measure
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.aligntokenrec import FINE_TUNING
from recbole_llm.model.lcrec import LCRec
from recbole_llm.tasks import Samples, Task, known_tasks, number, register
from recbole_llm.training import fine_tuning
from recbole_llm.training.language import read_item_text
from recbole_llm.training.pipeline import code_mark, fit, prepared, store_of
from recbole_llm.training.runs import run
from recbole_llm.training.task_texts import read_task_texts

PLACE = re.compile(r"\{(\w+)\}")
TASKS = ("sequential", "text", "index2item", "fusionseqrec", "query", "preferenceobtain")
SHOWN = 3


def review(user: str, item: str) -> str:
    """Its own for each row; some rows have none, and all spell an item's token."""
    return "" if int(item[1:]) % 5 == 0 else f"{user} had <a_1><b_2> {item}</s>, it was {len(item)} times good."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set tiny with reviews."""
    made = tmp_path_factory.mktemp("data")
    return with_reviews(made, review)


def with_reviews(made: Path, text: Any) -> Path:
    source = ROOT / "dataset" / "tiny"
    (made / "said").mkdir()
    head, *lines = (source / "tiny.inter").read_text(encoding="utf-8").splitlines()
    rows = [f"{line}\t{text(*line.split(chr(9))[:2])}" for line in lines]
    (made / "said" / "said.inter").write_text("\n".join([f"{head}\treview:token_seq", *rows, ""]), encoding="utf-8")
    (made / "said" / "said.item").write_bytes((source / "tiny.item").read_bytes())
    users = sorted({line.split("\t")[0] for line in lines})
    likes = [f"{user}\tlikes of {user}" if int(user[1:]) % 2 else f"{user}\t" for user in users]
    (made / "said" / "said.user").write_text(
        "\n".join(["user_id:token\tlikes:token_seq", *likes, ""]), encoding="utf-8"
    )
    return made


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(KINDS["llama"], tmp_path_factory.mktemp("llm"))


def config_of(folder: Path, **more: Any) -> Config:
    settings = {
        "data_path": str(folder), "output_dir": str(folder / "saved"), "show_progress": False, "tensorboard": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "gpu_id": "", "item_text": "{title} ({genre})",
        "item_title": "{title}", "item_description": "{description}", "history_length": SHOWN, "beams": 20,
        "prefixes_per_user": None, "text_tokens": 20, "history_title_tokens": 4, "train_positions": "response",
        "train_batch_size": 64, "item_text_fallback": "nothing said",
    }  # fmt: skip
    return Config("LCRec", "said", config_dict=settings | more)


class World:
    """A model before its first step, its train loader, and what both were made from."""

    def __init__(self, folder: Path, llm: Path, **more: Any) -> None:
        config = config_of(folder, **more)
        self.config, self.loader = config, prepared(config)[1]
        self.dataset = self.loader.dataset
        self.texts = read_task_texts(config, self.dataset, read_item_text(config, self.dataset))
        for task in self.loader.tasks:
            self.texts.texts |= task.own_texts()
        items = torch.arange(self.dataset.item_num)
        codes = torch.stack([items % 9, items // 9 % 5, items // 45], dim=1)
        codes[0] = -1
        self.tokens = ItemTokens.from_codes(codes, [9, 5, 2])
        torch.manual_seed(0)
        self.model = LCRec(config, self.dataset)
        self.model.prepare(
            item_tokens=self.tokens, backbone=load_backbone(llm, **OPTIONS), head_model=load_with_head(llm, **OPTIONS),
            tie_order=items, texts=self.texts.texts,
        )  # fmt: skip
        self.model.begin_stage(FINE_TUNING)
        self.model.eval()
        self.loader.texts, self.loader.length_of = self.texts, self.model.sample_lengths

    def drawn(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Every sample of an epoch: its task and its columns."""
        names = list(known_tasks())
        for batch in self.loader:
            columns = {name: values.tolist() for name, values in batch.interaction.items()}
            for row in zip(*columns.values(), strict=True):
                sample = dict(zip(columns, row, strict=True))
                yield names[sample["task"]], sample

    def rows(self) -> Iterator[tuple[str, dict[str, int], list[int], list[tuple[int, int]]]]:
        """Every sample of an epoch: its task, its columns, its token ids up to the last label, its labels."""
        names = list(known_tasks())
        for batch in self.loader:
            made = self.model.training_batch(batch)
            for row in range(len(batch["task"])):
                here = made.rows == row
                labels = list(zip(made.places[here].tolist(), made.labels[here].tolist(), strict=True))
                ids = made.ids[row, : labels[-1][0] + 1].tolist()
                assert ids == made.ids[row].tolist()[: len(ids)]
                columns = {name: int(values[row]) for name, values in batch.interaction.items()}
                yield names[columns["task"]], columns, ids, labels


@pytest.fixture(scope="module")
def world(folder: Path, llm: Path) -> World:
    return World(folder, llm)


@functools.cache
def table(folder: Path) -> dict[str, dict[str, str]]:
    """The item file, by raw id."""
    head, *lines = (folder / "said" / "said.item").read_text(encoding="utf-8").split("\n")
    names = [name.partition(":")[0] for name in head.split("\t")]
    return {line.split("\t")[0]: dict(zip(names, line.split("\t"), strict=True)) for line in lines if line}


def histories(world: World) -> dict[str, list[str]]:
    """Every user's train items in order, by raw ids."""
    split, names = world.dataset.split, world.dataset.field2id_token
    found: dict[str, list[str]] = {}
    for user, item, phase in zip(split.users, split.items, split.phases, strict=True):
        if phase == TRAIN:
            found.setdefault(str(names["user_id"][user]), []).append(str(names["item_id"][item]))
    return found


@functools.cache
def wordings() -> dict[str, list[tuple[str, str]]]:
    """The templates as the file has them, with the answer that is left unsaid."""
    found = yaml.safe_load((ROOT / "properties" / "prompts" / "lcrec.yaml").read_text(encoding="utf-8"))
    return {
        task: [(text["ask"], text["answer"]) if isinstance(text, dict) else (text, "{target}") for text in found[task]]
        for task in TASKS
    } | {"wrapper": found["wrapper"], "separators": (found["separator"], found["title_separator"])}


# --- samples ---------------------------------------------------------------------------------------------------------


def test_an_epochs_samples_are_those_of_the_files(world: World, folder: Path) -> None:
    raw = world.dataset.field2id_token["item_id"]
    items, kept = table(folder), histories(world)
    named = {item for item in items if items[item]["title"].strip() and items[item]["description"].strip()}
    named &= {str(item) for item in raw[1:]}
    assert 0 < len(named) < len(raw) - 1, "some items lack a text"
    prefixes = Counter(
        (tuple(row[max(0, place - SHOWN) : place]), row[place]) for row in kept.values() for place in range(1, len(row))
    )
    said = Counter(
        (tuple(row[max(0, place - SHOWN) : place]), item, review(user, item))
        for user, row in kept.items() for place, item in enumerate(row) if review(user, item) and row.count(item) == 1
    )  # fmt: skip
    double = [(user, item) for user, row in kept.items() for item in row if row.count(item) > 1]
    assert not double, "the files have no pair twice, so that every review counts"
    epochs = []
    for _ in range(2):
        found: dict[str, list[Any]] = {task: [] for task in TASKS}
        for task, columns in world.drawn():
            shown = tuple(str(raw[item]) for item in world.loader.items[columns["start"] : columns["stop"]])
            found[task].append((shown, str(raw[columns["target"]]), columns))
        assert Counter((shown, target) for shown, target, _ in found["sequential"]) == prefixes
        for task in ("text", "index2item"):
            assert sorted(target for _, target, _ in found[task]) == sorted(named)
            assert all(not shown and columns["source"] == columns["target"] for shown, _, columns in found[task])
        fused = Counter((shown, target) for shown, target, _ in found["fusionseqrec"])
        assert fused == Counter({pair: count for pair, count in prefixes.items() if pair[1] in named})
        queries = world.texts.texts["query"]
        asked = Counter((shown, target, queries[columns["source"]]) for shown, target, columns in found["query"])
        assert asked == said
        told = world.texts.texts["preference"]
        by_text = {review(user, item): (user, item) for user, row in kept.items() for item in row}
        speakers = []
        for shown, target, columns in found["preferenceobtain"]:
            user, item = by_text[told[columns["source"]]]
            place = kept[user].index(item) + 1
            assert shown == tuple(kept[user][max(0, place - SHOWN) : place]) and target == item
            speakers.append(user)
        assert sorted(speakers) == sorted(user for user, row in kept.items() if any(review(user, item) for item in row))
        epochs.append(sorted(columns["source"] for _, _, columns in found["preferenceobtain"]))
    assert epochs[0] != epochs[1], "what a user said is drawn anew"
    assert sum(map(len, found.values())) == world.loader.samples()


def test_the_fusion_task_is_capped_and_tasks_are_switched(folder: Path, llm: Path) -> None:
    made = World(folder, llm, fusion_samples=7, tasks=["sequential", "fusionseqrec"], prefixes_per_user=1)
    targets = [[sample["target"] for task, sample in made.drawn() if task == "fusionseqrec"] for _ in range(2)]
    assert [len(some) for some in targets] == [7, 7] and targets[0] != targets[1]
    assert {task for task, _ in made.drawn()} == {"sequential", "fusionseqrec"}
    few = World(folder, llm, tasks=["sequential", "fusionseqrec"], prefixes_per_user=1)
    counts = Counter(task for task, _ in few.drawn())
    assert 0 < counts["fusionseqrec"] <= counts["sequential"]
    off = World(folder, llm, query_task=False, text_task=False)
    assert {task for task, _ in off.drawn()} == set(TASKS) - {"query", "text"}
    with pytest.raises(UserError, match=r"there is no 'fusionseqrc'.*did you mean 'fusionseqrec'"):
        World(folder, llm, tasks=["sequential", "fusionseqrc"])
    with pytest.raises(UserError, match="nothing to train on"):
        World(folder, llm, tasks=[])


def test_preferences_of_the_user_file(folder: Path, llm: Path) -> None:
    made = World(folder, llm, preference_column="likes")
    kept, told = histories(made), made.texts.texts["preference"]
    users = [user for user in kept if int(user[1:]) % 2]
    assert sorted(told) == sorted(f"likes of {user}" for user in users)
    raw, count = made.dataset.field2id_token["item_id"], 0
    for task, columns in made.drawn():
        if task == "preferenceobtain":
            user = told[columns["source"]].split()[-1]
            shown = [str(raw[item]) for item in made.loader.items[columns["start"] : columns["stop"]]]
            assert shown == kept[user][-SHOWN:]
            count += 1
    assert count == len(users)
    with pytest.raises(UserError, match=r"neither the \.inter nor the \.user file of 'said' has 'liks'"):
        World(folder, llm, preference_column="liks")


def test_without_reviews_two_tasks_are_left_out_and_said(
    llm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="recbole_llm"):
        made = World(with_reviews(tmp_path, lambda user, item: " "), llm)
    assert "query task: left out" in caplog.text and "preference task: left out" in caplog.text
    assert {task for task, _ in made.drawn()} == set(TASKS) - {"query", "preferenceobtain"}


def test_no_text_of_valid_or_test_rows_is_in_any_sample(world: World, llm: Path, tmp_path: Path) -> None:
    kept = {(user, item) for user, row in histories(world).items() for item in row}
    swapped = with_reviews(tmp_path, lambda user, item: review(user, item) if (user, item) in kept else "secret words")
    other = World(swapped, llm, prefixes_per_user=1)
    assert other.texts.texts == world.texts.texts
    assert torch.equal(other.texts.query_places, world.texts.query_places)
    assert torch.equal(other.texts.preference_stops, world.texts.preference_stops)
    secret = " ".join(map(str, world.model.backbone.encode("secret words")))
    assert not any(secret in " ".join(map(str, ids)) for _, _, ids, _ in other.rows())


# --- prompts ---------------------------------------------------------------------------------------------------------


def expected(
    world: World, folder: Path, task: str, columns: dict[str, int], ask: str, answer: str
) -> tuple[list[int], list[int]]:
    """A prompt by plain formatting, and its answer."""
    backbone, raw = world.model.backbone, world.dataset.field2id_token["item_id"]
    first, known, found = backbone.embed_tokens.num_embeddings, table(folder), wordings()
    shown = world.loader.items[columns["start"] : columns["stop"]].tolist()

    def tokens(item: int) -> list[int]:
        return [first + token for token in world.tokens.of(item)]

    def text(place: str, item: int, limit: int = 20) -> list[int]:
        said = known.get(str(raw[item]), {}).get(place, "")
        return backbone.encode(said if said.strip() else "nothing said")[:limit]

    def between(parts: list[list[int]], separator: str) -> list[int]:
        gap = backbone.encode(separator)
        return list(itertools.chain(*(part if not place else gap + part for place, part in enumerate(parts))))

    separators = found["separators"]
    fills = {
        "history": lambda: between([tokens(item) for item in shown], separators[0]),
        "titles": lambda: between([text("title", item, 4) for item in shown], separators[1]),
        "item": lambda: tokens(columns["target"]),
        "target": lambda: tokens(columns["target"]),
        "title": lambda: text("title", columns["target"]),
        "description": lambda: text("description", columns["target"]),
        "query": lambda: backbone.encode(world.texts.texts["query"][columns["source"]])[:20],
        "preference": lambda: backbone.encode(world.texts.texts["preference"][columns["source"]])[:20],
    }

    def laid_out(template: str) -> list[int]:
        pieces = PLACE.split(template)
        return [
            token
            for place, piece in enumerate(pieces)
            for token in (fills[piece]() if place % 2 else backbone.encode(piece))
        ]

    whole = found["wrapper"].replace("{instruction}", ask)
    bos = [] if backbone.bos_id is None else [backbone.bos_id]
    return bos + laid_out(whole), [*laid_out(answer), backbone.eos_id]


def test_every_prompt_is_what_plain_formatting_makes(folder: Path, llm: Path) -> None:
    world, templates = World(folder, llm, prefixes_per_user=1), wordings()
    used: Counter[tuple[str, int]] = Counter()
    first = world.model.backbone.embed_tokens.num_embeddings
    for count, (task, columns, ids, labels) in enumerate(world.rows()):
        if count % 9 and task == "query":
            continue  # of the large task some, as formatting one by one is slow
        matches = []
        for place, (ask, answer) in enumerate(templates[task]):
            prompt, told = expected(world, folder, task, columns, ask, answer)
            if ids == (prompt + told)[:-1] and labels == [
                (len(prompt) - 1 + step, token) for step, token in enumerate(told)
            ]:
                matches.append(place)
                if "{target}" not in answer:
                    assert max(told) < first, "a text spells no item"
        assert matches, (task, columns, world.model.backbone.tokenizer.decode(ids))
        used.update((task, place) for place in matches)
        if columns["start"] == columns["stop"]:
            assert not any("{history}" in templates[task][place][0] for place in matches)
    assert {task for task, _ in used} == set(TASKS)
    for task in ("text", "index2item", "fusionseqrec", "query", "preferenceobtain"):
        assert {place for name, place in used if name == task} == set(range(len(templates[task]))), task


def test_lengths_are_those_of_the_first_templates(world: World) -> None:
    for batch in world.loader:
        assert (world.model.sample_lengths(batch) > 0).all()
        longest = world.model.writer.longest(SHOWN)
        assert world.model.training_batch(batch).ids.shape[1] < longest


def test_the_loss_is_that_of_a_dense_pass(world: World, llm: Path) -> None:
    model = world.model
    whole = AutoModelForCausalLM.from_pretrained(llm).eval()
    first = model.backbone.embed_tokens.num_embeddings
    whole.resize_token_embeddings(first + world.tokens.size, mean_resizing=False)
    with torch.no_grad():
        whole.get_output_embeddings().weight[first:] = model.code_tokens.outputs
        whole.get_input_embeddings().weight[first:] = model.code_tokens.inputs
    seen = set()
    for place, batch in enumerate(world.loader):
        tasks = set(batch["task"].tolist())
        # Batches are of like length, so that a task may stand in late ones alone.
        if place >= 6 and tasks <= seen:
            continue
        seen |= tasks
        made = model.training_batch(batch)
        labels = torch.full_like(made.ids, -100)
        labels[made.rows, made.places] = made.labels
        with torch.no_grad():
            logits = whole(input_ids=made.ids).logits
            wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
            torch.testing.assert_close(model.stage_loss(FINE_TUNING, made), wanted, rtol=1e-4, atol=1e-5)
    assert seen == {number(task) for task in TASKS}


# --- a task of one's own ---------------------------------------------------------------------------------------------


@register
class Rarity(Task):
    """Says how often an item was taken."""

    name = "rarity"
    places = ("item",)
    answers = ("rarity",)
    answer = "{rarity}"
    reads = ("rarity",)

    def own_texts(self) -> dict[str, list[str]]:
        counts = torch.bincount(self.loader.items, minlength=self.loader.dataset.item_num)
        return {"rarity": ["", *(f"{count} times" for count in counts[1:].tolist())]}

    def __len__(self) -> int:
        return int(self.loader.dataset.item_num) - 1

    def draw(self, chosen: torch.Tensor) -> Samples:
        return Samples.of_items(torch.arange(1, self.loader.dataset.item_num))


def test_a_task_of_the_users_own(folder: Path, llm: Path, tmp_path: Path) -> None:
    words = yaml.safe_load((ROOT / "properties" / "prompts" / "lcrec.yaml").read_text(encoding="utf-8"))
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps(words | {"rarity": ["How often was {item} taken?"]}), encoding="utf-8")
    made = World(folder, llm, prompts=str(file), tasks=["sequential", "rarity"])
    counts = np.bincount(made.loader.items.numpy(), minlength=made.dataset.item_num)
    backbone, found = made.model.backbone, []
    for task, columns, _, labels in made.rows():
        if task == "rarity":
            item = columns["target"]
            found.append(item)
            assert [token for _, token in labels] == [*backbone.encode(f"{counts[item]} times"), backbone.eos_id]
    assert sorted(found) == list(range(1, made.dataset.item_num))
    with pytest.raises(UserError, match="says nothing for 'rarity'"):
        read_templates("lcrec", [Rarity])
    wrong = {
        r"should name \{item\} once at most": "How often was {history} taken?",
        r"should name \{rarity\} once at most": {"ask": "{item}?", "answer": "{item}"},
        "have 'ask' and 'answer'": {"ask": "{item}?", "anser": "{rarity}"},
    }
    for place, (told, template) in enumerate(wrong.items()):
        broken = tmp_path / f"broken_{place}.yaml"
        broken.write_text(json.dumps(words | {"rarity": [template]}), encoding="utf-8")
        with pytest.raises(UserError, match=told):
            read_templates(str(broken), [Rarity])
    with pytest.raises(ValueError, match="there is a task 'rarity' already"):
        register(type("Other", (Task,), {"name": "rarity"}))


def test_a_task_of_the_users_own_that_was_edited_is_trained_anew(
    settings_of: Any, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = yaml.safe_load((ROOT / "properties" / "prompts" / "lcrec.yaml").read_text(encoding="utf-8"))
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps(words | {"rarity": ["How often was {item} taken?"]}), encoding="utf-8")
    more = {"item_text": "{movie_title}", "prompts": str(file), "tasks": ["sequential", "rarity"], "epochs": 1}
    config = Config("LCRec", "small", config_dict=settings_of(**SMALL["LCRec"] | more))
    first = fit(config, store_of(config))
    assert fit(config, store_of(config)).fingerprint == first.fingerprint
    monkeypatch.setattr(fine_tuning, "code_mark", lambda kind: "edited" if kind is Rarity else code_mark(kind))
    again = fit(config, store_of(config))
    assert again.fingerprint != first.fingerprint
    assert again.stages[0]["fingerprint"] == first.stages[0]["fingerprint"]


# --- the search ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def every_sequence(model: Any, codes: ItemTokens, prompt: list[int]) -> list[tuple[float, int]]:
    """Every combination of codes that items have at their levels, scored by a plain reading: score, item or -1."""
    used = [sorted({codes.of(item)[level] for item in range(1, codes.n_items)}) for level in range(len(LEVELS))]
    owner = {tuple(codes.of(item)): item for item in range(codes.n_items - 1, 0, -1)}
    sequences = list(itertools.product(*used))
    texts = torch.tensor([[*prompt, *CODE_IDS[list(sequence)].tolist()] for sequence in sequences])
    logs = model(input_ids=texts).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
    scores = logs.gather(2, texts[:, len(prompt) :].unsqueeze(-1)).sum((1, 2))
    return sorted(
        ((score, owner.get(sequence, -1)) for score, sequence in zip(scores.tolist(), sequences)), reverse=True
    )


def test_level_search_finds_what_is_no_item_and_the_trie_never(llama: Any) -> None:
    codes, options = random_codes(20), {"lm_ids": CODE_IDS, "beams": 20}
    given = decoder_of(llama), Head.of(llama), codes
    trie = BeamSearch(*given, **options)(PROMPTS)
    kept, dropped = (LevelSearch(*given, filter_items=switch, **options) for switch in (False, True))
    plain, filtered = kept(PROMPTS), dropped(PROMPTS)
    assert (trie.items > 0).all()
    invalid = 0
    for row, prompt in enumerate(PROMPTS):
        # 20 beams hold all prefixes of two codes, so nothing is lost on the way.
        best = every_sequence(llama, codes, prompt)[:20]
        assert plain.items[row].tolist() == [item for _, item in best]
        torch.testing.assert_close(
            plain.scores[row].double(), torch.tensor([score for score, _ in best]).double(), atol=2e-4, rtol=1e-4
        )
        valid = [item for _, item in best if item > 0]
        invalid += 20 - len(valid)
        assert filtered.items[row].tolist() == valid + [-1] * (20 - len(valid))
        assert (filtered.scores[row, len(valid) :] == FILTERED).all()
    assert 0 < invalid < 20 * len(PROMPTS)
    assert kept.invalid_share == dropped.invalid_share == invalid / (20 * len(PROMPTS))


def test_level_search_and_what_may_not_be_shown(llama: Any) -> None:
    codes = random_codes(30, distinct=False)
    assert codes.collision_rate() > 0
    search = LevelSearch(decoder_of(llama), Head.of(llama), codes, lm_ids=CODE_IDS, beams=20, filter_items=False)
    free = search(PROMPTS)
    shown = [item for item in free.items[0].tolist() if item > 0]
    barred = torch.tensor([shown[:2], [0, 0], [0, 0], [0, 0]])
    found = search(PROMPTS, exclude=Exclusion(search.trie, barred))
    left = [item for item in found.items[0].tolist() if item > 0]
    assert left[: len(shown) - 2] == shown[2:] and not set(left) & set(shown[:2])
    assert torch.equal(found.items[1:], free.items[1:])
    # Items of equal tokens have equal scores, and stand by id.
    groups = {item: group for group in codes.groups() for item in group}
    for row in free.items.tolist():
        for item in row[:-2]:
            if item in groups and row.index(groups[item][0]) < 18:
                place = row.index(groups[item][0])
                assert row[place : place + len(groups[item])] == groups[item][: 20 - place]
    legal = torch.ones(len(PROMPTS), codes.n_items, dtype=torch.bool)
    legal[:, 0] = False
    legal[0, shown[:2]] = False
    placed = search.placed(found, legal)
    for row in range(len(PROMPTS)):
        items, scores = placed.items[row].tolist(), placed.scores[row]
        holes = [place for place, item in enumerate(found.items[row].tolist()) if item < 0 and scores[place].isfinite()]
        real = set(found.items[row].tolist()) - {-1}
        spare = [item for item in range(codes.n_items - 1, 0, -1) if legal[row, item] and item not in real]
        assert [items[place] for place in holes] == spare[: len(holes)]
        assert all(items[place] == 0 for place in range(20) if not scores[place].isfinite())
    with pytest.raises(UserError, match="take constraint: trie"):
        titles = ItemTokens.from_sequences([[], [5], [5, 6], [7]], 2)
        LevelSearch(decoder_of(llama), Head.of(llama), titles, beams=2)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_level_search_in_a_run_tells_its_share(settings_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    more = settings_of(item_text="{movie_title} {class}", **SMALL["LCRec"]) | {"epochs": 1}
    shares = {}
    for filtered in (True, False):
        result = run("LCRec", "small", config_dict=more | {"constraint": "level", "filter_items": filtered})
        shares[filtered] = result["evaluation"]["invalid_share"]
        log = Path(result["log_file"]).read_text(encoding="utf-8")
        assert f"level-wise search: {shares[filtered]:.4f} of the sequences are no item" in log
    assert 0 < shares[True] == shares[False] < 1
    assert "invalid_share" not in run("LCRec", "small", config_dict=more)["evaluation"]


def test_all_prompts_give_the_mean_of_each(settings_of: Any) -> None:
    more = settings_of(item_text="{movie_title} {class}", **SMALL["LCRec"]) | {"epochs": 1, "inference_prompts": "all"}
    config = Config("LCRec", "small", config_dict=more)
    made = fit(config, store_of(config))
    trainer, model, data = made.trainer, made.model, made.test_data
    with torch.no_grad():
        for weight in model.backbone.decoder.parameters():
            weight.mul_(4.0)  # so little trained, it would rank alike whatever it is asked
    trainer.evaluate(data, load_best_model=False)
    mean = trainer.measured
    asked = len(wordings()["sequential"])
    assert model.prompts_asked == asked
    parts = []
    for which in range(asked):
        model.asked_with = which
        parts.append(measure(model, data, config, None))
    model.asked_with = 0
    assert len({part.items.tobytes() for part in parts}) > 1
    for name, value in mean.metrics.items():
        assert value == pytest.approx(np.mean([part.metrics[name] for part in parts]))
        np.testing.assert_allclose(mean.per_user[name], np.mean([part.per_user[name] for part in parts], axis=0))
    assert np.array_equal(mean.items, parts[0].items)
    assert mean.prompts == asked and parts[0].prompts == 1
    assert model.asked_with == 0
