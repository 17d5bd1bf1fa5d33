"""LLaRA and CoLLM: prompts with and without vectors, what trains when, what is recommended, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from small_models import SMALL
from test_aligntokenrec import OPTIONS, SETTINGS, SimpleConfig, loader, users
from test_errors import refused
from test_glta import N_ITEMS, dataset, histories
from test_projected_tokens import USERS, vectors, world
from test_tca4rec import own as tca_settings
from test_tca4rec import scores as teacher_scores
from transformers import AutoModelForCausalLM

from recbole_llm import registry
from recbole_llm.backbone.load import load_backbone, load_with_head
from recbole_llm.config import Config
from recbole_llm.data.instructions import TokenBatch
from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.collm import TEXT_TUNING, CoLLM
from recbole_llm.model.generative import FINE_TUNING
from recbole_llm.model.llara import LLaRA
from recbole_llm.model.tca4rec import TCA4Rec
from recbole_llm.schema import Loader, properties_dir
from recbole_llm.serving.recommender import Recommender
from recbole_llm.tasks.behaviour import SEQUENTIAL
from recbole_llm.training.collaborative_vectors import UserTable
from recbole_llm.training.runs import run

MODELS = {"LLaRA": LLaRA, "CoLLM": CoLLM}


def settings(model: str, **more: Any) -> SimpleConfig:
    files = [properties_dir() / "model" / f"{name}.yaml" for name in ("TALLRec", model)]
    shipped: dict[str, Any] = {}
    for file in files:
        shipped |= yaml.load(file.read_text(encoding="utf-8"), Loader=Loader)
    return SimpleConfig({**shipped, **SETTINGS, "model": model, "history_length": 4, **more})


def title(item: int) -> str:
    return f"The {'red' if item % 2 else 'blue'} ship number {item}"


def build(folder: Path, model: str, around: bool = False, stage: str = FINE_TUNING, **more: Any) -> Any:
    torch.manual_seed(0)
    backbone = load_backbone(folder, **OPTIONS)
    config = settings(model, **((tca_settings() | {"base_model": model} if around else {}) | more))
    made = (TCA4Rec.over(model) if around else MODELS[model])(config, dataset())
    titles = backbone.encode_batch([title(item) for item in range(1, N_ITEMS)])
    # Long titles would make long searches.
    sequences = [[], *([tokens[0], *tokens[-3:]] for tokens in titles)]
    table = UserTable(USERS, world())
    made.take_vectors(SimpleNamespace(items=vectors(), users=lambda longest: table))
    made.prepare(
        item_tokens=ItemTokens.from_sequences(sequences, backbone.eos_id), backbone=backbone,
        head_model=load_with_head(folder, **OPTIONS), tie_order=torch.arange(N_ITEMS), texts={},
    )  # fmt: skip
    made.begin_stage(stage)
    if around:
        made.take_teacher(SimpleNamespace(logits=teacher_scores))
    return made.eval()


@pytest.fixture(scope="module")
def folder(folders: Callable[[str], Path]) -> Path:
    return folders("llama")


def sampled(model: Any, **more: Any) -> tuple[Any, TokenBatch]:
    torch.manual_seed(3)
    samples = next(iter(loader(tasks=[SEQUENTIAL], train_batch_size=20, **more)))
    return samples, model.training_batch(samples)


def expected_prompt(model: Any, start: int, stop: int, kind: str) -> list[int]:
    """The prompt by plain reading of the files, token by token."""
    encode, first = model.backbone.encode, model._first_vector
    name = model.config["prompts" if kind == "hybrid" else "text_prompts"] or model.config["prompts"]
    words = yaml.load((properties_dir() / "prompts" / f"{name}.yaml").read_text(encoding="utf-8"), Loader=Loader)
    before, _, rest = words["shown"].partition("{title}")
    between, _, behind = rest.partition("{vector}")
    own = model.item_tokens
    shown: list[int] = []
    for place in range(start, stop):
        item = int(histories().items[place])
        tokens = own.lm_ids[torch.tensor(own.of(item)[:-1])].tolist()
        vector = [first + item] if kind == "hybrid" else []
        shown += (encode(words["separator"]) if shown else []) + encode(before) + tokens
        shown += encode(between) + vector + encode(behind)
    user = int((torch.from_numpy(histories().offsets) <= stop).sum()) - 1
    ids = [] if model.backbone.bos_id is None else [model.backbone.bos_id]
    opening, _, rest = words["inference"].replace("{domain}", "item").partition("{history}")
    middle, _, end = rest.partition("{user}")
    ids += encode(opening) + shown + encode(middle)
    return ids + ([first + N_ITEMS + user, *encode(end)] if "{user}" in rest else [])


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hybrid", "text"])
@pytest.mark.parametrize("model", MODELS)
def test_a_history_is_titles_with_vectors_and_the_answer_a_title(model: str, kind: str, folder: Path) -> None:
    made = build(folder, model, stage=TEXT_TUNING if (model, kind) == ("CoLLM", "text") else FINE_TUNING)
    # Of LLaRA's batches the first of a curriculum has no vectors.
    made.batches_planned = 10 if kind == "text" else 0
    samples, batch = sampled(made)
    assert len(batch.ids) == 20
    for row, (start, stop) in enumerate(zip(samples["start"].tolist(), samples["stop"].tolist())):
        asked = expected_prompt(made, start, stop, kind)
        own = made.item_tokens
        answer = own.lm_ids[torch.tensor(own.of(int(histories().items[stop])))].tolist()
        ids = asked + answer[:-1]
        assert batch.ids[row, : len(ids)].tolist() == ids
        mine = batch.rows == row
        assert batch.labels[mine].tolist() == answer and batch.answers[mine].all()
        assert batch.places[mine].tolist() == list(range(len(asked) - 1, len(asked) - 1 + len(answer)))
    assert (batch.ids >= made._first_vector).any() == (kind == "hybrid")
    assert bool((batch.labels < made._first_vector).all())


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_that_of_transformers_given_the_projected_vectors(model: str, folder: Path) -> None:
    made = build(folder, model)
    _, batch = sampled(made)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    first, table = (
        made._first_vector,
        torch.cat([made.projected.items, made.users(torch.arange(len(USERS)))])
        if model == "CoLLM"
        else made.projected.items,
    )
    with torch.no_grad():
        rows = made.projected.projector(table)
        embeds = plain.get_input_embeddings()(batch.ids.clamp(max=first - 1))
        own = rows[(batch.ids - first).clamp(min=0)]
        logits = plain(inputs_embeds=torch.where((batch.ids >= first).unsqueeze(-1), own, embeds)).logits
        expected = torch.nn.functional.cross_entropy(logits[batch.rows, batch.places], batch.labels)
        assert made.stage_loss(FINE_TUNING, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def ranked(model: Any, row: int) -> dict[int, float]:
    """Every item's log-probability, by reading prompt and title at once."""
    history = histories().items[histories().offsets[row] : histories().offsets[row + 1]]
    start = int(histories().offsets[row + 1]) - min(len(history), 4)
    asked = expected_prompt(model, start, int(histories().offsets[row + 1]), "hybrid")
    if model.users is not None:
        # Asked at the end of his history, which is where the next user's begins.
        asked = [model._first_vector + N_ITEMS + row if one >= model._first_vector + N_ITEMS else one for one in asked]
    found = {}
    for item in range(1, N_ITEMS):
        answer = model.item_tokens.lm_ids[torch.tensor(model.item_tokens.of(item))]
        ids = torch.cat([torch.tensor(asked), answer]).unsqueeze(0)
        states = model.backbone.decoder(input_ids=ids).last_hidden_state[0]
        told = model.head.logits(states).log_softmax(-1)[len(asked) - 1 : -1]
        found[item] = told[torch.arange(len(answer)), answer].sum().item()
    return found


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_the_search_finds_what_scoring_every_item_finds(model: str, folder: Path) -> None:
    made = build(folder, model, beams=N_ITEMS - 1)
    asked = [1, 3, 4]
    found = made.full_sort_predict(users(*asked))
    for place, row in enumerate(asked):
        wanted = ranked(made, row)
        expected = torch.tensor([wanted[item] for item in range(1, N_ITEMS)])
        torch.testing.assert_close(found[place, 1:], expected, rtol=1e-3, atol=1e-3)


def test_only_the_vectors_of_who_is_asked_move_a_ranking(folder: Path) -> None:
    made = build(folder, "CoLLM", beams=N_ITEMS - 1)
    plain = made.full_sort_predict(users(1, 3))
    given = users(1, 3)
    given["user_id"] = torch.tensor([1, 2])
    other = made.full_sort_predict(given)
    torch.testing.assert_close(other[0], plain[0], rtol=1e-4, atol=1e-4)
    assert (other[1, 1:] - plain[1, 1:]).abs().max() > 1e-4


# --- training --------------------------------------------------------------------------------------------------------


def trained_by(groups: Sequence[dict[str, Any]]) -> dict[int, float | None]:
    return {id(weight): group.get("lr") for group in groups for weight in group["params"]}


@pytest.mark.parametrize("stages", ["two", "joint"])
@pytest.mark.parametrize("model", MODELS)
def test_the_projector_is_in_the_optimizer_and_learns_while_the_vectors_stay(
    model: str, stages: str, folder: Path
) -> None:
    made = build(folder, model, collm_stages=stages)
    groups = made.begin_stage(FINE_TUNING)
    rates = trained_by(groups)
    adapter = [] if model == "CoLLM" and stages == "two" else list(made.adapter.parameters())
    assert set(rates) == {id(weight) for weight in (*made.projected.parameters(), *adapter)}
    assert all(rates[id(weight)] == made.config["adapter_learning_rate"] for weight in adapter)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    kept, of_users = made.projected.items.clone(), USERS.clone()
    optimizer = torch.optim.Adam(groups, lr=0.01)
    for _ in range(2):  # LoRA's first step moves one of its two factors alone
        optimizer.zero_grad()
        made.stage_loss(FINE_TUNING, sampled(made)[1]).backward()
        optimizer.step()
    moved = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    wanted = {f"projected.projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    assert {name for name in moved if name.startswith("projected")} == wanted
    assert any(name.startswith("adapter") for name in moved) == bool(adapter)
    assert torch.equal(made.projected.items, kept) and torch.equal(USERS, of_users)


def test_the_first_stage_trains_the_language_model_on_text(folder: Path) -> None:
    made = build(folder, "CoLLM", stage=TEXT_TUNING)
    assert made.stages == (TEXT_TUNING, FINE_TUNING)
    groups = made.begin_stage(TEXT_TUNING)
    assert set(trained_by(groups)) == {id(weight) for weight in made.adapter.parameters()}
    _, batch = sampled(made)
    made.stage_loss(TEXT_TUNING, batch).backward()
    assert all(weight.grad is None for weight in made.projected.parameters())
    assert any(weight.grad is not None and weight.grad.any() for weight in made.adapter.parameters())
    joint = build(folder, "CoLLM", collm_stages="joint")
    assert joint.stages == (FINE_TUNING,)


def kinds_drawn(model: Any, count: int) -> list[str]:
    return [model.kind_of_batch() for _ in range(count)]


def test_the_share_of_batches_with_vectors_grows_from_none_to_all(folder: Path) -> None:
    made = build(folder, "LLaRA")
    made.batches_planned = 4000
    torch.manual_seed(0)
    drawn = kinds_drawn(made, 4000)
    shares = [drawn[start : start + 1000].count("hybrid") / 1000 for start in range(0, 4000, 1000)]
    # Batch t of T with probability t / T: in the quarters 1/8, 3/8, 5/8, 7/8 of them; four deviations of a binomial.
    for quarter, share in enumerate(shares):
        mean = (2 * quarter + 1) / 8
        assert share == pytest.approx(mean, abs=4 * (mean * (1 - mean) / 1000) ** 0.5)
    assert drawn[0] == "text"
    made.begin_stage(FINE_TUNING)
    torch.manual_seed(0)
    assert kinds_drawn(made, 4000) == drawn
    # Another one that takes up state and generator goes on as the first did.
    made.begin_stage(FINE_TUNING)
    torch.manual_seed(0)
    assert kinds_drawn(made, 1700) == drawn[:1700]
    state, random = made.state_dict(), torch.get_rng_state()
    other = build(folder, "LLaRA")
    other.batches_planned = 4000
    other.load_state_dict(state)
    torch.set_rng_state(random)
    assert kinds_drawn(other, 2300) == drawn[1700:]
    without = build(folder, "LLaRA", curriculum=False)
    without.batches_planned = 4000
    assert set(kinds_drawn(without, 50)) == {"hybrid"}


def test_a_batch_of_text_moves_no_projector(folder: Path) -> None:
    made = build(folder, "LLaRA")
    made.batches_planned = 10
    made.stage_loss(FINE_TUNING, sampled(made)[1]).backward()
    assert all(weight.grad is None for weight in made.projected.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_of_a_language_model_may_train_beside_the_projector(kind: str, folders: Callable[[str], Path]) -> None:
    made = build(folders(kind), "LLaRA", adapter="full", curriculum=False)
    groups = made.begin_stage(FINE_TUNING)
    assert [group.get("lr") for group in groups] == [None, made.config["adapter_learning_rate"]]
    assert {id(weight) for weight in groups[0]["params"]} == {id(weight) for weight in made.projected.parameters()}
    made.stage_loss(FINE_TUNING, sampled(made)[1]).backward()
    table = made.backbone.decoder.get_input_embeddings().table.weight
    assert any(weight is table for weight in groups[1]["params"]) and table.grad.any()
    assert all(weight.grad is not None for group in groups for weight in group["params"])


@pytest.mark.parametrize("model", MODELS)
def test_several_processes_have_the_loss_of_one(model: str, folder: Path) -> None:
    made = build(folder, model)
    _, batch = sampled(made)
    with torch.no_grad():
        whole = made.stage_loss(FINE_TUNING, batch).item()
        parts = [batch.share(rank, 3) for rank in range(3)]
        shares = [made.stage_loss(FINE_TUNING, part).item() * part.targets_count() for part in parts]
    assert sum(shares) / batch.targets_count() == pytest.approx(whole, rel=1e-5)


def test_prompts_that_are_left_out_take_their_users_along(folder: Path) -> None:
    whole = sampled(build(folder, "CoLLM"))[1]
    made = build(folder, "CoLLM")
    lengths = torch.zeros(len(whole.ids), dtype=torch.long).scatter_reduce(0, whole.rows, whole.places, "amax") + 2
    room = int(lengths.max()) - 1
    made.writer.leave_room(room, drop=True)
    _, batch = sampled(made)
    kept = lengths <= room
    assert 0 < len(batch.ids) < len(whole.ids)
    wide = whole.ids[kept][:, : batch.ids.shape[1]]
    for row in range(len(batch.ids)):
        length = int(batch.places[batch.rows == row].max()) + 1
        assert torch.equal(batch.ids[row, :length], wide[row, :length])


@pytest.mark.parametrize("model", MODELS)
def test_tca4rec_without_the_teacher_is_the_base(model: str, folder: Path) -> None:
    plain, wrapped = build(folder, model), build(folder, model, around=True, alpha=0.0)
    assert isinstance(wrapped, MODELS[model]) and wrapped.parts == ("embedding_model", "cf_model")
    gradients, losses = [], []
    for made in (plain, wrapped):
        loss = made.stage_loss(FINE_TUNING, sampled(made)[1])
        loss.backward()
        losses.append(loss.item())
        gradients.append([weight.grad.clone() for weight in made.projected.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)
    mixed = build(folder, model, around=True, alpha=0.5)
    assert abs(mixed.stage_loss(FINE_TUNING, sampled(mixed)[1]).item() - losses[0]) > 1e-4


# --- runs ------------------------------------------------------------------------------------------------------------


def small(settings_of: Callable[..., dict[str, Any]], model: str, **more: Any) -> dict[str, Any]:
    return settings_of(item_text="{movie_title} {class}", **SMALL[model]) | {"epochs": 1, "eval_step": 0} | more


def test_a_first_stage_that_is_found_is_followed_by_the_same_last_one(
    settings_of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    own = small(settings_of, "CoLLM", output_dir=str(tmp_path / "one"))
    whole = run("CoLLM", "small", config_dict=own)
    names = [stage["name"] for stage in whole["stages"]]
    assert names[-3:] == ["embedding_model", TEXT_TUNING, FINE_TUNING]
    other = small(settings_of, "CoLLM", output_dir=str(tmp_path / "two"))
    run("CoLLM", "small", config_dict=other | {"learning_rate": 0.5})
    (text,) = (tmp_path / "one" / "cache").glob(f"{TEXT_TUNING}-*")
    again = run("CoLLM", "small", config_dict=other)
    cached = {stage["name"]: stage["cached"] for stage in again["stages"]}
    assert cached[TEXT_TUNING] and not cached[FINE_TUNING] and again["test"] == whole["test"]
    assert (tmp_path / "two" / "cache" / text.name).is_dir()
    shutil.rmtree(text)


@pytest.mark.parametrize("model", ["LLaRA", "CoLLM"])
@pytest.mark.parametrize("source", ["SASRec", "LightGCN"])
def test_a_run_is_loaded_and_recommends_as_it_was_measured(
    source: str, model: str, settings_of: Callable[..., dict[str, Any]]
) -> None:
    own = {key: value for key, value in small(settings_of, model).items() if not key.startswith("embedding_model")}
    own |= {"embedding_model": source, "embedding_model.epochs": 1, "embedding_model.eval_step": 0}
    result = run(model, "small", config_dict=own)
    loaded = Recommender.of_run(Path(result["result_file"]).parent)
    user = loaded.users[0]
    (first,) = loaded.recommend([user], 5)
    assert len(first) == 5 and len({item for item, _, _ in first}) == 5
    (again,) = Recommender.of_run(Path(result["result_file"]).parent).recommend([user], 5)
    assert again == first
    history = [item for item, _, _ in first[:3]]
    if model == "CoLLM" and source == "LightGCN":
        with pytest.raises(UserError, match="knows users by what it has learned of each"):
            loaded.recommend_history(history, 5)
    else:
        assert len(loaded.recommend_history(history, 5)) == 5


@pytest.mark.parametrize(
    ("model", "setting", "words"),
    [
        ("LLaRA", "projector=gellu", ["projector should be", "gelu", "relu", "linear"]),
        ("LLaRA", "projector_width=0", ["projector_width"]),
        ("LLaRA", "curriculum=perhaps", ["curriculum should be bool"]),
        ("LLaRA", "embedding_model=ItemKNN", ["embedding_model should be a recommender with item embeddings"]),
        ("LLaRA", "embedding_model=GLTA", ["embedding_model should be a recommender with item embeddings"]),
        ("LLaRA", "prompts=tca4rec", ["needs a file that says under 'shown'"]),
        ("LLaRA", "prompts=collm", ["LLaRA tells of no user", "{user}"]),
        ("TALLRec", "prompts=collm", ["TALLRec tells of no user", "{user}"]),
        ("CoLLM", "prompts=llara", ["CoLLM tells of the user in every template"]),
        ("CoLLM", "text_prompts=collm", ["text_prompts: prompts without vectors have no {user}"]),
        ("CoLLM", "text_prompts=~", ["text_prompts: prompts without vectors have no {user}"]),
        ("CoLLM", "collm_stages=three", ["collm_stages should be", "two", "joint"]),
        ("LLaRA", "embedding_model.train_share=.5", ["embedding_model.train_share", "another split than the run's"]),
        ("CoLLM", "embedding_model.merge_valid=true", ["would train SASRec on another split", "set merge_valid for"]),
        ("CoLLM", "embedding_model=BERT4Rec", ["embedding_model: BERT4Rec makes no one vector", "SASRec"]),
    ],
)
def test_wrong_input_gets_one_line(
    model: str, setting: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "run", f"--model={model}", "--dataset=tiny", f"--{setting}")
    for word in words:
        assert word in said


def test_a_way_to_show_items_names_title_and_vector(folder: Path, tmp_path: Path) -> None:
    shipped = (properties_dir() / "prompts" / "llara.yaml").read_text(encoding="utf-8")
    for shown in ("{title}", "{vector} {title}", "{title} {vector} {user}", "{title} {title} {vector}"):
        file = tmp_path / "own.yaml"
        file.write_text(shipped.replace("'\"{title}\" {vector}'", f"'{shown}'"), encoding="utf-8")
        with pytest.raises(UserError, match=r"shown: .* should be a text that names {title}, then {vector}"):
            LLaRA(settings("LLaRA", prompts=str(file)), dataset())


def test_a_users_state_is_made_of_as_much_as_the_recommender_reads() -> None:
    config = Config("CoLLM", "tiny", command_line=[])
    assert (
        config["MAX_ITEM_LIST_LENGTH"]
        == config.part("embedding_model")["MAX_ITEM_LIST_LENGTH"]
        > config["history_length"]
    )


def test_both_are_registered_as_what_generates() -> None:
    assert set(MODELS) <= set(registry.generative())
