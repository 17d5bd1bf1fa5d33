"""Vectors as tokens: what the language model reads for them, what learns, and which user a vector is of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import SMALL
from test_aligntokenrec import OPTIONS
from test_glta import N_ITEMS, N_USERS, histories
from transformers import AutoModelForCausalLM

from recbole_llm.backbone.load import load_backbone
from recbole_llm.backbone.packed import PackedReader
from recbole_llm.backbone.projected_tokens import ProjectedTokens, read_projected
from recbole_llm.backbone.soft_tokens import token_scale
from recbole_llm.config import Config
from recbole_llm.data.histories import Histories
from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.decoding.head import Head
from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.training.collaborative_vectors import CollaborativeVectors, UserStates, UserTable
from recbole_llm.training.pipeline import fit, prepared, store_of
from recbole_llm.training.teacher import same_rows

DIM, HIDDEN = 6, 10


def vectors(seed: int = 2, rows: int = N_ITEMS) -> torch.Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))


USERS = vectors(3, N_USERS)


def users(numbers: torch.Tensor) -> torch.Tensor:
    return USERS[numbers]


def put(folder: Path, kind: str = "relu") -> tuple[Any, ProjectedTokens, int]:
    """A backbone that reads vectors, what makes their rows, and the first id of these."""
    torch.manual_seed(0)
    backbone = load_backbone(folder, **OPTIONS)
    first = backbone.embed_tokens.num_embeddings
    return backbone, read_projected(backbone.decoder, vectors(), users, kind, HIDDEN), first


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["gelu", "relu", "linear"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_an_id_is_read_as_the_projected_vector_that_transformers_is_given(
    kind: str, projector: str, folders: Callable[[str], Path]
) -> None:
    backbone, tokens, first = put(folders(kind), projector)
    rows = torch.tensor([[5, first + 3, 7, first + N_ITEMS + 2, first + 3], [first, 4, 6, 8, 9]])
    other = AutoModelForCausalLM.from_pretrained(folders(kind), dtype=torch.float32).eval()
    layers = [module for module in tokens.projector if isinstance(module, torch.nn.Linear)]
    assert len(layers) == (1 if projector == "linear" else 2)

    def projected(vector: torch.Tensor) -> torch.Tensor:
        made = layers[0].weight @ vector + layers[0].bias
        if projector == "linear":
            return made
        made = torch.relu(made) if projector == "relu" else made * torch.distributions.Normal(0, 1).cdf(made)
        return layers[1].weight @ made + layers[1].bias

    with torch.no_grad():
        embeds = other.get_input_embeddings()(rows.clamp(max=first - 1))
        embeds[0, 1] = embeds[0, 4] = projected(vectors()[3])
        embeds[0, 3] = projected(USERS[2])
        embeds[1, 0] = projected(vectors()[0])
        expected = other.base_model(inputs_embeds=embeds).last_hidden_state
        found = backbone.decoder(input_ids=rows).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        reader = PackedReader(backbone.decoder)
        at = torch.tensor([0, 0, 1]), torch.tensor([1, 4, 4])
        torch.testing.assert_close(reader.states(rows, *at), expected[at], rtol=1e-3, atol=1e-4)


def test_rows_have_the_size_of_tokens_and_are_made_of_what_a_batch_holds(folders: Callable[[str], Path]) -> None:
    backbone, tokens, first = put(folders("gemma"))
    made = tokens(torch.arange(N_ITEMS))
    plain = load_backbone(folders("gemma"), **OPTIONS)
    assert made.square().mean().sqrt().item() == pytest.approx(token_scale(plain.embed_tokens), rel=1e-4)
    asked: list[torch.Tensor] = []
    tokens.projector.register_forward_hook(lambda module, given, made: asked.append(given[0]))
    ids = torch.tensor([[first + 4, 3, first + 4, first + N_ITEMS + 1], [first + 2, 3, first + 4, 1]])
    backbone.decoder(input_ids=ids)
    (read,) = asked
    torch.testing.assert_close(read, torch.stack([vectors()[2], vectors()[4], USERS[1]]))
    backbone.decoder(input_ids=torch.tensor([[1, 2, 3]]))
    assert len(asked) == 1


def test_the_projector_learns_and_the_vectors_do_not(folders: Callable[[str], Path]) -> None:
    backbone, tokens, first = put(folders("llama"))
    before = tokens.items.clone()
    ids = torch.tensor([[5, first + 3, 7, first + N_ITEMS + 2]])
    backbone.decoder(input_ids=ids).last_hidden_state.sum().backward()
    weights = list(tokens.parameters())
    assert len(weights) == 4 and all(weight.grad is not None and weight.grad.any() for weight in weights)
    assert not tokens.items.requires_grad and not USERS.requires_grad
    assert set(tokens.state_dict()) == {f"projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    torch.optim.Adam(weights, lr=0.1).step()
    assert torch.equal(tokens.items, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mamba"])
def test_a_search_with_such_prompts_is_the_brute_force_over_all_items(
    kind: str, folders: Callable[[str], Path]
) -> None:
    backbone, tokens, first = put(folders(kind))
    model = AutoModelForCausalLM.from_pretrained(folders(kind), dtype=torch.float32).eval()
    head, end = Head.of(model), backbone.eos_id
    titles = ItemTokens.from_sequences([[], [5, 6], [5, 7], [8], [9, 10, 11], [5, 6, 12]], end)
    prompts = [[4, first + 3, 6], [7, first + N_ITEMS + 1, 9, first + 2, 3]]
    search = BeamSearch(
        backbone.decoder, head, titles, beams=5, lm_ids=titles.lm_ids, tie_order=torch.arange(titles.n_items)
    )
    found = search(prompts)
    for row, prompt in enumerate(prompts):
        scores = {}
        for item in range(1, titles.n_items):
            answer = titles.lm_ids[torch.tensor(titles.of(item))].tolist()
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                known = model.get_input_embeddings()(ids.clamp(max=first - 1))
                numbers = (ids[0] - first).clamp(min=0)
                own = torch.stack([tokens(number.view(1))[0] for number in numbers]).unsqueeze(0)
                logits = model(inputs_embeds=torch.where((ids >= first).unsqueeze(-1), own, known)).logits[0]
            told = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
            scores[item] = told[torch.arange(len(answer)), torch.tensor(answer)].sum().item()
        order = sorted(scores, key=lambda item: -scores[item])
        assert found.items[row].tolist() == order
        assert found.scores[row].tolist() == pytest.approx([scores[item] for item in order], rel=1e-3)


# --- users -----------------------------------------------------------------------------------------------------------


def world(items: np.ndarray | None = None) -> SimpleNamespace:
    own = histories()
    if items is not None:
        own = Histories(own.offsets, items)
    return SimpleNamespace(train_histories=own, uid_field="user_id")


def test_a_table_of_users_knows_whose_interaction_it_is() -> None:
    table = UserTable(USERS, world())
    owners = [user for user in range(N_USERS) for _ in range(*histories().offsets[user : user + 2].tolist())]
    assert table.at(torch.arange(len(owners))).tolist() == owners
    assert table.asked({"user_id": torch.tensor([3, 1])}).tolist() == [3, 1]
    rows = table(torch.arange(N_USERS))
    # Users 1 to 5 have train items; of the others the recommender has learned nothing.
    assert not rows[[0, *range(6, N_USERS)]].any()
    assert rows[1:6].mean(0).abs().max() < 1e-5 and rows[1:6].square().mean() == pytest.approx(1, rel=1e-4)
    differences = (rows - rows[1]) / (USERS - USERS[1]).where(USERS != USERS[1], 1)
    assert differences[2:6].std() < 1e-4


def trained(settings_of: Callable[..., dict[str, Any]], model: str, **more: Any) -> Any:
    config = Config(
        model, "small", config_dict=settings_of(**SMALL.get(model, {}) | {"epochs": 1, "eval_step": 0} | more)
    )
    return fit(config, store_of(config))


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
def test_a_users_state_is_that_before_his_item_whatever_comes_after(
    model: str, settings_of: Callable[..., dict[str, Any]]
) -> None:
    made = trained(settings_of, model)
    dataset = made.train_data._dataset
    owned = dataset.train_histories
    states = UserStates(made.model.eval(), dataset, 8)
    offsets, items = torch.from_numpy(owned.offsets), torch.from_numpy(owned.items).long()
    user = int(owned.lengths.argmax())
    start, stop = offsets[user : user + 2].tolist()
    moments = torch.arange(start + 1, stop)
    before = states.states(moments)
    # By plain means: the model asked alone with what stands before each, at most the last 8.
    for moment, state in zip(moments.tolist(), before):
        history = items[max(start, moment - 8) : moment].unsqueeze(0)
        with torch.no_grad():
            alone = made.model(
                torch.nn.functional.pad(history, (0, 10 - history.shape[1])), torch.tensor([history.shape[1]])
            )
        torch.testing.assert_close(state, alone[0], rtol=1e-4, atol=1e-5)
    # Another item in the middle: what came before it has the same vector, and what follows another.
    middle = (start + stop) // 2
    changed = owned.items.copy()
    changed[middle] = changed[middle] % (made.model.n_items - 1) + 1
    other = SimpleNamespace(train_histories=Histories(owned.offsets, changed), uid_field="user_id")
    after = UserStates(made.model, other, 8).states(moments)
    assert torch.equal(before[moments <= middle], after[moments <= middle])
    assert not torch.allclose(before[middle - start], after[middle - start])


def test_who_is_asked_has_the_state_of_the_history_that_is_handed_over(
    settings_of: Callable[..., dict[str, Any]],
) -> None:
    made = trained(settings_of, "SASRec")
    dataset = made.train_data._dataset
    states = UserStates(made.model.eval(), dataset, 5)
    interaction = next(iter(made.valid_data))[0]
    numbers = states.asked(interaction)
    assert numbers.min() >= len(dataset.train_histories.items) and len(set(numbers.tolist())) == len(numbers)
    owned = dataset.train_histories
    for number, user in zip(numbers, interaction["user_id"].tolist()):
        # At validation the history is all train rows: that is what stands before an interaction that is none of them.
        own = torch.from_numpy(owned.items[owned.offsets[user] : owned.offsets[user + 1]][-5:]).long()
        with torch.no_grad():
            alone = made.model(torch.nn.functional.pad(own.unsqueeze(0), (0, 10 - len(own))), torch.tensor([len(own)]))[
                0
            ]
        expected = (alone - states._mean) / states._size
        torch.testing.assert_close(states(number.view(1))[0], expected, rtol=1e-4, atol=1e-5)
    mixed = torch.cat([torch.tensor([1]), numbers[:1]])
    torch.testing.assert_close(states(mixed), torch.cat([states(mixed[:1]), states(mixed[1:])]))


@pytest.mark.parametrize("model", ["SASRec", "LightGCN", "BPR"])
def test_items_are_centred_and_those_without_train_rows_stand_in_the_middle(
    model: str, settings_of: Callable[..., dict[str, Any]]
) -> None:
    made = trained(settings_of, model)
    dataset = made.train_data._dataset
    found = CollaborativeVectors(made, dataset)
    seen = torch.zeros(dataset.item_num, dtype=torch.bool)
    seen[torch.from_numpy(dataset.train_histories.items)] = True
    assert found.items.dtype == torch.float32 and not found.items[~seen].any()
    assert found.items[seen].mean(0).abs().max() < 1e-4
    assert found.items[seen].square().mean().item() == pytest.approx(1, rel=1e-3)
    assert all(not weight.requires_grad for weight in made.model.parameters())
    some = found.users(5)(found.users(5).at(torch.tensor([2, 3])))
    assert some.shape == (2, found.items.shape[1]) and some.isfinite().all() and not some.requires_grad


def test_what_has_no_vectors_or_other_rows_is_refused(settings_of: Callable[..., dict[str, Any]]) -> None:
    bert = trained(settings_of, "BERT4Rec")
    with pytest.raises(UserError, match=r"embedding_model: BERT4Rec makes no one vector of a history.*SASRec"):
        CollaborativeVectors(bert, bert.train_data._dataset).users(5)
    wide = trained(settings_of, "LightGCN")
    found = CollaborativeVectors(wide, wide.train_data._dataset)
    users, items = wide.model.graph_embeddings()
    wide.model.graph_embeddings = lambda: (users, items[:, 1:])
    with pytest.raises(UserError, match="64 numbers for a user and 63 for an item"):
        found.users(5)
    ease = trained(settings_of, "EASE")
    with pytest.raises(UserError, match="EASE has no"):
        CollaborativeVectors(ease, ease.train_data._dataset)
    half = Config("BPR", "small", config_dict=settings_of(train_share=0.5))
    other = prepared(half)[1]._dataset
    assert not same_rows(bert.train_data._dataset, other)
    with pytest.raises(UserError, match="BERT4Rec was trained on other rows"):
        CollaborativeVectors(bert, other)
