"""SASRec whose items are sums of code embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fast_baselines import FIELDS, N_ITEMS, SEQUENCE, dataset, seeded, share_learnt

from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.sasrec_all_positions import SASRecAllPositions
from recbole_llm.model.sasrec_codes import CodeEmbedding, SASRecCodes


def codes() -> torch.Tensor:
    """Items as two digits; no two alike."""
    items = torch.arange(N_ITEMS)
    table = torch.stack([items // 7, items % 7], dim=1)
    table[0] = -1
    return table


def made(tokens: ItemTokens, item_input: str = "codes", **more: Any) -> SASRecCodes:
    settings = {**FIELDS, **SEQUENCE, "item_input": item_input, "hidden_size": 32, "initializer_range": 0.02, **more}

    def make() -> SASRecCodes:
        model = SASRecCodes(settings, dataset())
        model.take_item_tokens(tokens)
        return model

    return seeded(make)


@pytest.mark.parametrize("own", [False, True])
def test_an_item_is_the_sum_of_its_codes(own: bool) -> None:
    torch.manual_seed(0)
    tokens = ItemTokens.from_codes(codes(), [6, 7])
    padded, _ = tokens.padded(torch.arange(N_ITEMS))
    table = CodeEmbedding(padded, tokens.size, 5, own, 0.02)
    weight = table.weight
    for item in range(1, N_ITEMS):
        first, second = codes()[item].tolist()
        expected = table.codes.weight[1 + first] + table.codes.weight[1 + 6 + second]
        if own:
            expected = expected + table.items.weight[item]
        torch.testing.assert_close(weight[item], expected)
    assert (weight[0] == 0).all()
    items = torch.tensor([[3, 0], [9, 3]])
    torch.testing.assert_close(table(items), weight[items])
    weight.sum().backward()
    assert (table.codes.weight.grad[0] == 0).all()


def test_items_share_what_their_codes_learn() -> None:
    model = made(ItemTokens.from_codes(codes(), [6, 7]))
    assert sum(weight.numel() for weight in model.item_embedding.parameters()) == 32 * (1 + 6 + 7)
    names = dict(model.named_parameters())
    assert "item_embedding.codes.weight" in names and "item_embedding.weight" not in names
    assert share_learnt(model, steps=300) > 0.9


def test_raw_ids_are_plain_sasrec() -> None:
    model = made(ItemTokens.raw(N_ITEMS))
    plain = seeded(lambda: SASRecAllPositions({**FIELDS, **SEQUENCE, "hidden_size": 32}, dataset()))
    count = [sum(weight.numel() for weight in one.parameters()) for one in (model, plain)]
    assert count[0] - count[1] == 0
    with torch.no_grad():
        state = plain.state_dict()
        rows = torch.zeros_like(model.item_embedding.codes.weight)
        # Token i - 1 is item i, and row 0 is nobody's.
        rows[1:] = state["item_embedding.weight"][1:]
        own = {name: value for name, value in state.items() if name != "item_embedding.weight"}
        model.load_state_dict({**own, "item_embedding.codes.weight": rows})
    model.eval()
    plain.eval()
    batch = {"item_id_list": torch.tensor([[3, 5, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0]]), "item_length": torch.tensor([3])}
    torch.testing.assert_close(model.full_sort_predict(batch)[:, 1:], plain.full_sort_predict(batch)[:, 1:])


def test_an_embedding_of_its_own_tells_items_with_equal_codes_apart() -> None:
    table = codes()
    table[9] = table[8]
    tokens = ItemTokens.from_codes(table, [6, 7])
    alike, apart = made(tokens), made(tokens, "codes_and_id")
    assert torch.equal(alike.item_embedding.weight[8], alike.item_embedding.weight[9])
    assert not torch.equal(apart.item_embedding.weight[8], apart.item_embedding.weight[9])
