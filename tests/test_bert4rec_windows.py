"""BERT4Rec on whole windows: what is masked, what the loss is, what is asked of it when ranking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from test_fast_baselines import (
    FIELDS,
    LENGTH,
    N_ITEMS,
    SEQUENCE,
    RecBoleBERT4Rec,
    dataset,
    seeded,
    share_learnt,
    without_dropout,
)

from recbole_llm.errors import UserError
from recbole_llm.model.bert4rec_windows import BERT4RecWindows

NAMES = {"MASK_ITEM_SEQ": "Mask", "POS_ITEMS": "Pos", "NEG_ITEMS": "Neg", "MASK_INDEX": "MASK"}


def made(**settings: Any) -> BERT4RecWindows:
    return seeded(lambda: BERT4RecWindows({**FIELDS, **SEQUENCE, **NAMES, "ft_ratio": 0.2, **settings}, dataset()))


def window(lengths: list[int]) -> tuple[Interaction, list[torch.Tensor]]:
    """Windows as the loader cuts them, and the whole sequence of each, an item longer than its inputs."""
    draw = torch.Generator().manual_seed(3)
    whole = [torch.randint(1, N_ITEMS, (length + 1,), generator=draw) for length in lengths]
    batch = Interaction({
        "item_id_list": torch.stack([F.pad(row[:-1], (0, LENGTH + 1 - len(row))) for row in whole]),
        "target_list": torch.stack([F.pad(row[1:], (0, LENGTH + 1 - len(row))) for row in whole]),
        "item_length": torch.tensor(lengths),
    })  # fmt: skip
    return batch, whole


@pytest.mark.parametrize("lengths", [[3, 7, 1, 5], [LENGTH] * 3, [LENGTH, 2, LENGTH - 1, 1, 6, 4, 9, 3, 2]])
def test_the_loss_is_cross_entropy_at_masked_places_of_recboles_own_encoder(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made()
    without_dropout(model)
    batch, whole = window(lengths)
    # Masked by an item's own number, so that the mask is the same whatever rows are computed together.
    rows = [row[-LENGTH:] for row in whole]
    seen: list[int] = []

    def mask(filled: torch.Tensor, width: int) -> torch.Tensor:
        seen.extend(filled.tolist())
        return (torch.arange(width) % 3 == 1) & (torch.arange(width) < filled.unsqueeze(1))

    monkeypatch.setattr(model, "mask", mask)
    losses = []
    for row in rows:
        hidden = torch.arange(len(row)) % 3 == 1
        padded = F.pad(row.masked_fill(hidden, N_ITEMS), (0, LENGTH - len(row)))
        logits = RecBoleBERT4Rec.forward(model, padded[None])[0, : len(row)] @ model.item_embedding.weight[:-1].t()
        chosen = F.log_softmax(logits + model.output_bias, dim=-1).gather(1, row[:, None]).squeeze(1)
        losses.extend((-chosen[hidden]).unbind())
    expected = torch.stack(losses).mean()
    loss = model.calculate_loss(batch)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert sorted(seen) == sorted(len(row) for row in rows)
    weight = model.item_embedding.weight
    grads = [torch.autograd.grad(value, weight)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_masks_hide_the_asked_share_and_never_nothing() -> None:
    model, lengths = made(mask_ratio=0.4, ft_ratio=0.0), torch.tensor([12, 5, 1, 2]).repeat(4000)
    torch.manual_seed(1)
    masked = model.mask(lengths, 12)
    filled = torch.arange(12) < lengths.unsqueeze(1)
    assert not (masked & ~filled).any() and masked.any(dim=1).all()
    long = masked[lengths == 12].float().mean().item()
    assert abs(long - 0.4) < 0.01
    # Two items, of which none was drawn with probability .36: then the last one is masked.
    pair = masked[lengths == 2][:, :2].float().mean(dim=0)
    assert abs(pair[0].item() - 0.4) < 0.03 and abs(pair[1].item() - (0.4 + 0.36)) < 0.03


def test_some_windows_are_masked_as_in_a_ranking() -> None:
    model, lengths = made(mask_ratio=0.5, ft_ratio=0.25), torch.full((8000,), 12)
    torch.manual_seed(2)
    masked = model.mask(lengths, 12)
    only_last = masked[:, -1] & (masked.sum(dim=1) == 1)
    assert abs(only_last.float().mean().item() - 0.25) < 0.02
    model.ft_ratio = 1.0
    masked = model.mask(torch.tensor([4, 12]), 12)
    assert masked.nonzero().tolist() == [[0, 3], [1, 11]]


def test_ranking_masks_after_the_last_item_and_drops_the_first_where_full() -> None:
    model = made()
    rows = torch.zeros(2, LENGTH, dtype=torch.int64)
    rows[0, :3] = torch.tensor([4, 5, 6])
    rows[1] = torch.arange(1, LENGTH + 1)
    asked = model.reconstruct_test_data(rows, torch.tensor([3, LENGTH]))
    assert asked[0].tolist() == [4, 5, 6, N_ITEMS] + [0] * (LENGTH - 4)
    assert asked[1].tolist() == [*range(2, LENGTH + 1), N_ITEMS]


def test_learns_a_cycle_and_scores_agree() -> None:
    model = made(hidden_size=32, initializer_range=0.02, hidden_dropout_prob=0.1, attn_dropout_prob=0.1)
    assert share_learnt(model, steps=300) > 0.9
    batch, _ = window([5, LENGTH])
    scores = model.full_sort_predict(batch)
    batch["item_id"] = torch.tensor([7, 9])
    torch.testing.assert_close(model.predict(batch), scores[[0, 1], [7, 9]])


def test_refuses_pairwise_loss() -> None:
    with pytest.raises(UserError, match="loss_type CE, not BPR"):
        made(loss_type="BPR")
