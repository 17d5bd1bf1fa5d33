"""FMLP-Rec: its filter against sums written out, who sees whom, losses and scores against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from test_fast_baselines import (
    FIELDS,
    LENGTH,
    LENGTHS,
    N_ITEMS,
    N_USERS,
    SEQUENCE,
    dataset,
    pairs,
    seeded,
    sequences,
    share_learnt,
    without_dropout,
)

from recbole_llm.config import Config
from recbole_llm.data.histories import Histories
from recbole_llm.errors import UserError
from recbole_llm.model.fmlp import FMLP, FilterLayer
from recbole_llm.model.fmlp_all_positions import FMLPAllPositions

CAUSAL = {"filter": "causal"}


def made(cls: type = FMLP, **more: Any) -> Any:
    """A model with filters as large as its embeddings, so that what they mix shows, and biases that are not zero."""
    data = dataset()
    data.train_histories = Histories.from_rows(*pairs(), N_USERS)
    data.split = SimpleNamespace(candidates=np.ones(N_ITEMS, dtype=bool))
    own = {"filter": "original", "loss_type": "BCE", "negatives": 1, "seed": 3}
    model = seeded(lambda: cls({**FIELDS, **SEQUENCE, **own, **more}, data))
    for name, weight in model.named_parameters():
        if "complex_weight" in name or name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def layer(length: int, width: int, causal: bool) -> FilterLayer:
    made = seeded(lambda: FilterLayer(length, width, 0.0, 1e-12, causal)).double()
    torch.nn.init.normal_(made.complex_weight)
    return made


def written_out(weight: np.ndarray, x: np.ndarray, causal: bool) -> np.ndarray:
    """The filter without any transform: the kernel by its Fourier sum, then one product an (output, input) pair.

    Args:
        weight: complex ``[L // 2 + 1, H]``; the other half of the spectrum is its mirror image.
        x: ``[L, H]``.
        causal: leave out every input behind its output.
    """
    length = len(x)
    kernel = np.zeros_like(x)
    for step in range(length):
        for frequency in range(length):
            half = weight[frequency] if frequency <= length // 2 else weight[length - frequency].conj()
            # What a real signal cannot have an imaginary part of.
            half = half.real if frequency in (0, length / 2) else half
            kernel[step] += (half * np.exp(2j * np.pi * frequency * step / length)).real / length
    mixed = np.zeros_like(x)
    for target in range(length):
        for source in range(target + 1 if causal else length):
            mixed[target] += kernel[(target - source) % length] * x[source]
    return mixed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_the_filter_is_a_convolution_written_out(length: int, causal: bool) -> None:
    filtering = layer(length, 3, causal)
    x = torch.randn(4, length, 3, dtype=torch.float64)
    weight = torch.view_as_complex(filtering.complex_weight[0]).detach().numpy()
    expected = np.stack([written_out(weight, row, causal) for row in x.numpy()])
    np.testing.assert_allclose(filtering.mix(x).detach().numpy(), expected, atol=1e-12)
    # And the layer around it: residual, then a normalisation that starts as the plain one.
    summed = expected + x.numpy()
    normal = (summed - summed.mean(-1, keepdims=True)) / np.sqrt(summed.var(-1, keepdims=True) + 1e-12)
    np.testing.assert_allclose(filtering(x).detach().numpy(), normal, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_the_filter(causal: bool) -> None:
    filtering = layer(5, 2, causal)
    x = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(filtering, {"complex_weight": weight}, (x,))

    weight = filtering.complex_weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, weight))


def test_a_layer_asked_for_some_positions_gives_the_same_there() -> None:
    filtering, x = layer(6, 3, False), torch.randn(4, 6, 3, dtype=torch.float64)
    positions = torch.tensor([[0, 5], [3, 3], [1, 2], [5, 4]])
    whole = filtering(x)
    torch.testing.assert_close(filtering(x, positions), torch.stack([whole[row, positions[row]] for row in range(4)]))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_later_item_moves_an_earlier_output_of_the_causal_filter(data: st.DataObject) -> None:
    model = made(FMLPAllPositions, **CAUSAL).double()
    width = data.draw(st.integers(2, LENGTH))
    items = st.lists(st.integers(1, N_ITEMS - 1), min_size=width, max_size=width)
    first, other = data.draw(items), data.draw(items)
    kept = data.draw(st.integers(1, width - 1))
    outputs = model.encode_all(torch.tensor([first, first[:kept] + other[kept:]]))
    torch.testing.assert_close(outputs[0, :kept], outputs[1, :kept], atol=1e-12, rtol=0)
    # Nor does their absence: the output is that of the prefix alone.
    prefix = torch.tensor([first[:kept] + [0] * (LENGTH - kept)])
    alone = model.forward(prefix, torch.tensor([kept]))[0]
    torch.testing.assert_close(alone, outputs[0, kept - 1], atol=1e-12, rtol=0)


def test_the_original_filter_does_look_ahead() -> None:
    """Which is why it is trained at the last position only, and what the test above would catch."""
    model = made().double()
    row = torch.arange(1, LENGTH + 1)
    other = row.clone()
    other[-1] = N_ITEMS - 1
    hidden = model.blocks[0](model.embed(torch.stack([row, other])))
    assert (hidden[0, 0] - hidden[1, 0]).abs().max() > 1e-3


def plainly(model: Any, items: list[int]) -> torch.Tensor:
    """The output at the last item of one history, with the filter written out."""
    causal = model.causal
    row = items if causal else [0] * (LENGTH - len(items)) + items
    hidden = model.item_embedding.weight[row] + model.position_embedding.weight[: len(row)]
    hidden = model.LayerNorm(hidden)
    for block in model.blocks:
        weight = torch.view_as_complex(block.filter_layer.complex_weight[0]).detach().numpy()
        # The kernel has as many steps as the model has places, however short the history is.
        filled = np.zeros((LENGTH, hidden.size(1)))
        filled[: len(row)] = hidden.detach().numpy()
        mixed = torch.from_numpy(written_out(weight, filled, causal)[: len(row)])
        hidden = block.filter_layer.LayerNorm(mixed + hidden)
        inner = block.feed_forward
        hidden = inner.LayerNorm(hidden + inner.dense_2(F.gelu(inner.dense_1(hidden))))
    return hidden[-1]


@pytest.mark.parametrize("filtering", ["original", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_scores_are_those_of_each_history_alone(lengths: list[int], filtering: str) -> None:
    model, batch = made(filter=filtering).double(), sequences(lengths)
    histories = [row[:end].tolist() for row, end in zip(batch["item_id_list"], lengths, strict=True)]
    expected = torch.stack([model.item_embedding.weight @ plainly(model, items) for items in histories])
    scores = model.full_sort_predict(batch)
    torch.testing.assert_close(scores, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(model.predict(batch), scores.gather(1, batch["item_id"][:, None]).squeeze(1))
    # Nor does it matter how many empty places the rows come with.
    narrow = batch["item_id_list"][:, : max(lengths)]
    torch.testing.assert_close(model.forward(narrow, batch["item_length"]), model.forward(*rows_of(batch)))


def rows_of(batch: Interaction) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["item_id_list"], batch["item_length"]


def test_items_stand_at_the_end() -> None:
    rows = torch.tensor([[4, 5, 6, 0], [7, 0, 0, 0], [1, 2, 3, 8]])
    aligned = made().at_the_end(rows, torch.tensor([3, 1, 4]))
    assert aligned.shape == (3, LENGTH) and (aligned[:, :-4] == 0).all()
    assert aligned[:, -4:].tolist() == [[0, 4, 5, 6], [0, 0, 0, 7], [1, 2, 3, 8]]


@pytest.mark.parametrize("filtering", ["original", "causal"])
@pytest.mark.parametrize("loss_type", ["BCE", "CE"])
def test_the_loss_is_a_plain_loop(loss_type: str, filtering: str) -> None:
    model, batch = made(filter=filtering, loss_type=loss_type).double(), sequences(LENGTHS[2])
    table, total = model.item_embedding.weight, torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(LENGTHS[2]):
        scores = table @ model.forward(batch["item_id_list"][row : row + 1], torch.tensor([length]))[0]
        wanted, refused = batch["item_id"][row], batch["neg_item_id"][row]
        if loss_type == "CE":
            total = total + scores.logsumexp(0) - scores[wanted]
        else:
            total = total - torch.sigmoid(scores[wanted]).log() - (1 - torch.sigmoid(scores[refused])).log()
    without_dropout(model)
    loss, expected = model.calculate_loss(batch), total / len(LENGTHS[2])
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    # Nothing before the last position of the last block is needed, and all of it is learnt through that one.
    for name, weight in model.named_parameters():
        both = [torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (loss, expected)]
        torch.testing.assert_close(*both, atol=1e-9, rtol=1e-7)
        assert both[0].abs().max() > 0, name


@pytest.mark.parametrize("loss_type", ["BCE", "CE"])
def test_all_positions_have_the_loss_of_one_row_a_prefix(loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    windowed, single = (made(cls, loss_type=loss_type, **CAUSAL).double() for cls in (FMLPAllPositions, FMLP))
    assert all(torch.equal(*both) for both in zip(windowed.parameters(), single.parameters(), strict=True))
    without_dropout(windowed, single)
    batch, prefixes, wanted, refused = sequences(LENGTHS[2]), [], [], []
    targets = torch.zeros_like(batch["item_id_list"])
    for row, length in enumerate(LENGTHS[2]):
        for end in range(1, length + 1):
            targets[row, end - 1] = (row * 7 + end) % (N_ITEMS - 1) + 1
            prefixes.append(F.pad(batch["item_id_list"][row, :end], (0, LENGTH - end)))
            wanted.append(targets[row, end - 1])
            refused.append((row + 1) * 5)
    # Negatives that tell their user.
    monkeypatch.setattr(windowed, "draw", lambda users: users[:, None] * 5)
    batch.update(Interaction({"target_list": targets, "user_id": torch.arange(1, len(LENGTHS[2]) + 1)}))
    rows = torch.stack(prefixes)
    expected = single.calculate_loss(Interaction({
        "item_id_list": rows, "item_length": (rows != 0).sum(1), "item_id": torch.stack(wanted),
        "neg_item_id": torch.tensor(refused),
    }))  # fmt: skip
    torch.testing.assert_close(windowed.calculate_loss(batch), expected, atol=1e-10, rtol=1e-10)


def test_initial_values_are_the_authors() -> None:
    model = seeded(lambda: FMLP({**FIELDS, **SEQUENCE, "filter": "original", "loss_type": "BCE"}, dataset()))
    weights = torch.cat([block.filter_layer.complex_weight.flatten() for block in model.blocks])
    assert weights.shape == (2 * (LENGTH // 2 + 1) * SEQUENCE["hidden_size"] * 2,)
    assert abs(weights.std().item() - 0.02) < 0.002
    assert abs(model.blocks[0].feed_forward.dense_1.weight.std().item() - SEQUENCE["initializer_range"]) < 0.03
    assert all(not module.bias.any() for module in model.modules() if isinstance(module, torch.nn.Linear))


def test_learns_a_cycle() -> None:
    quiet = {"hidden_size": 32, "initializer_range": 0.02, "hidden_dropout_prob": 0.1, "loss_type": "CE", **CAUSAL}
    assert share_learnt(made(FMLPAllPositions, **quiet), steps=150) > 0.9


class TestRefused:
    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"filter": "casual"}, "filter should be original or causal, but is 'casual'"),
            ({"loss_type": "BPR"}, "loss_type should be BCE or CE, but is 'BPR'"),
        ],
    )
    def test_unknown_choices(self, more: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            made(**more)

    def test_all_positions_with_the_original_filter(self) -> None:
        with pytest.raises(UserError, match="training at all positions needs filter: causal, not 'original'"):
            made(FMLPAllPositions)

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"filter": "casual"}, "filter should be str: original | causal, but is 'casual'"),
            ({"filter": "original", "train_positions": "all"}, "filter should be str: causal, but is 'original'"),
            ({"negatives": 2}, "unknown setting 'negatives' for FMLP"),
            ({"train_neg_sample_args": None}, "FMLP learns from negatives, and train_neg_sample_args would draw none"),
        ],
    )
    def test_before_any_work(self, more: dict[str, Any], said: str, settings_of: Callable[..., dict[str, Any]]) -> None:
        with pytest.raises(UserError) as error:
            Config("FMLP", "small", config_dict=settings_of(**more))
        assert said in str(error.value) and "\n" not in str(error.value)


def test_all_positions_is_its_own_named_variant(settings_of: Callable[..., dict[str, Any]]) -> None:
    config = Config("FMLP", "small", config_dict=settings_of(train_positions="all"))
    assert (config["model"], config["filter"], config["hidden_size"]) == ("FMLPAllPositions", "causal", 64)
    plain = Config("FMLP", "small", config_dict=settings_of(filter="causal"))
    assert (plain["model"], plain["train_neg_sample_args"]["sample_num"]) == ("FMLP", 1)
