"""``packing: user``: all prefixes of a user in one sequence learn what they would one by one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_tca4rec
import test_title_bases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL
from test_aligntokenrec import N_ITEMS, build, loader, shipped
from test_glta import histories
from test_packed import ROW_BY_ROW, padded, read_alone
from tiny_folders import KINDS
from torch.nn import functional

from recbole_llm.backbone import tree_attention
from recbole_llm.backbone.load import load_backbone
from recbole_llm.backbone.packed import PackedReader, Tree
from recbole_llm.backbone.tree_attention import Layout, Whole, ends_of, laid_out
from recbole_llm.config import Config
from recbole_llm.data.prompts import Ragged
from recbole_llm.data.task_loader import window_groups
from recbole_llm.errors import UserError
from recbole_llm.model.aligntokenrec import FINE_TUNING
from recbole_llm.model.msl import MSL
from recbole_llm.model.tca4rec import TCA4Rec
from recbole_llm.tasks import TaskTexts, number
from recbole_llm.tasks.base import DRAW
from recbole_llm.tasks.behaviour import NEGATIVE, SEQUENTIAL
from recbole_llm.tasks.language import TEXT
from recbole_llm.training.pipeline import fit, store_of

# As they differ in positions, heads that share keys, windows and scales of attention.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma3", "mistral", "gpt2")
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=9)


def lengths_of(prompts: list[list[int]]) -> torch.Tensor:
    return torch.tensor([len(prompt) for prompt in prompts])


@pytest.fixture
def bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bins wherever prompts share something, in chunks that small prompts have several of."""
    monkeypatch.setattr(tree_attention, "MASKED", 0.0)
    monkeypatch.setattr(tree_attention, "CHUNK", 5)


# --- attention -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(PROMPTS, st.sampled_from([None, 1, 3]), st.sampled_from([1, 4, 256]), st.booleans())
def test_a_node_sees_the_way_to_it_and_nothing_else(
    prompts: list[list[int]], window: int | None, chunk: int, binned: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "CHUNK", chunk)
        patch.setattr(tree_attention, "MASKED", 0.0 if binned else 1e9)
        tree = Tree.of(padded(prompts), lengths_of(prompts))
        layout = laid_out(tree, lengths_of(prompts))
    shared = len(tree.places) < int(lengths_of(prompts).sum())
    assert not binned or not shared or layout.ends is not None
    ways = {}
    for row, prompt in enumerate(prompts):
        for place in range(len(prompt)):
            way = tree.nodes[row, : place + 1].tolist()
            ways[way[-1]] = sorted(way if window is None else way[-window:])
    width = layout.nodes.shape[1]
    seen = layout.sees(0, width, window)
    seen = torch.ones(1, 1, width, width).tril().bool() if seen is None else seen
    seen = seen.expand(len(layout.nodes), 1, width, width)[:, 0]
    assert seen.any(2).all()
    for node, owner in enumerate(layout.owners.tolist()):
        group, place = divmod(owner, width)
        assert int(layout.nodes[group, place]) == node
        assert layout.nodes[group][seen[group, place]].tolist() == ways[node]


@settings(deadline=None, max_examples=40)
@given(PROMPTS, st.sampled_from([None, 2]))
def test_all_nodes_at_once_attend_as_rows_do(prompts: list[list[int]], window: int | None) -> None:
    lengths = lengths_of(prompts)
    tree = Tree.of(padded(prompts), lengths)
    count = len(tree.places)
    query, key, value = (torch.randn(1, heads, count, 16) for heads in (4, 2, 2))
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    rows = Layout(tree.nodes, tree.owners).attend(module, query, key, value, window, scaling=0.3)
    with torch.no_grad():
        whole = Whole(ends_of(tree.nodes, lengths, count), tree.places).attend(
            module, query, key, value, window, scaling=0.3
        )
    torch.testing.assert_close(whole, rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ROW_BY_ROW])
@pytest.mark.usefixtures("bins")
def test_bins_have_the_states_and_gradients_of_prompts_read_alone(kind: str, folders: Any) -> None:
    decoder: Any = load_backbone(folders(kind)).decoder.requires_grad_(True)
    torch.manual_seed(0)
    trunk = torch.randint(1, 40, (24,)).tolist()
    prompts = [[*trunk[:cut], 41, 42, token] for cut, token in ((6, 5), (12, 5), (12, 6), (18, 7), (24, 8))]
    prompts += [[1, *trunk[:7]], trunk[:4]]
    rows = torch.arange(len(prompts)).repeat_interleave(2)
    places = torch.stack([lengths_of(prompts) - 2, lengths_of(prompts) - 1], dim=1).flatten()
    layout = laid_out(Tree.of(padded(prompts), lengths_of(prompts)), lengths_of(prompts))
    assert layout.ends is not None and len(layout.nodes) < len(prompts)
    wanted = torch.randn(len(rows), decoder.config.hidden_size)
    alone = read_alone(decoder, prompts, rows, places)
    expected = torch.autograd.grad((alone * wanted).sum(), list(decoder.parameters()))
    found = PackedReader(decoder).states(padded(prompts), rows, places)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    made = torch.autograd.grad((found * wanted).sum(), list(decoder.parameters()))
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-6)


def test_what_is_less_work_is_done() -> None:
    trunk = list(range(3, 400))
    prefixes = [[*trunk[: 10 * cut], 1, 2] for cut in range(10, 40)]
    assert laid_out(Tree.of(padded(prefixes), lengths_of(prefixes)), lengths_of(prefixes)).ends is not None
    strangers = [[user, *trunk[:50]] for user in range(500, 530)]
    assert laid_out(Tree.of(padded(strangers), lengths_of(strangers)), lengths_of(strangers)).ends is None


# --- the loss --------------------------------------------------------------------------------------------------------


def separate_loss(model: Any, made: Any) -> torch.Tensor:
    """The mean over labels, each prompt read by itself and row by row."""
    losses = []
    for row in range(len(made.ids)):
        here = made.rows == row
        end = int(made.places[here].max()) + 1
        states = model.backbone.decoder(input_ids=made.ids[row : row + 1, :end], use_cache=False).last_hidden_state[0]
        logits = model.head.logits(states[made.places[here]])
        losses.append(functional.cross_entropy(logits, made.labels[here], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["response", "all"])
@pytest.mark.usefixtures("bins")
def test_loss_and_gradients_are_those_of_separate_samples(kind: str, positions: str, folders: Any) -> None:
    own = {"packing": "user", "train_positions": positions, "train_batch_size": 40}
    model = build(folders(kind), **own)
    rows = next(iter(loader(negative_ratio=1, **own)))
    cut = rows["start"] > torch.from_numpy(histories().offsets)[model_users(rows)]
    assert cut.any() and not cut.all()
    made = model.training_batch(rows)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found, expected = model.stage_loss(FINE_TUNING, made), separate_loss(model, made)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-7)


def model_users(rows: Any) -> torch.Tensor:
    """The user of each sample with a history."""
    return torch.from_numpy(np.searchsorted(histories().offsets, rows["stop"].numpy() - 1, side="right") - 1)


def one_user(samples: Any, user: int) -> list[Any]:
    return [rows[model_users(rows) == user] for rows in samples if (model_users(rows) == user).any()]


@pytest.mark.parametrize("prefixes", ["one", "most"])
def test_one_user_alone(prefixes: str, folders: Any) -> None:
    own = {"packing": "user", "history_length": 20, "train_batch_size": 100}
    model = build(folders("llama"), **own)
    counts = np.maximum(np.diff(histories().offsets) - 1, 0)
    user = int(np.argmax(counts))
    rows = one_user(loader(negative_ratio=0, prefixes_per_user=1 if prefixes == "one" else None, **own), user)[0]
    assert len(rows["stop"]) == (1 if prefixes == "one" else counts[user])
    made = model.training_batch(rows)
    torch.testing.assert_close(model.stage_loss(FINE_TUNING, made), separate_loss(model, made), rtol=0, atol=1e-5)


# --- samples ---------------------------------------------------------------------------------------------------------


def whole(batches: list[Any]) -> dict[str, torch.Tensor]:
    """The samples of an epoch's batches."""
    return {name: torch.cat([rows[name] for rows in batches]) for name in batches[0].interaction}


@pytest.mark.parametrize("size", [3, 100])
def test_every_prefix_comes_once_in_groups_that_begin_alike(size: int) -> None:
    samples = loader(packing="user", train_batch_size=size, history_length=6, negative_ratio=1)
    samples.length_of = lambda drawn: drawn["stop"] - drawn["start"]
    for _ in range(2):
        batches = list(samples)
        assert len(batches) == len(samples) and max(len(rows["stop"]) for rows in batches) <= size
        found = whole(batches)
        sequential = found["task"] == number(SEQUENTIAL)
        assert sorted(found["stop"][sequential].tolist()) == sorted(samples.stops.tolist())
        assert sorted(found["stop"][~sequential].tolist()) == sorted(samples.stops.tolist())
        # A group lies in as few batches as there is need for, one more where it meets another's end.
        pieces = Counter(start for rows in batches for start in set(rows["start"].tolist()))
        for start, members in Counter(found["start"].tolist()).items():
            assert pieces[start] <= (members - 1) // size + 2


def test_what_is_cut_at_the_front_is_a_group_of_its_own() -> None:
    samples = loader(packing="user", history_length=4)
    groups = window_groups(samples.starts, samples.stops)
    first = samples.offsets[samples.users]
    for group in groups.unique().tolist():
        members = groups == group
        assert (samples.starts[members] == first[members]).all() or members.sum() == 1
    assert len(window_groups(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)).unique()) == 3


def test_templates_are_drawn_once_a_user_and_epoch(folders: Any) -> None:
    own = {"packing": "user", "train_batch_size": 4, "history_length": 20}
    model, samples = build(folders("llama"), **own), loader(negative_ratio=1, **own)
    drawn, templates = [], []
    kept = model.writer.draw
    model.writer.draw = lambda *given: templates.append(kept(*given)) or templates[-1]  # type: ignore[method-assign]
    for _ in range(6):
        by_user: dict[tuple[int, int], set[int]] = {}
        for rows in samples:
            model.training_batch(rows)
            for user, task, template in zip(
                model_users(rows).tolist(), rows["task"].tolist(), templates[-1].tolist(), strict=True
            ):
                by_user.setdefault((user, task), set()).add(template)
        assert {len(templates) for templates in by_user.values()} == {1}
        drawn.append({asked: min(templates) for asked, templates in by_user.items()})
    for task in (SEQUENTIAL, NEGATIVE):
        users_of = [user for user, asked in drawn[0] if asked == number(task)]
        # Over epochs a user is asked in several ways, and in an epoch users in several.
        assert any(len({epoch[user, number(task)] for epoch in drawn}) > 1 for user in users_of)
        assert len({drawn[0][user, number(task)] for user in users_of}) > 1


def test_samples_without_a_history_are_drawn_one_by_one() -> None:
    samples = loader(packing="user", negative_ratio=0, text_task=True)
    samples.texts = TaskTexts(text_items=torch.arange(1, N_ITEMS))
    found = whole(list(samples))
    texts = found["task"] == number(TEXT)
    assert sorted(found["target"][texts].tolist()) == list(range(1, N_ITEMS))
    assert len(found[DRAW][texts].unique()) == int(texts.sum())
    assert DRAW not in whole(list(loader(packing="none")))


def test_items_that_are_left_out_are_those_of_the_whole_group(folders: Any) -> None:
    own = {"packing": "user", "history_dropout": 0.5, "history_length": 20, "train_batch_size": 100}
    model, samples = build(folders("llama"), **own), loader(negative_ratio=0, **own)
    written = []
    kept = model.writer.write
    model.writer.write = lambda *given: written.append(given[5]) or kept(*given)  # type: ignore[method-assign]
    rows = next(iter(samples))
    model.training_batch(rows)
    shown: Ragged = written[0]
    by_user: dict[int, list[tuple[int, set[int]]]] = {}
    for user, stop, moments in zip(
        model_users(rows).tolist(), rows["stop"].tolist(), shown.values.split(shown.lengths.tolist()), strict=True
    ):
        by_user.setdefault(user, []).append((stop, set(moments.tolist())))
    lost = 0
    for prefixes in by_user.values():
        longest = max(prefixes)[1]
        for stop, moments in prefixes:
            # But for the last item, which always stays.
            assert moments - {stop - 1} == {moment for moment in longest if moment < stop - 1}
            lost += len(moments) < stop - min(moments)
    assert lost


def test_two_epochs_of_one_seed_are_equal() -> None:
    first, second = (whole(list(loader(packing="user", negative_ratio=2))) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- settings --------------------------------------------------------------------------------------------------------


def test_an_encoder_is_refused(folders: Any) -> None:
    model = build(folders("llama"), packing="user")
    with pytest.raises(UserError, match=r"packing: user needs a causal language model.*set packing: none"):
        model.check_language_model(encodes=True)
    model.check_language_model(encodes=False)
    assert shipped()["packing"] == "none"


def test_a_language_model_that_reads_row_by_row_is_told_of(folders: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="recbole_llm"):
        model = build(folders("mamba"), packing="user")
    assert "reads each by itself" in caplog.text
    made = model.training_batch(next(iter(loader(packing="user", negative_ratio=0))))
    torch.testing.assert_close(model.stage_loss(FINE_TUNING, made), separate_loss(model, made), rtol=0, atol=1e-5)


# --- whole recommenders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LETTER", "TCA4Rec", "MSL"])
def test_other_losses_read_states_that_labels_share(name: str, folders: Any) -> None:
    own = {"packing": "user", "train_positions": "response" if name == "MSL" else "all"}
    if name == "MSL":
        model = test_title_bases.build(folders("llama"), MSL, "MSL", **own)
    else:
        base = "AlignTokenRec" if name == "TCA4Rec" else name
        base_class, more = test_tca4rec.BASES[base]
        made_of = TCA4Rec.over(base) if name == "TCA4Rec" else base_class
        model = test_tca4rec.build(folders("llama"), made_of, **more, **own, base_model=base)
    torch.manual_seed(3)
    made = model.training_batch(next(iter(loader(**own, tasks=[SEQUENTIAL], train_batch_size=24))))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = []
    for packs in (True, False):
        model._reader.packs = packs
        loss = model.stage_loss(FINE_TUNING, made)
        found.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-7)


@pytest.mark.parametrize(
    "name", ["AlignTokenRec", *(pytest.param(name, marks=pytest.mark.slow) for name in ("P5", "TALLRec"))]
)
def test_runs_train_and_are_equal(name: str, tmp_path: Path) -> None:
    own = SMALL[name] | {
        "packing": "user", "prefixes_per_user": None, "epochs": 1, "history_dropout": 0.2, "show_progress": False,
        "tensorboard": False, "gpu_id": "", "evaluate_parts": False,
    }  # fmt: skip
    losses = []
    for output in ("first", "second"):
        config = Config(name, "tiny", config_dict={**own, "output_dir": str(tmp_path / output)}, command_line=[])
        losses.append(fit(config, store_of(config)).facts["losses"])
    assert losses[0] == losses[1] and np.isfinite(losses[0]).all()


@pytest.mark.parametrize("value", ["users", "true"])
def test_what_packing_can_be_is_checked(value: str, settings_of: Any) -> None:
    with pytest.raises(UserError, match=r"packing should be str: none \| user"):
        Config("AlignTokenRec", "small", config_dict=settings_of(packing=value))
