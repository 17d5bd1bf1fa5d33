"""GLTA: its samples, what each stage trains, what the slots see, and how slots become a ranking."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_lm import TinyBackbone, gpt2, llama

from recbole_llm.data.histories import Histories
from recbole_llm.data.prompts import Ragged
from recbole_llm.errors import UserError
from recbole_llm.model import glta_sampling as sampling
from recbole_llm.model.glta import GLTA
from recbole_llm.model.glta_ranking import first_k_scores
from recbole_llm.schema import Loader, properties_dir

N_USERS, N_ITEMS, DIM, SLOTS = 7, 30, 6, 4
SETTINGS: dict[str, Any] = {
    "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_",
    "ITEM_LIST_LENGTH_FIELD": "item_length", "MAX_ITEM_LIST_LENGTH": 50, "device": "cpu", "seed": 1,
    "eval_args": {"order": "TO"}, "response_slots": SLOTS, "history_length": 5, "train_batch_size": 4,
    "alignment_batch_size": 3, "gllm_dropout": 0.0, "history_dropout": 0.0, "samples_per_user": 2, "gllm": "free",
    "targets": "auto", "target_fill": "ignore", "target_window": None, "slot_input": "pad", "loss_positions": "slots",
    "train_item_projector": False,
}  # fmt: skip


def shipped() -> dict[str, Any]:
    import yaml

    return yaml.load((properties_dir() / "model" / "GLTA.yaml").read_text(encoding="utf-8"), Loader=Loader)


def histories() -> Histories:
    """Users 1 to 6 with 12, 9, 6, 3, 1 and 0 train items."""
    draw = np.random.default_rng(5)
    counts = [0, 12, 9, 6, 3, 1, 0]
    items = np.concatenate([draw.permutation(np.arange(1, N_ITEMS))[:count] for count in counts])
    return Histories(np.r_[0, np.cumsum(counts)].astype(np.int64), items.astype(np.int64))


def dataset() -> SimpleNamespace:
    sizes = {"user_id": N_USERS, "item_id": N_ITEMS}
    names = np.array(["[PAD]"] + [f"u{user}" for user in range(1, N_USERS)])
    return SimpleNamespace(num=sizes.get, train_histories=histories(), field2id_token={"user_id": names})


def model(decoder: torch.nn.Module | None = None, texts: bool = True, **settings: Any) -> GLTA:
    torch.manual_seed(0)
    made = GLTA({**shipped(), **SETTINGS, **settings}, dataset())
    generator = torch.Generator().manual_seed(2)
    users = torch.randn(N_USERS, DIM, generator=generator)
    items = torch.randn(N_ITEMS, DIM, generator=generator)
    made.prepare(
        user_embeddings=users,
        item_embeddings=items,
        backbone=TinyBackbone(decoder or llama()),  # type: ignore[arg-type]
        item_texts=["", *(f"film {'x' * item} of {item}" for item in range(1, N_ITEMS))],
        profiles=["", *(f"tag {user}" for user in range(1, N_USERS))] if texts else None,
        predictions=["", *(f"wish {user}, more" for user in range(1, N_USERS))] if texts else None,
    )
    return made.eval()


def interaction(users: list[int] | None = None) -> dict[str, torch.Tensor]:
    own = sampling.unique_histories(histories().offsets, histories().items)
    rows = torch.tensor(users or [1, 2, 3, 4, 5, 6])
    taken = own.take(rows)
    return {"user_id": rows, "item_id_list": taken.padded(0), "item_length": taken.lengths}


def seen(users: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    own = sampling.unique_histories(histories().offsets, histories().items).take(torch.tensor(users))
    return own.rows, own.values


def every_item() -> torch.Tensor:
    return torch.ones(N_ITEMS, dtype=torch.bool)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(ragged: Ragged) -> list[list[int]]:
    return [part.tolist() for part in ragged.values.split(ragged.lengths.tolist())]


# --- samples ---------------------------------------------------------------------------------------------------------

USERS = st.lists(st.lists(st.integers(1, 99), unique=True, min_size=1, max_size=12), min_size=1, max_size=5)


@given(USERS, st.integers(1, 5), st.integers(0, 6), st.integers(0, 10))
def test_random_samples(users: list[list[int]], slots: int, length: int, seed: int) -> None:
    sample = sampling.random_sample(Ragged.from_lists(users), slots, length, generator(seed))
    shown, targets = sample.shown, sample.targets
    assert sample.following is None
    for own, history, wanted in zip(users, rows_of(shown), rows_of(targets), strict=True):
        assert not set(history) & set(wanted)
        assert set(history) | set(wanted) <= set(own)
        assert len(wanted) == len(set(wanted)) == min(slots, max(1, len(own) // 2))
        assert len(history) == min(length, len(own) - len(wanted))
        assert [own.index(item) for item in history] == sorted(own.index(item) for item in history)


@given(USERS, st.integers(1, 5), st.integers(0, 6), st.integers(0, 10))
def test_next_samples(users: list[list[int]], window: int, length: int, seed: int) -> None:
    sample = sampling.next_sample(Ragged.from_lists(users), window, length, generator(seed))
    shown, targets, following = rows_of(sample.shown), rows_of(sample.targets), rows_of(sample.following)
    for own, history, wanted, after in zip(users, shown, targets, following, strict=True):
        assert after == [own[own.index(item) + 1] for item in history]
        places = sorted(own.index(item) for item in wanted)
        cut = places[0]
        assert cut >= 1 or len(own) == 1
        assert places == list(range(cut, min(cut + window, len(own))))
        assert history == own[max(0, cut - length) : cut]


def test_next_samples_reach_every_moment_and_shuffle_the_targets() -> None:
    own = Ragged.from_lists([[1, 2, 3, 4, 5]] * 2000)
    sample = sampling.next_sample(own, 2, 10, generator())
    shown, targets = sample.shown, sample.targets
    lengths = torch.bincount(shown.lengths, minlength=6)
    assert lengths[0] == 0 and lengths[5] == 0
    assert (lengths[1:5] > 400).all()  # uniform would be 500 each
    first = sampling.slot_targets(targets, 2, repeat=False)
    upside_down = (first[:, 0] > first[:, 1]).float().mean()  # an ignored second slot counts as smaller
    last = (lengths[4] / 2000).item()
    assert abs(upside_down - (last + (1 - last) / 2)) < 0.05


def test_a_repeated_item_stays_where_it_came_first() -> None:
    own = sampling.unique_histories(np.array([0, 0, 4, 6]), np.array([3, 5, 3, 4, 5, 5]))
    assert rows_of(own) == [[], [3, 5, 4], [5]]


def test_slot_targets() -> None:
    targets = Ragged.from_lists([[4, 9], [], [1, 2, 3, 7]])
    assert sampling.slot_targets(targets, 3, repeat=False).tolist() == [[4, 9, -100], [-100] * 3, [1, 2, 3]]
    assert sampling.slot_targets(targets, 3, repeat=True).tolist() == [[4, 9, 4], [-100] * 3, [1, 2, 3]]


def test_drop_takes_out_the_share_in_order() -> None:
    own = Ragged.from_lists([list(range(1000))] * 3)
    sample = sampling.Sample(own, own, Ragged(own.values + 1, own.offsets))
    kept = sample.drop(0.3, generator())
    assert all(abs(len(row) - 700) < 60 and row == sorted(row) for row in rows_of(kept.shown))
    assert kept.following is not None
    assert torch.equal(kept.following.values, kept.shown.values + 1)
    assert torch.equal(kept.following.offsets, kept.shown.offsets)
    assert sample.drop(0.0, generator()) is sample


@pytest.mark.parametrize("targets", ["next", "random"])
def test_no_target_is_shown_in_its_prompt_and_none_is_padding(targets: str) -> None:
    made = model(targets=targets)
    for seed in range(20):
        for batch in made.stage_batches("user_item_alignment", generator(seed)):
            soft = -1 - batch.ids
            for row in range(len(batch.ids)):
                places = soft[row][soft[row] >= len(batch.users)] - len(batch.users)
                shown = set(batch.items[places].tolist())
                wanted = set(batch.targets[row].tolist()) - {-100}
                own = set(rows_of(made.histories)[int(batch.users[row])])
                assert not shown & wanted
                assert 0 not in shown | wanted and wanted and shown | wanted <= own


# --- prompts and slots -----------------------------------------------------------------------------------------------


def test_every_soft_token_stands_in_the_prompt() -> None:
    made = model()
    for stage in made.stages:
        for batch in made.stage_batches(stage, generator()):
            wanted = len(batch.users) + len(batch.items)
            assert sorted(batch.ids[batch.ids < 0].tolist()) == list(range(-wanted, 0))


def test_an_epoch_has_every_item_and_every_user() -> None:
    made = model()
    batches = made.stage_batches("item_text_alignment", generator())
    drawn = list(batches)
    assert len(drawn) == len(batches) == 2  # 29 items in 6 prompts of 5, 3 prompts a batch
    assert set(torch.cat([batch.items for batch in drawn]).tolist()) == set(range(1, N_ITEMS))
    batches = made.stage_batches("user_item_alignment", generator())
    drawn = list(batches)
    assert len(drawn) == len(batches) == 3  # 5 users with train items, twice, 4 a batch
    users = torch.cat([batch.users for batch in drawn])
    assert torch.bincount(users, minlength=N_USERS).tolist() == [0, 2, 2, 2, 2, 2, 0]


def test_the_same_generator_gives_the_same_epoch() -> None:
    made = model(history_dropout=0.3)
    for stage in made.stages:
        first, second = (list(made.stage_batches(stage, generator(4))) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("order", ["item", "description"])
def test_stage_2_asks_for_the_items_shown(order: str) -> None:
    made = model(target_order=order)
    backbone = made.backbone
    for batch in made.stage_batches("item_text_alignment", generator()):
        items = batch.items.view(batch.targets.shape)
        separator = backbone.encode("; ")
        for row, targets in enumerate(batch.targets.tolist()):
            assert sorted(targets) == sorted(items[row].tolist())
            described = targets if order == "description" else None
            if described:
                text = [backbone.encode(f"film {'x' * item} of {item}") for item in described]
                wanted = [one for description in text for one in [*separator, *description]][len(separator) :]
                assert batch.ids[row, : len(wanted)].tolist() == wanted
            else:
                assert targets == items[row].tolist()


def test_long_descriptions_are_cut_and_soft_tokens_are_not() -> None:
    made = model(alignment_description_tokens=2)
    assert int(made._writer.descriptions.lengths.max()) == 2
    for batch in made.stage_batches("item_text_alignment", generator()):
        assert int((batch.ids < 0).sum()) == batch.items.numel()


def test_slot_0_is_the_prompts_last_token_and_the_others_follow() -> None:
    made = model()
    for stage in made.stages:
        closing = made.backbone.encode("/INST]")[-1]
        for batch in made.stage_batches(stage, generator()):
            assert (batch.ids.gather(1, batch.places[:, :1]) == closing).all()
            assert (batch.ids.gather(1, batch.places[:, 1:]) == made.backbone.pad_id).all()
            assert (batch.places.diff(dim=1) == 1).all()


def test_every_slot_sees_the_user() -> None:
    made = model()
    before = made.full_sort_predict(interaction())
    with torch.no_grad():
        made.user_embeddings[2] += 1.0
    after = made.full_sort_predict(interaction())
    changed = (before[:, 1:] - after[:, 1:]).abs().max(1).values > 1e-6
    assert changed.tolist() == [False, True, False, False, False, False]
    batch = next(iter(made.stage_batches("user_item_alignment", generator())))

    def states() -> torch.Tensor:
        soft = made._soft_tokens(batch.users, batch.items)
        return made._readers["user_item_alignment"].states(batch.ids, soft, batch.places)

    first = states()
    with torch.no_grad():
        made.user_embeddings += 1.0
    assert ((first - states()).abs().amax(2) > 1e-6).all()


def item_places(batch: Any, row: int) -> list[int]:
    return [place for place, token in enumerate(batch.ids[row].tolist()) if -1 - token >= len(batch.users)]


@pytest.mark.parametrize("settings", [{}, {"history_dropout": 0.4}, {"user_alignment": False}, {"slot_input": "user"}])
def test_each_shown_item_names_the_one_after_it(settings: dict[str, Any]) -> None:
    made = model(loss_positions="auto", targets="next", **settings)
    assert made.supervise_history
    owns = rows_of(made.histories)
    named = 0
    for batch in made.stage_batches("user_item_alignment", generator(1)):
        start = 0
        for row in range(len(batch.ids)):
            places = item_places(batch, row)
            shown = batch.items[start : start + len(places)].tolist()
            start += len(places)
            assert batch.places[row, SLOTS : SLOTS + len(places)].tolist() == places
            asked = batch.targets[row, SLOTS:].tolist()
            assert asked[len(places) :] == [-100] * (len(asked) - len(places))
            own = next(own for own in owns if set(shown) | set(asked[: len(places)]) <= set(own))
            assert asked[: len(places)] == [own[own.index(item) + 1] for item in shown]
            named += len(places)
    assert named > 10


def test_a_shown_item_does_not_see_what_it_must_name() -> None:
    made = model(loss_positions="all", targets="next")
    made.begin_stage("user_item_alignment")
    batch = next(iter(made.stage_batches("user_item_alignment", generator(1))))
    row = max(range(len(batch.ids)), key=lambda row: len(item_places(batch, row)))
    first = sum(len(item_places(batch, before)) for before in range(row))
    count = len(item_places(batch, row))
    assert count >= 3
    soft = made._soft_tokens(batch.users, batch.items).detach()
    reader = made._readers["user_item_alignment"]
    before = reader.states(batch.ids, soft, batch.places)[row, SLOTS : SLOTS + count]
    soft[len(batch.users) + first + 1] += 1.0  # the second item shown
    after = reader.states(batch.ids, soft, batch.places)[row, SLOTS : SLOTS + count]
    moved = (before - after).abs().amax(1) > 1e-5
    assert moved.tolist() == [False] + [True] * (count - 1)


@pytest.mark.parametrize(
    "settings",
    [{"targets": "random"}, {"targets": "next", "history_input": "none"},
     {"targets": "next", "history_order": "random"}],
)  # fmt: skip
def test_items_without_an_order_name_nothing(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="loss_positions: all"):
        model(loss_positions="all", **settings)
    assert not model(loss_positions="auto", **settings).supervise_history


def test_slots_read_the_last_item_shown() -> None:
    made = model(slot_input="last", targets="next")
    for batch in made.stage_batches("user_item_alignment", generator(1)):
        read = batch.ids.gather(1, batch.places)
        for row in range(len(batch.ids)):
            places = item_places(batch, row)
            before = [place for place in places if place < int(batch.places[row, 0])]
            token = int(batch.ids[row, before[-1]]) if before else made._writer.slot_id
            assert read[row].tolist() == [token] * SLOTS
    ranked = model(slot_input="last").full_sort_predict(interaction())
    assert torch.isfinite(ranked[:, 1:]).all()


def test_scattered_histories_hold_the_same_items_always_in_the_same_order() -> None:
    made = model(history_order="random", history_length=12)
    lists = interaction([1, 2])
    upside_down = {**lists, "item_id_list": lists["item_id_list"].clone()}
    upside_down["item_id_list"][0, :12] = lists["item_id_list"][0, :12].flip(0)
    first, second = made.full_sort_predict(lists), made.full_sort_predict(upside_down)
    torch.testing.assert_close(first, second)
    own = Ragged.from_lists([list(range(1, 13)), list(range(1, 13))])
    one, other = rows_of(sampling.scatter(own, torch.tensor([1, 2])))
    assert sorted(one) == sorted(other) == list(range(1, 13))
    assert one != other and one != sorted(one)


def test_a_hidden_user_is_padding() -> None:
    made = model(user_dropout=1.0, slot_input="user")
    for batch in made.stage_batches("user_item_alignment", generator()):
        assert not ((batch.ids < 0) & (-1 - batch.ids < len(batch.users))).any()
    half = model(user_dropout=0.5)
    shown = [
        (-1 - batch.ids[row] == row).any()
        for seed in range(30)
        for batch in half.stage_batches("user_item_alignment", generator(seed))
        for row in range(len(batch.ids))
    ]
    assert 0.4 < np.mean(shown) < 0.6


def test_without_a_language_model_a_state_is_the_mean_of_the_soft_tokens() -> None:
    made = model(reader="mean", history_length=3)
    batch = made.user_batch(torch.tensor([1]), generator())
    soft = made._soft_tokens(batch.users, batch.items)
    states = made._readers["user_item_alignment"].states(batch.ids, soft, batch.places)
    torch.testing.assert_close(states[0], soft.mean(0).expand(SLOTS, -1))
    ranked = made.full_sort_predict(interaction())
    assert torch.isfinite(ranked[:, 1:]).all()
    with pytest.raises(UserError, match="reader: llm"):
        model(reader="mean", inference="ar")


def test_only_the_last_items_of_a_history_count() -> None:
    made = model()
    given_items = interaction([1])
    before = made.full_sort_predict(given_items)
    other = {**given_items, "item_id_list": given_items["item_id_list"].clone()}
    other["item_id_list"][0, :7] = 1
    torch.testing.assert_close(made.full_sort_predict(other), before)
    other["item_id_list"][0, 7] = 1
    assert not torch.allclose(made.full_sort_predict(other)[:, 1:], before[:, 1:])


def test_prompts_that_do_not_fit_the_language_model_are_refused() -> None:
    from transformers import LlamaConfig, LlamaModel

    short = LlamaModel(LlamaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                   intermediate_size=32, max_position_embeddings=60))  # fmt: skip
    with pytest.raises(UserError, match="the language model has 60; lower history_length"):
        model(short.eval().requires_grad_(False))


# --- what is trained -------------------------------------------------------------------------------------------------

TRAINED = {
    "item_text_alignment": {"item_projector.weight", "item_projector.bias"},
    "user_item_alignment": {"user_projector.weight", "user_projector.bias"},
}
HEAD = {"free": {"gllm.weight", "gllm.bias"}, "tied": {"gllm.weight", "gllm.bias", "item_bias"}}


@pytest.mark.parametrize("gllm", ["free", "tied"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_nothing_but_the_named_parameters_moves(gllm: str, make: Any) -> None:
    made = model(make(), gllm=gllm, gllm_dropout=0.2)
    assert set(made.state_dict()) == TRAINED["item_text_alignment"] | TRAINED["user_item_alignment"] | HEAD[gllm]
    for stage in made.stages:
        parameters = made.begin_stage(stage)
        names = {name for name, weight in made.named_parameters() if weight.requires_grad}
        assert names == TRAINED[stage] | HEAD[gllm] and len(parameters) == len(names)
        frozen = {"users": made.user_embeddings, "items": made.item_embeddings}
        frozen |= {f"lm.{name}": weight for name, weight in made.backbone.decoder.named_parameters()}
        frozen |= {name: weight for name, weight in made.named_parameters() if name not in names}
        before = {name: weight.detach().clone() for name, weight in frozen.items()}
        trained = {name: weight.detach().clone() for name, weight in made.named_parameters() if name in names}
        # Weight decay as well: it would move even a parameter without gradient that the optimizer was given.
        optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
        made.train()
        for _, batch in zip(range(3), made.stage_batches(stage, generator()), strict=False):
            optimizer.zero_grad()
            made.stage_loss(stage, batch).backward()
            optimizer.step()
        for name, weight in frozen.items():
            assert torch.equal(weight, before[name]), name
            assert weight.grad is None or name in made.state_dict(), name
        for name, value in trained.items():
            assert not torch.equal(made.get_parameter(name), value), name


def test_the_gllm_is_carried_over_between_stages() -> None:
    made = model()
    before = made.gllm
    for stage in made.stages:
        made.begin_stage(stage)
    assert made.gllm is before


def test_calculate_loss_is_stage_3s_and_can_be_drawn_again() -> None:
    made = model()
    made.begin_stage("user_item_alignment")
    users = torch.tensor([1, 2, 5])
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(made.calculate_loss({"user_id": users}))
    assert losses[0].requires_grad and torch.equal(losses[0], losses[1])
    expected = made.stage_loss("user_item_alignment", made.user_batch(users, generator(3)))
    torch.testing.assert_close(losses[0], expected)


def test_the_loss_is_equation_3() -> None:
    made = model(gllm="tied")
    batch = made.user_batch(torch.tensor([1, 5]), generator())
    soft = made._soft_tokens(batch.users, batch.items)
    logits = made.item_logits(made._readers["user_item_alignment"].states(batch.ids, soft, batch.places))
    total, count = 0.0, 0
    for row in range(2):
        for slot in range(SLOTS):
            if (target := int(batch.targets[row, slot])) != -100:
                real = logits[row, slot, 1:]  # the padding item has no share
                total += float((torch.logsumexp(real, 0) - real[target - 1]).detach())
                count += 1
    assert count < 2 * SLOTS  # user 5 has one train item only
    assert made.stage_loss("user_item_alignment", batch).item() == pytest.approx(total / count, abs=1e-5)


def test_stages_2_and_3_learn() -> None:
    made = model(gllm="free")
    for stage in made.stages:
        optimizer = torch.optim.Adam(made.begin_stage(stage), lr=0.01)
        losses = []
        for epoch in range(80):
            for batch in made.stage_batches(stage, generator(epoch)):
                loss = made.stage_loss(stage, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert np.mean(losses[-5:]) < 0.9 * losses[0]


# --- ablations and settings ------------------------------------------------------------------------------------------


def test_without_item_alignment_stage_3_trains_both_projectors() -> None:
    made = model(item_alignment=False)
    assert made.stages == ("user_item_alignment",)
    made.begin_stage("user_item_alignment")
    assert all(weight.requires_grad for weight in made.parameters())


def test_without_user_alignment_the_users_name_stands_as_text() -> None:
    made = model(user_alignment=False)
    assert made.user_projector is None
    batch = made.user_batch(torch.tensor([3]), generator())
    name = made.backbone.encode("user_u3")
    assert batch.ids[0, : len(name)].tolist() == name and not len(batch.users)
    made.begin_stage("user_item_alignment")
    made.stage_loss("user_item_alignment", batch).backward()


def test_without_history_only_the_user_is_shown() -> None:
    made = model(history_input="none")
    batch = made.user_batch(torch.tensor([1, 2]), generator())
    assert not len(batch.items) and int((batch.ids < 0).sum()) == 2


def test_texts_stand_in_the_prompt_or_their_lines_are_left_out() -> None:
    made = model()
    ids = made.user_batch(torch.tensor([4]), generator()).ids[0].tolist()
    for text in ("tag 4", "wish 4, more"):
        piece = made.backbone.encode(text)
        assert any(ids[start : start + len(piece)] == piece for start in range(len(ids)))
    assert "tags" not in model(texts=False)._writer.prompts["user_item_alignment"].template


def test_learned_slot_inputs() -> None:
    made = model(slot_input="learned")
    assert set(made.state_dict()) >= {"slot_inputs"}
    for stage in made.stages:
        made.begin_stage(stage)
        made.stage_loss(stage, next(iter(made.stage_batches(stage, generator())))).backward()
        assert made.slot_inputs is not None and made.slot_inputs.grad is not None
    assert torch.isfinite(made.full_sort_predict(interaction())[:, 1:]).all()


@pytest.mark.parametrize("slot_input", ["auto", "user", "last", "pad", "learned", "item"])
def test_the_first_slot_reads_the_same_in_every_mode(slot_input: str) -> None:
    found = []
    for inference in ("fl", "ar"):
        made = model(slot_input=slot_input, inference=inference, response_slots=1, alignment_items_per_prompt=1)
        rows, items = seen([1, 2, 3])
        found.append(made.full_sort_predict_excluding(interaction([1, 2, 3]), rows, items, every_item()))
    assert torch.equal(found[0].argsort(1, descending=True), found[1].argsort(1, descending=True))


def test_user_slot_inputs_are_the_prompts_own_users_and_add_no_parameter() -> None:
    made = model(slot_input="user")
    assert set(made.state_dict()) == set(model().state_dict())
    batch = made.user_batch(torch.tensor([3, 1]), generator())
    inputs = batch.users[-1 - batch.ids.gather(1, batch.places)]
    assert inputs.tolist() == [[3] * SLOTS, [1] * SLOTS]
    closing = made.backbone.encode("/INST]")[-1]
    assert (batch.ids.gather(1, batch.places[:, :1] - 1) == closing).all()
    for settings in ({"user_alignment": False}, {}):
        other = model(slot_input="user", **settings)
        assert torch.isfinite(other.full_sort_predict(interaction())[:, 1:]).all()
        batch = other.alignment_batch(torch.tensor([[1, 2, 3]]), generator())
        assert (batch.ids.gather(1, batch.places[:, 1:]) == other.backbone.pad_id).all()


def test_item_slot_inputs_are_the_targets_before() -> None:
    made = model(slot_input="item", inference="ar")
    for stage in made.stages:
        batch = next(iter(made.stage_batches(stage, generator())))
        inputs = batch.items[-1 - batch.ids.gather(1, batch.places[:, 1:]) - len(batch.users)]
        known = batch.targets[:, :-1] != -100
        assert torch.equal(inputs[known], batch.targets[:, :-1][known])
    with pytest.raises(UserError, match="it needs inference: ar or fl"):
        model(slot_input="item", inference="first_k")


def test_a_history_longer_than_the_item_lists_is_refused() -> None:
    with pytest.raises(UserError, match="set MAX_ITEM_LIST_LENGTH to 60"):
        model(history_length=60)


def test_auto_targets_follow_the_split() -> None:
    assert model(eval_args={"order": "TO"}).by_time
    assert not model(eval_args={"order": "RO"}).by_time
    assert not model(targets="random").by_time


# --- ranking ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 500), st.integers(1, 5), st.floats(0, 1))
def test_first_k_names_the_slots_best_items_in_order(seed: int, slots: int, share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    # Few distinct values: slots that agree and ties are the rule here, as they are after training.
    log_probs = torch.randint(-9, 0, (3, slots, 12), generator=draw).float()
    allowed = torch.rand(3, 12, generator=draw) >= share
    allowed[:, 0] = False
    scores = first_k_scores(log_probs, allowed)
    assert torch.equal(scores > -torch.inf, allowed)
    for row in range(3):
        left = set(allowed[row].nonzero().squeeze(1).tolist())
        picked: list[int] = []
        for slot in range(min(slots, len(left))):
            best = max(float(log_probs[row, slot, item]) for item in left)
            # Only an order by score says which of the tied was picked; each must be among the best.
            pick = int(scores[row].argsort(descending=True, stable=True)[slot])
            assert pick in left and float(log_probs[row, slot, pick]) == best
            left.remove(pick)
            picked.append(pick)
        if picked and left:
            assert min(scores[row, picked]) > max(scores[row, list(left)])
        tail = log_probs[row].mean(0)
        for one in left:
            assert scores[row, one] == pytest.approx(float(tail[one]), abs=1e-6)


@pytest.mark.parametrize("inference", ["first_k", "fl", "ar"])
def test_scores_are_finite_where_allowed_and_excluded_elsewhere(inference: str) -> None:
    made = model(inference=inference, inference_batch_size=4)
    users = [1, 2, 3, 4, 5, 6]
    rows, items = seen(users)
    candidates = every_item()
    candidates[[0, 7, 8]] = False
    scores = made.full_sort_predict_excluding(interaction(users), rows, items, candidates)
    allowed = candidates.expand(6, -1).clone()
    allowed[rows, items] = False
    assert scores.shape == (6, N_ITEMS) and torch.equal(torch.isfinite(scores), allowed)
    assert not (scores == torch.inf).any() and not scores.isnan().any()
    again = made.full_sort_predict_excluding(interaction(users), rows, items, candidates)
    assert torch.equal(scores, again)
    one_by_one = [made.full_sort_predict_excluding(interaction([user]), *seen([user]), candidates) for user in users]
    torch.testing.assert_close(torch.cat(one_by_one), scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inference", ["first_k", "ar"])
def test_k_distinct_unseen_items_come_first(inference: str) -> None:
    made = model(inference=inference)
    users = [1, 2, 3, 4, 5, 6]
    rows, items = seen(users)
    scores = made.full_sort_predict_excluding(interaction(users), rows, items, every_item())
    top = scores.topk(SLOTS, 1).indices
    for row in range(6):
        assert len(set(top[row].tolist())) == SLOTS
        assert not set(top[row].tolist()) & ({0} | set(items[rows == row].tolist()))
    assert (scores.topk(SLOTS, 1).values > scores.sort(1, descending=True).values[:, SLOTS : SLOTS + 1]).all()


def test_fl_is_the_first_slots_order() -> None:
    made = model(inference="fl")
    one = model(inference="first_k", response_slots=1, alignment_items_per_prompt=1)
    one.load_state_dict(made.state_dict())
    rows, items = seen([1, 2, 3])
    scores = made.full_sort_predict_excluding(interaction([1, 2, 3]), rows, items, every_item())
    wanted = one.full_sort_predict_excluding(interaction([1, 2, 3]), rows, items, every_item())
    assert torch.equal(scores.topk(9, 1).indices, wanted.topk(9, 1).indices)
    # The same from the states at slot 0 by hand.
    users = torch.tensor([1])
    prompt = made._writer.user_prompts(users, Ragged.from_lists([histories().items[7:12].tolist()]))
    states = made._readers["user_item_alignment"].states(
        prompt.suffix.padded(2), made._soft_tokens(prompt.users, prompt.items), prompt.suffix.lengths.unsqueeze(1) - 1
    )
    torch.testing.assert_close(
        made.full_sort_predict(interaction([1]))[0, 1:], made.item_logits(states)[0, 0].log_softmax(0)[1:]
    )


def test_autoregressive_slots_read_the_items_named_before() -> None:
    made = model(inference="ar")
    scores = made.full_sort_predict(interaction([1]))
    picks = scores[0].topk(SLOTS).indices
    prompt = made._writer.user_prompts(torch.tensor([1]), Ragged.from_lists([histories().items[7:12].tolist()]))
    suffix, users, items = prompt.suffix, prompt.users, prompt.items
    for slot in range(SLOTS):
        soft_items = torch.cat([items, picks[:slot]])
        ids = torch.cat([suffix.values, -1 - len(users) - len(items) - torch.arange(slot)])[None]
        soft = made._soft_tokens(users, soft_items)
        state = made._readers["user_item_alignment"].states(ids, soft, torch.tensor([[ids.shape[1] - 1]]))
        log_probs = made.item_logits(state)[0, 0].clone()
        log_probs[picks[:slot]] = -torch.inf
        assert int(log_probs.argmax()) == int(picks[slot])


def test_predict_gives_the_scores_of_the_items_named() -> None:
    made = model()
    given_items = {**interaction([1, 2]), "item_id": torch.tensor([4, 9])}
    full = made.full_sort_predict(given_items)
    assert torch.equal(made.predict(given_items), full[torch.arange(2), torch.tensor([4, 9])])


def test_scoring_keeps_no_graph_and_moves_no_parameter() -> None:
    made = model()
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    scores = made.full_sort_predict(interaction())
    assert not scores.requires_grad
    assert all(torch.equal(weight, before[name]) for name, weight in made.state_dict().items())


def test_every_setting_of_the_prompt_and_the_head_is_shipped_and_read() -> None:
    folder = properties_dir().parent / "recbole_llm"
    source = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    recboles = "train_neg_sample_args loss_type epochs eval_step stopping_step learning_rate weight_decay".split()
    unread = [key for key in set(shipped()) - set(recboles) if f'"{key}"' not in source]
    assert not unread
