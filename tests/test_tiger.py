"""TIGER, and the embedded T5 that it and others generate with."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import SMALL
from test_aligntokenrec import OPTIONS, SETTINGS, loader, tokens, users
from test_glta import N_ITEMS, dataset, histories

from recbole_llm import registry
from recbole_llm.backbone.embedded_t5 import EmbeddedT5Settings, make_embedded_t5
from recbole_llm.backbone.load import load_backbone
from recbole_llm.config import Config
from recbole_llm.data.histories import Histories
from recbole_llm.data.prompts import Ragged
from recbole_llm.errors import UserError
from recbole_llm.model.tca4rec import TCA4Rec
from recbole_llm.model.tiger import TIGER
from recbole_llm.serving.recommender import Recommender
from recbole_llm.tasks import known_tasks
from recbole_llm.tasks.base import check_no_texts
from recbole_llm.tasks.behaviour import NEGATIVE, SEQUENTIAL
from recbole_llm.training.fine_tuning import FineTuningTrainer
from recbole_llm.training.pipeline import fit, store_of
from recbole_llm.training.runs import run

SIZES = EmbeddedT5Settings(layers=1, hidden_size=16, inner_size=32, heads=2, head_size=8, vocab_size=300)
SMALL_T5 = {"llm": "embedded-t5", **{key: value for key, value in SMALL["TIGER"].items() if key.startswith("t5_")}}
TOKENS_OF_USERS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 without words."""
    made = tmp_path_factory.mktemp("t5")
    make_embedded_t5([], SIZES, 1, made)
    return made


def shipped(model: str = "TIGER", **more: Any) -> dict[str, Any]:
    return dict(Config(model, "tiny", config_dict=more, command_line=[]).final_config_dict)


def build(folder: Path, kind: Any = TIGER, **settings: Any) -> Any:
    torch.manual_seed(0)
    base = shipped() if kind is TIGER else shipped("TCA4Rec", base_model="TIGER")
    own = {**SETTINGS, "user_tokens": TOKENS_OF_USERS, "prefixes_per_user": None}
    made = kind({**base, **own, **settings}, dataset())
    backbone = load_backbone(folder, **OPTIONS, with_head=True, causal_only=False)
    made.prepare(
        item_tokens=tokens(), backbone=backbone, head_model=backbone.causal, tie_order=torch.arange(N_ITEMS), texts={}
    )
    made.begin_stage("fine_tuning")
    return made.eval()


def samples(**settings: Any) -> Any:
    torch.manual_seed(3)
    return next(iter(loader(**{"tasks": [SEQUENTIAL], "train_batch_size": 24, "history_length": 4, **settings})))


def user_token(made: TIGER, user: int) -> int:
    """By the hash of the raw id, spelled out."""
    return 2 + made.item_tokens.size + zlib.crc32(f"u{user}".encode()) % TOKENS_OF_USERS


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_the_user_and_the_items_and_not_a_word(folder: Path) -> None:
    made = build(folder)
    drawn = samples()
    written = made.training_batch(drawn)
    own, items = histories(), tokens()
    owner_of = [user for user in range(7) for _ in range(own.offsets[user], own.offsets[user + 1])]
    assert len({owner_of[stop] for stop in drawn["stop"].tolist()}) > 2
    for row, (start, stop) in enumerate(zip(drawn["start"].tolist(), drawn["stop"].tolist())):
        shown = [2 + token for item in own.items[start:stop].tolist() for token in items.of(item)]
        prompt = [user_token(made, owner_of[stop]), *shown, made.backbone.eos_id]
        answer = [*(2 + token for token in items.of(int(own.items[stop]))), made.backbone.eos_id]
        mine = written.rows == row
        assert written.ids[row, : len(prompt) + len(answer) - 1].tolist() == prompt + answer[:-1]
        assert written.labels[mine].tolist() == answer
        assert written.places[mine].tolist() == list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))


def test_what_is_asked_is_what_was_trained(folder: Path) -> None:
    made, asked = build(folder), []
    search = made.searcher(torch.arange(N_ITEMS) > 0)
    search.register_forward_pre_hook(lambda _, args: asked.extend(row.tolist() for row in args[0]))
    interaction = users(1, 3, 4)
    made.full_sort_predict(interaction)
    for row, user in enumerate((1, 3, 4)):
        length = min(4, int(interaction["item_length"][row]))
        items = interaction["item_id_list"][row, : int(interaction["item_length"][row])][-length:].tolist()
        shown = [2 + token for item in items for token in tokens().of(item)]
        assert asked[row] == [user_token(made, user), *shown, made.backbone.eos_id]


def test_the_only_user_there_is_opens_every_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = dataset()
    alone = SimpleNamespace(
        num={"user_id": 2, "item_id": N_ITEMS}.get,
        train_histories=Histories(many.train_histories.offsets[:3], many.train_histories.of(1)),
        field2id_token={"user_id": many.field2id_token["user_id"][:2]},
    )
    monkeypatch.setattr(sys.modules[__name__], "dataset", lambda: alone)
    made = build(folder)
    assert made._opening() == [user_token(made, 1)]
    assert made.full_sort_predict(users(1)).isfinite().sum() == N_ITEMS - 1
    monkeypatch.setattr(sys.modules[__name__], "dataset", lambda: many)
    assert not build(folder)._opening()


def test_every_task_tells_of_the_user_whose_item_it_asks_for(tmp_path: Path) -> None:
    more = {"prompts": "p5", "tasks": ["sequential", "straightforward"], "user_tokens": 50}
    config = Config("TIGER", "tiny", config_dict=settings_of("TIGER", tmp_path, **more))
    made = fit(config, store_of(config))
    model, histories = made.model, made.train_data._dataset.train_histories
    first = model.backbone.embed_tokens.num_embeddings + model.item_tokens.size
    told: dict[int, int] = {}
    for batch in made.train_data:
        ids = model.training_batch(batch).ids
        for row, stop in enumerate(batch["stop"].tolist()):
            user = int(histories.owners(np.array([stop]))[0])
            assert ids[row][ids[row] >= first].tolist() == [first + int(model._buckets[user])]
            told[int(batch["task"][row])] = user
    assert len(told) == 2
    with pytest.raises(UserError, match="tasks: text asks of texts"):
        check_no_texts([known_tasks()["sequential"], known_tasks()["text"]])


def test_without_tokens_of_users_a_prompt_is_the_items_alone(folder: Path) -> None:
    made = build(folder, user_tokens=0)
    written = made.training_batch(samples())
    assert made.code_tokens.inputs.shape[0] == made.item_tokens.size
    assert int(written.ids.max()) < 2 + made.item_tokens.size
    history = Ragged.from_lists([[3, 5]])
    wanted = [2 + token for item in (3, 5) for token in tokens().of(item)]
    assert made._ask(history, None).values.tolist() == [*wanted, made.backbone.eos_id]


def test_tokens_of_users_are_never_found_and_learn(folder: Path) -> None:
    made = build(folder)
    made.stage_loss("fine_tuning", made.training_batch(samples())).backward()
    gradient = made.code_tokens.inputs.grad[made.item_tokens.size :]
    assert gradient.shape[0] == TOKENS_OF_USERS and gradient.abs().sum() > 0
    found = made.searcher(torch.arange(N_ITEMS) > 0)([[user_token(made, 1), 3, 1]])
    assert set(found.items[0].tolist()) <= set(range(1, N_ITEMS))


@pytest.mark.parametrize("form", ["log_mixture", "soft_ce"])
def test_tca4rec_around_it_at_alpha_0_is_its_loss_and_gradient(folder: Path, form: str) -> None:
    plain = build(folder)
    wrapped = build(folder, TCA4Rec.over("TIGER"), base_model="TIGER", alpha=0.0, tca_loss=form)
    mixed = build(folder, TCA4Rec.over("TIGER"), base_model="TIGER", alpha=0.5, tca_loss=form)
    losses, gradients = [], []
    for made in (plain, wrapped, mixed):
        if made is not plain:
            made.take_teacher(SimpleNamespace(logits=lambda moments: torch.randn(len(moments), N_ITEMS)))
        loss = made.stage_loss("fine_tuning", made.training_batch(samples()))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(made.code_tokens.inputs.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert abs(losses[2] - losses[0]) > 1e-3


# --- the embedded T5 -------------------------------------------------------------------------------------------------


def test_the_shipped_sizes_are_the_papers() -> None:
    """Section 4: 4 layers each, 6 heads of 64, 1024 and 128, dropout .1, ReLU; 13 million parameters."""
    settings = EmbeddedT5Settings.from_config(Config("TIGER", "tiny", command_line=[]))
    made = settings.model_config(2 + 1024 + 2000)
    assert (made.num_layers, made.num_decoder_layers, made.num_heads, made.d_kv) == (4, 4, 6, 64)
    assert (made.d_model, made.d_ff, made.dropout_rate, made.dense_act_fn) == (128, 1024, 0.1, "relu")
    assert settings == EmbeddedT5Settings()


def test_words_are_learned_where_there_are_any(tmp_path: Path) -> None:
    corpus = [f"the red ship {number}" for number in range(50)]
    facts = make_embedded_t5(corpus, SIZES, 1, tmp_path / "words")
    backbone = load_backbone(tmp_path / "words", **OPTIONS, with_head=True, causal_only=False)
    assert 258 < facts["vocabulary"] <= 300 and len(backbone.encode("the red ship")) < 8
    assert backbone.tokenizer.decode(backbone.encode("\u00fc </s> \u4e2d")) == "\u00fc </s> \u4e2d"
    assert not {0, 1} & set(backbone.encode("<pad> </s>"))
    weights = {seed: _weights(corpus, seed, tmp_path / str(seed)) for seed in (1, 2)}
    own = backbone.embed_tokens.weight
    assert torch.equal(own, weights[1]) and not torch.equal(own, weights[2])
    assert make_embedded_t5([], SIZES, 1, tmp_path / "none")["vocabulary"] == 2
    with pytest.raises(UserError, match="t5_vocab_size is 100; the bytes alone need 258"):
        EmbeddedT5Settings(vocab_size=100)


def _weights(corpus: list[str], seed: int, folder: Path) -> torch.Tensor:
    make_embedded_t5(corpus, SIZES, seed, folder)
    return load_backbone(folder, **OPTIONS, causal_only=False).embed_tokens.weight


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def settings_of(model: str, saved: Path, **more: Any) -> dict[str, Any]:
    own = {"output_dir": str(saved), "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 1}
    return SMALL[model] | own | more


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("AlignTokenRec", {}),
        ("LCRec", {"adapter": "lora", "constraint": "level", "text_tokens": 8}),
        ("TCA4Rec", {"base_model": "LCRec", "tasks": [SEQUENTIAL]}),
        ("TCA4Rec", {"base_model": "TIGER"}),
    ],
    ids=["AlignTokenRec", "LCRec", "TCA4Rec-LCRec", "TCA4Rec-TIGER"],
)
def test_any_model_of_codes_takes_it(model: str, more: dict[str, Any], saved: Path) -> None:
    own = SMALL["LCRec"] if more.get("base_model") else {}
    kept = {key: value for key, value in SMALL[model].items() if not (more and key.startswith("embedding_model"))}
    result = run(model, "tiny", config_dict=settings_of("LCRec", saved) | kept | own | SMALL_T5 | more)
    assert {"backbone", "text_backbone"} <= {stage["name"] for stage in result["stages"]}
    assert all(0 <= value <= 1 for value in result["test"].values()) and result["stages"][-1]["tokens"] > 0


def test_a_run_is_found_again_and_serves(saved: Path) -> None:
    result = run("TIGER", "tiny", config_dict=settings_of("TIGER", saved))
    assert [stage["name"] for stage in result["stages"]] == list(registry.entries()["TIGER"].stages)
    card = json.loads((Path(result["result_file"]).parent / "result.json").read_text(encoding="utf-8"))
    assert card["config"]["llm"] == "embedded-t5" and card["parameters"]["trainable"] > 0
    recommender = Recommender.of_run(Path(result["result_file"]).parent)
    user = recommender.users[0]
    first, again = recommender.recommend([user], 10)[0], recommender.recommend([user], 10)[0]
    assert first == again and len({item for item, _, _ in first}) == 10
    with pytest.raises(UserError, match="TIGER knows users by what it has learned of each"):
        recommender.recommend_history(["i3", "i5"], 10)
    without = run("TIGER", "tiny", config_dict=settings_of("TIGER", saved, user_tokens=0, eval_step=0))
    recommender = Recommender.of_run(Path(without["result_file"]).parent)
    assert len(recommender.recommend_history(["i3", "i5"], 10)) == 10


def test_the_optimizer_has_the_papers_step_sizes() -> None:
    """Section 4: 0.01 for the first 10,000 steps, then by the inverse square root; of the size of the weights."""
    trainer: Any = object.__new__(FineTuningTrainer)
    trainer.config = Config("TIGER", "tiny", command_line=[])
    moved = []
    for step in (0, 9_999, 39_999):
        weight = torch.nn.Parameter(torch.full((8,), 2.0))
        optimizer = trainer._build_optimizer(params=[{"params": [weight], "lr": trainer.config["learning_rate"]}])
        weight.grad = torch.ones(8)
        optimizer.step()
        with torch.no_grad():
            weight.fill_(2.0)
        optimizer.state[weight]["step"].fill_(step)
        optimizer.step()
        moved.append(float(2.0 - weight[0].detach()))
    assert moved == pytest.approx([0.01 * 2, 0.01 * 2, 0.005 * 2], rel=1e-4)


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(model: str, saved: Path, **more: Any) -> str:
    """What is said, with nothing made."""
    with pytest.raises(UserError) as told:
        config = Config(model, "tiny", config_dict=settings_of(model, saved, **more), command_line=[])
        fit(config, store_of(config))
    assert not list((saved / "cache").glob("*-*")), "it was refused after work"
    return str(told.value)


@pytest.mark.parametrize("model", ["GLTA", "TALLRec", "BIGRec", "LightGCNPlus"])
def test_models_that_need_a_causal_one_refuse_it(model: str, tmp_path: Path, folder: Path) -> None:
    assert f"{model} needs a causal language model" in refused(model, tmp_path, llm="embedded-t5")
    assert "no causal language model" in refused(model, tmp_path, llm=str(folder))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tasks": [SEQUENTIAL, NEGATIVE]}, "prompts: ~ has no words that tell the task negative from sequential"),
        (
            {"item_tokens": "random", "id_spelling": "pieces"},
            "user_tokens: 20 adds tokens to the vocabulary, and id_spelling: pieces takes the language model's own "
            "alone; set user_tokens: 0",
        ),
        ({"prompts": "aligntokenrec"}, "prompts: TIGER tells of the user in every template"),
        ({"ranking": "full"}, "ranking: full needs a causal language model, and this one has an encoder"),
        ({"text_llm": "nowhere/at all"}, "llm 'nowhere/at all': no such folder"),
        ({"adapter": "lora", "lora_target_modules": ["q_proj"]}, "no linear layer of a T5Model ends in 'q_proj'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_work(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refused("TIGER", tmp_path, **more)


def test_labels_of_the_history_are_refused_where_none_is_told(tmp_path: Path) -> None:
    more = {"soft_history": True, "train_positions": "all", **SMALL_T5}
    assert "soft_history mixes labels of the items shown" in refused("TCA4Rec", tmp_path, **more)
