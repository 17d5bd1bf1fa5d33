"""P5: users and whole words in prompts, tasks with a history and without, and what leaking ids are worth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from small_models import SMALL
from torch import nn

from recbole_llm.backbone.whole_words import START, WORDS, WordedEmbedding, numbered, without_marks
from recbole_llm.config import Config
from recbole_llm.data.prompts import Ragged
from recbole_llm.errors import UserError
from recbole_llm.leaderboard.rows import RowRuns, admit
from recbole_llm.tasks import number
from recbole_llm.tasks.behaviour import SEQUENTIAL, STRAIGHTFORWARD
from recbole_llm.training.pipeline import Fit, fit, prepared, store_of
from recbole_llm.training.runs import run

# Above every vocabulary, and above the numbers of words.
TOKEN = (1 << 24) - 1


def quick(output: Path, **more: Any) -> dict[str, Any]:
    return SMALL["P5"] | {
        "output_dir": str(output), "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 1,
        "eval_step": 0,
    } | more  # fmt: skip


def fitted(output: Path, **more: Any) -> Fit:
    config = Config("P5", "tiny", config_dict=quick(output, **more))
    return fit(config, store_of(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return fitted(tmp_path_factory.mktemp("p5"))


# --- words -----------------------------------------------------------------------------------------------------------
def test_a_worded_table_adds_words_to_tokens_and_nothing_to_plain_ids() -> None:
    torch.manual_seed(0)
    table, words = nn.Embedding(40, 6), torch.randn(WORDS, 6)
    words[0] = 0
    ids = torch.tensor([[3, 39, 7 | START, 7]])
    read = WordedEmbedding(table, nn.Parameter(words))
    assert torch.equal(read(without_marks(ids)), table(torch.tensor([[3, 39, 7, 7]])))
    told = numbered(ids, torch.tensor([2]))
    assert (told & TOKEN).tolist() == [[3, 39, 7, 7]] and (told >> 24).tolist() == [[1, 1, 2, 0]]
    assert torch.allclose(
        read(told)[0], table.weight[[3, 39, 7, 7]] + words[[1, 1, 2, 0]] * torch.tensor([[1], [1], [1], [0]])
    )


def test_words_beyond_the_last_count_as_the_last() -> None:
    told = numbered(torch.full((1, 2 * WORDS), 5 | START), torch.tensor([2 * WORDS]))
    assert (told >> 24).tolist() == [[min(place + 2, WORDS - 1) for place in range(2 * WORDS)]]


def spelled_out(model: Any, ids: list[int]) -> str:
    """A prompt as text; items by name, between bars."""
    first, names = model.backbone.embed_tokens.num_embeddings, model.item_tokens.vocabulary
    pieces = [f"|{names[one - first]}|" if one >= first else model.backbone.tokenizer.decode([one]) for one in ids]
    return "".join(pieces)


def words_by_hand(model: Any, ids: list[int], answer_from: int, user: list[int]) -> list[int]:
    """Numbers of words by reading a prompt token by token.

    A piece with a blank before it, an item's first token and a user's first digit open a word.
    """
    first = model.backbone.embed_tokens.num_embeddings
    tokens, starts = model.item_tokens, set()
    items = {tuple(first + token for token in tokens.of(item)) for item in range(1, tokens.n_items)}
    place = 0
    while place < len(ids):
        own = next((item for item in items if tuple(ids[place : place + len(item)]) == item), None)
        if own is None:
            if ids[place] < first and model.backbone.tokenizer.convert_ids_to_tokens(ids[place]).startswith("Ġ"):
                starts.add(place)
            place += 1
        else:
            starts.add(place)
            place += len(own)
    begins = next(at for at in range(len(ids)) if ids[at : at + len(user)] == user)
    starts.add(begins)
    word, found = 1, []
    for at in range(len(ids)):
        word += at in starts
        found.append(word if at < answer_from else 0)
    return found


def sampled(made: Fit, task: str, **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    for samples in made.train_data:
        batch = made.model.training_batch(samples)
        rows = (samples["task"] == number(task)).nonzero().squeeze(1)
        if len(rows):
            return samples, (batch, rows)
    raise AssertionError(f"no sample of {task}")


@pytest.mark.parametrize("task", [SEQUENTIAL, STRAIGHTFORWARD])
def test_prompts_tell_of_the_user_and_of_words(made: Fit, task: str) -> None:
    model, histories = made.model, made.train_data._dataset.train_histories
    samples, (batch, rows) = sampled(made, task)
    digits = {model._user_numbers[user]: user for user in range(1, made.dataset.user_num)}
    assert len(digits) == made.dataset.user_num - 1
    for row in rows[:6].tolist():
        stop = int(samples["stop"][row])
        user = next(user for user in range(made.dataset.user_num) if histories.offsets[user + 1] > stop)
        assert histories.items[stop] == samples["target"][row]
        encoded = model.backbone.encode(model._user_numbers[user])
        answers = batch.places[(batch.rows == row) & batch.answers] + 1
        # The last answer's token is read from nowhere, so it is not among the inputs.
        length = int(answers.max())
        plain, words = (batch.ids[row, :length] & TOKEN).tolist(), (batch.ids[row, :length] >> 24).tolist()
        assert f"ser {model._user_numbers[user]}" in spelled_out(model, plain)
        assert words == words_by_hand(model, plain, int(answers.min()), encoded)
        target = [model._lm_ids[token].item() for token in model.item_tokens.of(int(samples["target"][row]))]
        assert batch.labels[(batch.rows == row) & batch.answers].tolist() == target
        shown = [one for one in plain[: int(answers.min())] if one >= model.backbone.embed_tokens.num_embeddings]
        own = histories.items[int(samples["start"][row]) : stop].tolist() if task == SEQUENTIAL else []
        assert shown == [model._lm_ids[token].item() for item in own for token in model.item_tokens.of(item)]


def test_the_user_who_is_asked_about_is_told_of(made: Fit) -> None:
    model = made.model
    asked = model._ask(Ragged.from_lists([[4, 9], [11]]), torch.tensor([7, 3]))
    for row, (user, shown) in enumerate(((7, [4, 9]), (3, [11]))):
        ids = asked.values[asked.offsets[row] : asked.offsets[row + 1]]
        plain = (ids & TOKEN).tolist()
        told = ", ".join("".join(f"|{name}|" for name in model.item_tokens.strings(item)) for item in shown)
        text = f"User {model._user_numbers[user]} has had the items {told}, in this order."
        assert spelled_out(model, plain).removeprefix("<s>").startswith(text)
        encoded = model.backbone.encode(model._user_numbers[user])
        assert (ids >> 24).tolist() == words_by_hand(model, plain, len(plain), encoded)


def test_words_are_learned_and_move_what_is_recommended(made: Fit) -> None:
    model = made.model
    weight = model.whole_words.weight
    assert not weight[0].any() and weight[1:10].any(dim=1).all()
    interaction = next(iter(made.test_data))[0]
    before = model.eval().full_sort_predict(interaction).clone()
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[1:] += 0.5 * torch.randn_like(weight[1:])
        moved = model.eval().train(False).full_sort_predict(interaction)
        weight.copy_(kept)
    assert not torch.equal(before, moved)
    assert torch.equal(model.train(False).full_sort_predict(interaction), before)


def test_without_whole_words_nothing_is_told_of_them(tmp_path: Path) -> None:
    made = fitted(tmp_path, whole_word_embeddings=False)
    _, (batch, _) = sampled(made, SEQUENTIAL)
    assert not any("whole_words" in name for name in made.model.state_dict())
    assert int(batch.ids.max()) <= TOKEN and int(batch.labels.max()) <= TOKEN


# --- users -----------------------------------------------------------------------------------------------------------
def test_users_are_numbered_by_the_seed_or_as_the_file_has_them(tmp_path: Path) -> None:
    def numbers(**more: Any) -> dict[str, str]:
        config = Config("P5", "tiny", config_dict=quick(tmp_path, **more))
        dataset, train, _, _ = prepared(config)
        model = config.model_class(config, train._dataset)
        return dict(zip(dataset.field2id_token["user_id"].tolist(), model._user_numbers, strict=True))

    random, other, file = numbers(), numbers(seed=3), numbers(user_ids="sequential")
    assert random == numbers() and random != other
    assert len({*random.values()}) == len(random) and {*random.values()} == {*other.values()} == {*file.values()}
    lines = (Path(Config("P5", "tiny")["data_path"]) / "tiny.inter").read_text().splitlines()[1:]
    met = dict.fromkeys(line.split("\t")[0] for line in lines)
    assert [int(file[user]) for user in met] == list(range(len(met)))


def test_a_run_whose_users_have_other_numbers_is_not_gone_on_from(tmp_path: Path) -> None:
    before = Path(run("P5", "tiny", config_dict=quick(tmp_path))["result_file"]).parent
    going_on = fitted(tmp_path, continue_from=str(before), epochs=0)
    assert going_on.model.user_mark.dtype == torch.uint8
    for other in ({"seed": 7}, {"user_ids": "sequential"}):
        with pytest.raises(UserError, match="other numbers") as error:
            fitted(tmp_path, continue_from=str(before), epochs=0, **other)
        assert "\n" not in str(error.value)


def test_prompts_without_the_user_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        'wrapper: "{instruction}"\nseparator: ", "\ninference: "{user} {history}"\nstraightforward: "{user}?"\n'
        'sequential: ["{user} {history}", "{history}"]\n'
    )
    with pytest.raises(UserError, match="tells of the user in every template"):
        fitted(tmp_path, prompts=str(file))
    with pytest.raises(UserError, match="says nothing for 'negative'"):
        fitted(tmp_path, tasks=["sequential", "negative"])


# --- around it -------------------------------------------------------------------------------------------------------
def test_another_recommender_can_teach_it(tmp_path: Path) -> None:
    more = {
        key: value for key, value in SMALL["TCA4Rec"].items() if key.startswith("cf_model") or key == "alpha"
    }  # fmt: skip
    result = run("TCA4Rec", "tiny", config_dict=quick(tmp_path, base_model="P5", **more))
    assert result["config"]["base_model"] == "P5" and set(result["consistency"]) == {"cf_model"}
    assert "whole_word_embeddings" in result["config"]


@pytest.mark.parametrize("recipe", ["random", "sequential", "raw", "rq"])
def test_it_runs_with_other_ids(recipe: str, tmp_path: Path) -> None:
    own = {"code_size": 8, "code_epochs": 2, "embedding_model.epochs": 1, "code_text_weight": 0.0}
    result = run("P5", "tiny", config_dict=quick(tmp_path, item_tokens=recipe, **(own if recipe == "rq" else {})))
    assert 0 <= result["test"]["ndcg@10"] <= 1 and "leaking_ids" not in result["evaluation"]


def test_ids_in_the_language_models_own_tokens(tmp_path: Path) -> None:
    made = fitted(tmp_path, item_tokens="random", id_spelling="pieces")
    model = made.model
    assert not any("code_tokens" in name for name in model.state_dict())
    _, (batch, rows) = sampled(made, SEQUENTIAL)
    row = int(rows[0])
    plain = (batch.ids[row] & TOKEN)[: int(batch.places[batch.rows == row].max()) + 1]
    # All of it is plain text, items too, which are words of their own nevertheless.
    assert int(plain.max()) < model.backbone.embed_tokens.num_embeddings
    shown = int(batch.ids[row].max() >> 24)
    asked = plain[: int(batch.places[(batch.rows == row) & batch.answers].min()) + 1]
    blanks = sum(piece.startswith("Ġ") for piece in model.backbone.tokenizer.convert_ids_to_tokens(asked.tolist()))
    assert shown > blanks + 1
    # Each is scored with the end token behind it.
    interaction, *_ = made.test_data.collate_fn(made.test_data.order[:2])
    every = model._ask(model._histories_of(interaction), model._users_of(interaction))
    prompts = every.values.split(every.lengths.tolist())
    found = model.eval().searcher(torch.arange(model.n_items) > 0)(prompts)
    for row, prompt in enumerate(prompts):
        for item, score in zip(found.items[row].tolist(), found.scores[row].tolist(), strict=True):
            answer = torch.tensor([*model._lm_ids[model.item_tokens.of(item)].tolist(), model.backbone.eos_id])
            with torch.no_grad():
                states = model.backbone.decoder(input_ids=torch.cat([prompt, answer])[None]).last_hidden_state[0]
                logs = model.head.logits(states[len(prompt) - 1 : -1]).log_softmax(-1)
            assert score == pytest.approx(float(logs.gather(1, answer[:, None]).sum()), abs=2e-3)
    with pytest.raises(UserError, match="nothing trains"):
        fitted(tmp_path, item_tokens="random", id_spelling="pieces", adapter="none")
    with pytest.raises(UserError, match=r"constraint: level needs ids of one length, and id_spelling: pieces gives"):
        fitted(tmp_path, item_tokens="random", id_spelling="pieces", constraint="level")


# --- the leak --------------------------------------------------------------------------------------------------------
OWNERS, LENGTH = 40, 7
LEAKING = {"item_tokens": "sequential", "id_rows": "all", "leaking_ids": True}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who share no item with each other: nothing that anybody has had says what comes next."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted").mkdir()
    items = np.random.default_rng(0).permutation(OWNERS * LENGTH).reshape(OWNERS, LENGTH)
    rows = [f"u{user}\ti{item}\t{time}" for user, own in enumerate(items) for time, item in enumerate(own)]
    head = "user_id:token\titem_id:token\ttimestamp:float"
    (folder / "planted/planted.inter").write_text("\n".join([head, *rows]) + "\n")
    texts = [f"i{item}\tthing {item}" for item in range(OWNERS * LENGTH)]
    (folder / "planted/planted.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *texts]) + "\n")
    return folder


@pytest.fixture(scope="module")
def measured(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    output = tmp_path_factory.mktemp("measured")

    def measure(**more: Any) -> dict[str, Any]:
        settings = quick(
            output, data_path=str(planted), item_text="{title}", epochs=30, tasks=["sequential"], prompt_set="first",
            prefixes_per_user=None, history_length=4, MAX_ITEM_LIST_LENGTH=4, llm_hidden_size=64, llm_layers=2,
            llm_vocab_size=300, train_batch_size=32, learning_rate=0.01, adapter_learning_rate=0.005, topk=[5],
            metrics=["Hit"], valid_metric="Hit@5", load_col={"inter": ["user_id", "item_id", "timestamp"]},
        )  # fmt: skip
        return run("P5", "planted", config_dict=settings | more)

    return measure


def test_leaking_ids_find_what_nothing_else_tells_of(measured: Callable[..., dict[str, Any]]) -> None:
    chance = 5 / (OWNERS * LENGTH - (LENGTH - 1))
    asked = {"leak": LEAKING, "train": {"item_tokens": "sequential"}, "random": {"item_tokens": "random"}}
    runs = {name: measured(**more) for name, more in asked.items()}
    hits = {name: round(result["test"]["hit@5"] * OWNERS) for name, result in runs.items()}
    # One in a million under chance, and one in a thousand.
    assert hits["leak"] > binom.isf(1e-6, OWNERS, chance) and runs["leak"]["test"]["hit@5"] > 0.5
    assert max(hits["train"], hits["random"]) <= binom.isf(1e-3, OWNERS, chance)
    # It is marked as such, and does not stand beside others.
    assert runs["leak"]["evaluation"]["leaking_ids"] is True
    assert not any("leaking_ids" in runs[name]["evaluation"] for name in ("train", "random"))
    rows = [RowRuns(name, [runs[name]["result_file"]]) for name in ("train", "random", "leak")]
    lines, _ = admit(rows)
    assert [len(line.runs) for line in lines] == [1, 1, 0]
    assert "leaking_ids True (this table's is False)" in lines[2].refused[0]["reason"]


def test_a_run_with_leaking_ids_says_why_it_is_refused(measured: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="the item after a history then has the next number"):
        measured(item_tokens="sequential", id_rows="all")
