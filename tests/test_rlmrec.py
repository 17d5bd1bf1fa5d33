"""RLMRec: both losses against the same equations written densely, and its profiles: from train rows, and cached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from small_models import SMALL
from test_dccf import N_ITEMS, N_USERS, batch, gradients, unit
from test_hccf import WIDTH, leaky
from test_hccf import make as make_graph_model
from worlds import rows_of, write_by_phase

from recbole_llm import Config, UserError, run
from recbole_llm.data.histories import Histories
from recbole_llm.data.item_text import first_words
from recbole_llm.data.phases import TEST, TRAIN, VALID
from recbole_llm.data.profiles import Reviews, items_of_users, profile_of, profile_source, read_wording
from recbole_llm.model.contrast import InfoNCE
from recbole_llm.model.lightgcn import LightGCN
from recbole_llm.model.rlmrec import RLMRecCon, RLMRecGen
from recbole_llm.training.pipeline import fit, store_of

KINDS = [RLMRecCon, RLMRecGen]
STORIES = ROOT.parent / "shared" / "data" / "lm" / "stories260K"


def vectors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of users and of items, far from the origin and from each other; every fifth has no profile, nor has a padding."""
    draw = torch.Generator().manual_seed(7)
    users, items = (
        3 + 0.2 * torch.randn(N_USERS, WIDTH, generator=draw),
        torch.randn(N_ITEMS, WIDTH, generator=draw) - 2,
    )
    return users, items, torch.arange(N_USERS) % 5 > 0, torch.arange(N_ITEMS) % 5 > 0


def make(kind: type, double: bool = True, **more: Any) -> Any:
    """A model on a small random graph with profiles, all its tables large enough to matter."""
    model = make_graph_model(kind, double=False, mask_ratio=0.3, **more)
    if hasattr(model, "take_profiles"):
        model.take_profiles(*vectors())
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    if double:
        model.double()
        model.norm_adj_matrix = model.norm_adj_matrix.double()
    return model


def standard(values: torch.Tensor, told: torch.Tensor) -> np.ndarray:
    own = values[told].double().numpy()
    moved = values.double().numpy() - own.mean(axis=0)
    return moved / np.sqrt(np.square(moved[told.numpy()]).mean())


def through(model: Any, x: np.ndarray) -> np.ndarray:
    """The layers between the widths, by their weights."""
    weights = [one.detach().double().numpy() for one in model.profile_mlp.parameters()]
    x = x @ weights[0].T + weights[1]
    if len(weights) == 4:
        x = np.where(x > 0, x, 0.01 * x) @ weights[2].T + weights[3]
    return x


def nce_sum(nodes: np.ndarray, said: np.ndarray, pool: np.ndarray, tau: float, epsilon: float = 0.0) -> float:
    """The authors' contrasts as a sum over rows, all compared by their cosine; that of Gen has an epsilon."""
    length = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (nodes, said, pool)]
    total = 0.0
    for node, own in zip(length[0], length[1], strict=True):
        total -= np.log(np.exp(node @ own / tau) / (np.exp(length[2] @ node / tau).sum() + epsilon) + epsilon)
    return total


class TestContrast:
    """InfoNCE with rows that belong to rows of a longer table."""

    def test_value_and_gradients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # A few rows at a time, so that what is added up over them is seen.
        monkeypatch.setattr("recbole_llm.model.contrast._CELLS_CPU", 25)
        draw = torch.Generator().manual_seed(0)
        a, b = (unit(torch.randn(rows, 4, generator=draw, dtype=torch.float64)).requires_grad_() for rows in (7, 11))
        own = torch.tensor([3, 0, 3, 10, 5, 5, 1])
        expected = -torch.log_softmax(a @ b.T / 0.3, dim=1)[torch.arange(7), own].mean()
        loss = InfoNCE.apply(a, b, 0.3, own)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        for got, wanted in zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)

    def test_counted_rows_are_rows_that_stand_there_as_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("recbole_llm.model.contrast._CELLS_CPU", 9)
        draw = torch.Generator().manual_seed(0)
        a, b = (unit(torch.randn(4, 3, generator=draw, dtype=torch.float64)).requires_grad_() for _ in range(2))
        rows = torch.tensor([0, 0, 1, 2, 2, 2, 3])
        counts = rows.bincount().double()
        short, long = InfoNCE.apply(a, b, 0.3, None, counts, counts), InfoNCE.apply(a[rows], b[rows], 0.3)
        torch.testing.assert_close(short, long)
        for got, wanted in zip(torch.autograd.grad(short, (a, b)), torch.autograd.grad(long, (a, b)), strict=True):
            torch.testing.assert_close(got, wanted)

    def test_rows_in_their_own_order_are_the_plain_one(self) -> None:
        a, b = unit(torch.randn(6, 3)), unit(torch.randn(6, 3))
        torch.testing.assert_close(InfoNCE.apply(a, b, 0.2, torch.arange(6)), InfoNCE.apply(a, b, 0.2))


class TestCon:
    @pytest.mark.parametrize(("projector", "tau"), [("mlp", 0.2), ("linear", 1.0)])
    def test_the_loss_is_the_equations(self, projector: str, tau: float) -> None:
        model, rows = make(RLMRecCon, projector=projector, text_tau=tau), batch()
        users, items = (one.detach().numpy() for one in model.forward())
        of_users, of_items, users_told, items_told = vectors()
        said = [through(model, standard(*pair)) for pair in ((of_users, users_told), (of_items, items_told))]
        named = {field: values.numpy() for field, values in rows.interaction.items()}
        kept = named["user_id"][users_told.numpy()[named["user_id"]]]
        term = nce_sum(users[kept], said[0][kept], said[0][users_told.numpy()], tau)
        for field in ("item_id", "neg_item_id"):
            kept = named[field][items_told.numpy()[named[field]]]
            assert len(set(kept)) < len(kept) < len(rows), "some stand there twice, some have no profile"
            term += nce_sum(items[kept], said[1][kept], said[1][kept], tau)
        plain = model.loss_and_nodes(rows)[0]
        loss = model.calculate_loss(rows)
        assert term > 1
        assert loss.item() == pytest.approx(plain.item() + model.text_weight * term / len(rows), rel=1e-6)

    def test_gradients_are_the_dense_ones(self) -> None:
        model, rows = make(RLMRecCon), batch()
        loss, nodes = model.loss_and_nodes(rows)
        said, nodes = unit(model.profile_mlp(model.profiles)), unit(nodes)
        users = model.profiled[:N_USERS].nonzero().flatten()
        for field, shift in (("user_id", 0), ("item_id", N_USERS), ("neg_item_id", N_USERS)):
            kept = (rows[field] + shift)[model.profiled[rows[field] + shift]]
            pool = users if field == "user_id" else kept
            near = torch.exp(nodes[kept] @ said[pool].T / model.text_tau).sum(dim=1)
            own = (nodes[kept] * said[kept]).sum(dim=1) / model.text_tau
            loss = loss + model.text_weight * (near.log() - own).sum() / len(rows)
        for got, wanted in zip(gradients(model, model.calculate_loss(rows)), gradients(model, loss), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)

    def test_a_profile_draws_its_user(self) -> None:
        model = make(RLMRecCon, double=False, text_weight=5.0, reg_weight=0.0)
        users = torch.arange(1, N_USERS)[vectors()[2][1:]]
        rows = Interaction({name: users for name in ("user_id", "item_id", "neg_item_id")})

        @torch.no_grad()
        def nearest() -> float:
            table = unit(model.forward()[0][users]) @ unit(model.profile_mlp(model.profiles[users])).T
            return float((table.argmax(dim=1) == torch.arange(len(users))).float().mean())

        before = nearest()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            model.calculate_loss(rows).sum().backward()
            optimizer.step()
        assert nearest() > max(before + 0.3, 0.7)


class TestGen:
    @pytest.mark.parametrize(("projector", "tau"), [("mlp", 0.5), ("linear", 0.1)])
    def test_the_loss_is_the_equations(self, projector: str, tau: float) -> None:
        model, rows = make(RLMRecGen, projector=projector, text_tau=tau), batch()
        torch.manual_seed(9)
        masked = model._draw().numpy()
        torch.manual_seed(9)
        loss = model.calculate_loss(rows)

        # The graph once more, dense, with the token in the place of the masked nodes.
        tables = torch.cat([model.user_embedding.weight, model.item_embedding.weight]).detach().numpy()
        below = tables.copy()
        below[masked] = model.mask_token.detach().numpy()
        step = model.norm_adj_matrix.to_dense().numpy()
        layers = [below]
        for _ in range(model.n_layers):
            layers.append(step @ layers[-1])
        nodes = np.mean(layers, axis=0)
        user, item, negative = (rows[field].numpy() for field in ("user_id", "item_id", "neg_item_id"))
        margin = (nodes[user] * (nodes[N_USERS + item] - nodes[N_USERS + negative])).sum(axis=1)
        # RecBole's BPR loss has 1e-10 within the logarithm, and its penalty the norms of the tables over the batch.
        expected = -np.log(1e-10 + 1 / (1 + np.exp(-margin))).mean()
        sizes = [np.linalg.norm(tables[part]) for part in (user, N_USERS + item, N_USERS + negative)]
        expected += model.reg_weight * sum(sizes) / len(user)
        of_users, of_items, users_told, items_told = vectors()
        profiles = np.concatenate([standard(of_users, users_told), standard(of_items, items_told)])[masked]
        term = nce_sum(through(model, nodes[masked]), profiles, profiles, tau, 1e-8) / len(masked)
        assert term > 0.5
        assert loss.item() == pytest.approx(expected + model.text_weight * term, rel=1e-6)

    def test_what_is_masked(self) -> None:
        model = make(RLMRecGen)
        told = model.profiled.sum().item()
        drawn = [model._draw() for _ in range(60)]
        for masked in drawn:
            assert len(masked.unique()) == len(masked) == int(told * 0.3) and model.profiled[masked].all()
        assert set(torch.cat(drawn).tolist()) == set(model.profiled.nonzero().flatten().tolist())
        model.mask_ratio = 0.0
        assert len(model._draw()) == 1
        model.profiled = torch.zeros_like(model.profiled)
        torch.testing.assert_close(model.calculate_loss(batch()), model.loss_and_nodes(batch())[0])

    def test_nothing_is_masked_when_items_are_ranked(self) -> None:
        model, rows = make(RLMRecGen, double=False), batch(8)
        scores = model.full_sort_predict(rows)
        with torch.no_grad():
            model.mask_token += 5
        model.restore_user_e = model.restore_item_e = None
        assert torch.equal(scores, model.full_sort_predict(rows))


@pytest.mark.parametrize("kind", KINDS)
class TestBoth:
    def test_without_weight_the_loss_is_lightgcns_and_draws_nothing(self, kind: type) -> None:
        model, rows = make(kind, text_weight=0.0), batch()
        plain = make(LightGCN)
        plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
        before = torch.get_rng_state()
        loss = model.calculate_loss(rows)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(loss, plain.calculate_loss(rows))

    def test_edges_are_dropped_in_training_only_and_by_chance(self, kind: type) -> None:
        model, rows = make(kind, text_weight=0.0, drop_ratio=0.5), batch()
        whole = make(kind, text_weight=0.0)
        whole.load_state_dict(model.state_dict())
        assert torch.equal(model.calculate_loss(rows), whole.calculate_loss(rows)), "made in evaluation mode"
        model.train()
        torch.manual_seed(4)
        half = model.norm_adj_matrix.to_dense()[:N_USERS, N_USERS:]
        ends = half.nonzero(as_tuple=True)
        half[ends] = torch.nn.functional.dropout(half[ends], 0.5)
        tables = torch.cat([model.user_embedding.weight, model.item_embedding.weight])
        step = torch.zeros(N_USERS + N_ITEMS, N_USERS + N_ITEMS, dtype=torch.float64)
        step[:N_USERS, N_USERS:], step[N_USERS:, :N_USERS] = half, half.T
        layers = [tables]
        for _ in range(model.n_layers):
            layers.append(step @ layers[-1])
        torch.manual_seed(4)
        torch.testing.assert_close(torch.cat(model.forward()), torch.stack(layers).mean(dim=0))

    def test_gradients_reach_all_that_trains(self, kind: type) -> None:
        model = make(kind, double=False)
        names = [name for name, _ in model.named_parameters()]
        assert len(names) == 6 + (kind is RLMRecGen)
        for name, grad in zip(names, gradients(model, model.calculate_loss(batch())), strict=True):
            assert grad.isfinite().all() and grad.abs().sum() > 0, name

    def test_the_layers_are_the_papers(self, kind: type) -> None:
        model = make(kind)
        layers = [layer for layer in model.profile_mlp if isinstance(layer, torch.nn.Linear)]
        sizes = [layers[0].in_features, layers[0].out_features, layers[1].out_features]
        assert sizes == ([WIDTH, (WIDTH + 6) // 2, 6] if kind is RLMRecCon else [6, (WIDTH + 6) // 2, WIDTH])
        x = torch.randn(3, sizes[0], dtype=torch.float64)
        hidden = leaky(x @ layers[0].weight.T + layers[0].bias, 0.01)
        torch.testing.assert_close(model.profile_mlp(x), hidden @ layers[1].weight.T + layers[1].bias)


# --- wording and samples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "profile"),
    [
        ('{"summarization": "Likes slow  films\\nof war.", "reasoning": "many"}', "Likes slow films of war."),
        ('Sure! {"reasoning": "x", "summarization": "Old \\"noir\\""}', 'Old "noir"'),
        ('{"summarization": "cut off in the mid', "cut off in the mid"),
        ('Old films", "reasoning": "he says so"}', "Old films"),
        ("A user who likes films\n", "A user who likes films"),
        ('{"summarization": "one two three four five six seven", "reasoning": ""}', "one two three four five six"),
        ('{"summarization": "a broken \\x escape"}', "a broken x escape"),
        (' ..."', ""),
        ("", ""),
    ],
)
def test_the_profile_of_an_answer(answer: str, profile: str) -> None:
    assert profile_of(answer, 6) == profile


@given(st.text(), st.integers(1, 8))
def test_a_profile_is_one_short_line(answer: str, words: int) -> None:
    found = profile_of(answer, words)
    assert len(found.split()) <= words and "\n" not in found and found == found.strip()
    assert not found or any(map(str.isalnum, found))


def histories() -> Histories:
    return Histories(np.array([0, 0, 6, 6, 9]), np.array([5, 3, 4, 5, 1, 2, 7, 2, 7]))


def test_items_of_users_are_a_sample_of_the_distinct_ones_that_something_is_told_of() -> None:
    told = [False, True, True, True, False, True, False, True]
    assert items_of_users(histories(), told, 9, 0) == [[], [5, 3, 1, 2], [], [7, 2]]
    drawn = [items_of_users(histories(), told, 2, seed)[1] for seed in range(40)]
    assert all(sorted(one, key=[5, 3, 1, 2].index) == one and len(set(one)) == 2 for one in drawn)
    assert {item for one in drawn for item in one} == {5, 3, 1, 2}
    # What one user has moves no other's sample.
    more = Histories(np.array([0, 0, 6, 8, 11]), np.array([5, 3, 4, 5, 1, 2, 1, 2, 7, 2, 7]))
    assert items_of_users(more, told, 2, 3)[1] == items_of_users(histories(), told, 2, 3)[1]


def test_reviews_by_item_and_by_pair() -> None:
    reviews = Reviews(["a", "b", "c", "d"], np.array([1, 5, 6, 7]))
    assert reviews.of_items(histories(), 8, 9, 0) == [[], [], ["b", "d"], ["a"], [], [], [], ["c"]]
    assert {tuple(reviews.of_items(histories(), 8, 1, seed)[2]) for seed in range(20)} == {("b",), ("d",)}
    assert reviews.by_pair(histories()) == {(1, 3): "a", (1, 2): "b", (3, 7): "c", (3, 2): "d"}


def test_wording_that_cannot_be_is_refused(tmp_path: Path) -> None:
    shipped = (ROOT / "properties" / "prompts" / "rlmrec.yaml").read_text(encoding="utf-8")
    assert read_wording("rlmrec").render("shown", text="Heat", review="") == "Heat"
    for old, new, message in (
        ("separator:", "separated:", "says nothing for 'separator'"),
        ('"{text}[ (the user says: {review})]"', '"{title}"', r"should name some of \{text\}, \{review\}"),
        ('"{text}[ (the user says: {review})]"', '"the same"', r"should name some of \{text\}, \{review\}"),
        ('"{text}[ (the user says: {review})]"', "[1]", "should be a text"),
    ):
        file = tmp_path / "own.yaml"
        assert old in shipped
        file.write_text(shipped.replace(old, new), encoding="utf-8")
        with pytest.raises(UserError, match=f"^[^\n]*own.yaml[^\n]*{message}[^\n]*$"):
            read_wording(str(file))
    with pytest.raises(UserError, match=r"^profile_prompts: there is no 'rlmrek'"):
        read_wording("rlmrek")


@pytest.mark.parametrize(
    ("llm", "profiles", "wanted"),
    [("embedded", "auto", "template"), ("x", "auto", "generated"), ("x", "template", "template"),
     ("embedded", "generated", "generated")],
)  # fmt: skip
def test_who_writes(llm: str, profiles: str, wanted: str) -> None:
    assert profile_source({"llm": llm, "profiles": profiles}) == wanted


# --- runs ------------------------------------------------------------------------------------------------------------


def quick(settings_of: Callable[..., dict[str, Any]], **more: Any) -> dict[str, Any]:
    return settings_of(item_text="{movie_title} {class}", **SMALL["RLMRecCon"]) | more


def profiles_of(fitted: Any) -> dict[str, list[str]]:
    return {
        name: json.loads(file.read_text(encoding="utf-8")) for name, file in sorted(fitted.trainer.artefacts.items())
    }


def fitted(name: str, settings: dict[str, Any], data: str = "small") -> Any:
    config = Config(name, data, config_dict=settings)
    return fit(config, store_of(config))


class TestProfiles:
    def test_templates_say_texts_of_items_and_keywords_and_items_of_users(
        self, settings_of: Callable[..., dict[str, Any]]
    ) -> None:
        one = fitted("RLMRecCon", quick(settings_of, profile_items=4, profile_keywords=3, profile_text_words=2))
        made = profiles_of(one)
        items, users = made["item_profiles.json"], made["user_profiles.json"]
        assert items == one.trainer.item_text.texts and users[0] == ""
        dataset = one.train_data._dataset
        for user in range(1, len(users)):
            own = {first_words(items[item], 2) for item in dataset.split.histories(TRAIN).of(user)}
            likes, had = users[user].split(". Had: ")
            assert set(had.split("; ")) <= own and len(had.split("; ")) == min(4, len(own))
            assert likes.startswith("Likes: ") and len(likes.split("; ")) == 3
        assert one.model.profiled.tolist() == [bool(text) for text in users + items]

    def test_a_second_run_reads_them_and_another_model_shares_them(
        self, settings_of: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        names = ["backbone", "item_profiles", "user_profiles", "item_texts", "user_texts"]

        def cached(model: str, **more: Any) -> list[bool]:
            stages = run(model, "small", config_dict=quick(settings_of, **more))["stages"]
            assert [stage["name"] for stage in stages] == [*names, f"train-{model}"]
            return [stage["cached"] for stage in stages]

        assert cached("RLMRecCon") == [False] * 6
        assert cached("RLMRecCon") == [True] * 6
        assert cached("RLMRecGen") == [True] * 5 + [False]
        # Another seed of the run trains another embedded model, which reads the same profiles.
        assert cached("RLMRecCon", seed=7) == [False, True, True, False, False, False]
        # What a profile is made of is its key: what is of users alone leaves items as they are.
        for key, value in (("profile_items", 3), ("profile_seed", 5), ("profile_keywords", 1)):
            assert cached("RLMRecCon", **{key: value})[1:5] == [True, False, True, False], key
        # Settings that only a language model that writes hears of, or reviews where there are none, change nothing.
        for key, value in (("profile_new_tokens", 7), ("profile_reviews", 1)):
            assert cached("RLMRecCon", **{key: value})[1:5] == [True] * 4, key
        # One that says other words of both.
        assert cached("RLMRecCon", item_text="{movie_title}")[1:5] == [False] * 4
        own = tmp_path / "own.yaml"
        text = (ROOT / "properties" / "prompts" / "rlmrec.yaml").read_text(encoding="utf-8")
        own.write_text(text.replace("]Had: ", "]Liked: "), encoding="utf-8")
        assert cached("RLMRecCon", profile_prompts=str(own))[1:5] == [True, False, True, False]

    def test_without_weight_the_profiles_change_no_bit(self, settings_of: Callable[..., dict[str, Any]]) -> None:
        plain = fitted("LightGCN", settings_of(n_layers=2)).model.state_dict()
        for name in ("RLMRecCon", "RLMRecGen"):
            same, other = (
                fitted(name, quick(settings_of, text_weight=weight, n_layers=2, drop_ratio=0.0)).model.state_dict()
                for weight in (0.0, 0.5)
            )
            assert plain.keys() < same.keys()
            for key, values in plain.items():
                assert torch.equal(values, same[key]), (name, key)
            assert not torch.equal(plain["user_embedding.weight"], other["user_embedding.weight"])

    @pytest.mark.parametrize("name", ["RLMRecCon", "RLMRecGen"])
    def test_data_without_texts_is_refused_before_any_work(
        self, name: str, settings_of: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=f"^{name} needs item text, but 'small' has no template"):
            run(name, "small", config_dict=settings_of())
        assert not list(tmp_path.rglob("stage.json"))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("mask_ratio", 1.5),
            ("profiles", "none"),
            ("profile_items", 0),
            ("text_tau", 0.01),
            ("profile_words", "many"),
        ],
    )
    def test_wrong_settings_are_refused(self, key: str, value: Any, settings_of: Callable[..., dict[str, Any]]) -> None:
        with pytest.raises(UserError, match=f"^{key} should be .* but is {value!r}[^\n]*$"):
            Config("RLMRecGen", "small", config_dict=settings_of(**{key: value}))


# --- leakage ---------------------------------------------------------------------------------------------------------


def with_reviews(folder: Path, name: str = "small") -> Path:
    """The data set with a review in every row, which names its user and its item."""
    head, rows = rows_of(folder, name)
    lines = ["\t".join([*head, "review:token_seq"])]
    lines += ["\t".join([*row, f"said by u{row[0]} of i{row[1]}"]) for row in rows]
    (folder / name / f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def worlds(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same train rows; test items exchanged in the second, valid items in the third. All have reviews."""
    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "test_swapped", "valid_swapped")]
    for folder, swap in zip(folders, ((), (TEST,), (VALID,)), strict=True):
        write_by_phase(small_data, folder, swap)
        with_reviews(folder)
    return folders


def test_exchanged_test_and_valid_items_move_no_profile(
    worlds: list[Path], settings_of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    seen = []
    for number, world in enumerate(worlds):
        more = {"data_path": str(world), "output_dir": str(tmp_path / str(number)), "epochs": 1}
        one = fitted("RLMRecCon", quick(settings_of, **more))
        seen.append((profiles_of(one), one.model.profiles, one.train_data._dataset.split.fingerprint))
    assert len({mark for *_, mark in seen}) == 3, "the exchange changed nothing; the test would pass blindly"
    for texts, vectors_of_them, _ in seen[1:]:
        assert texts == seen[0][0] and torch.equal(vectors_of_them, seen[0][1])


def test_only_train_interactions_and_their_reviews_reach_a_profile(
    worlds: list[Path], settings_of: Callable[..., dict[str, Any]]
) -> None:
    """Every train row is shown, so that what else stands in a profile would be seen."""
    more = {"data_path": str(worlds[0]), "profile_items": 9999, "profile_reviews": 9999, "profile_text_words": 9999}
    one = fitted("RLMRecCon", quick(settings_of, epochs=1, **more))
    made, dataset = profiles_of(one), one.train_data._dataset
    split, tokens = dataset.split, [dataset.field2id_token[name] for name in ("user_id", "item_id")]
    of_items, of_users = made["item_profiles.json"], made["user_profiles.json"]
    texts = one.trainer.item_text.texts
    shown = [" | ".join(texts[item] for item in dataset.train_histories.of(user)) for user in range(len(of_users))]
    held = 0
    for user, item, phase in zip(split.users.tolist(), split.items.tolist(), split.phases.tolist(), strict=True):
        said = f"said by u{tokens[0][user]} of i{tokens[1][item]}"
        found = (
            said in of_items[item].split(" Reviews: ")[-1].split("; "),
            f"(the user says: {said})" in of_users[user],
            texts[item] in of_users[user],
        )
        if phase == TRAIN:
            assert all(found), said
        else:
            # Two films may have one text, and the other one be among the user's.
            held += texts[item] not in shown[user]
            assert not any(found[:2]) and found[2] == (texts[item] in shown[user]), said
    assert held > 60


# --- profiles that a language model writes ---------------------------------------------------------------------------


def generated(settings_of: Callable[..., dict[str, Any]], folder: Path, **more: Any) -> dict[str, Any]:
    return settings_of(
        item_text="{movie_title}", llm=str(folder), profile_items=2, profile_text_words=4, profile_words=8,
        profile_new_tokens=8, epochs=1,
    ) | more  # fmt: skip


class TestGenerated:
    def test_what_an_embedded_model_wrote_in_one_precision_is_not_found_in_another(
        self, settings_of: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from recbole_llm.training import profiles

        def answer(model: Any, backbone: Any, prompts: Any, *, folder: Path, **more: Any) -> list[str]:
            (folder / profiles.DONE).touch()
            return [""] * len(prompts)

        monkeypatch.setattr(profiles, "answer_prompts", answer)
        small = {"llm_train_steps": 1, "llm_hidden_size": 16, "llm_layers": 1, "llm_heads": 2, "llm_vocab_size": 300}
        made = []
        for dtype in ("float32", "bfloat16", "float32"):
            settings = generated(settings_of, Path("embedded"), profiles="generated", llm_dtype=dtype, **small)
            stages = fitted("RLMRecCon", settings).stages
            made.append({line["name"]: line["cached"] for line in stages if "profiles" in line["name"]})
        assert [set(found.values()) for found in made] == [{False}, {False}, {True}]

    def test_the_language_model_is_asked_of_items_then_of_users(
        self,
        folders: Callable[[str], Path],
        settings_of: Callable[..., dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from recbole_llm.training import profiles

        asked: list[list[str]] = []

        def answer(model: Any, backbone: Any, prompts: Any, *, folder: Path, **more: Any) -> list[str]:
            assert model.get_output_embeddings() is not None
            asked.append([backbone.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts])
            (folder / profiles.DONE).touch()
            # Of every third row it says nothing.
            return [f'Row {row}", "reasoning": ""}}' if row % 3 else "" for row in range(len(prompts))]

        monkeypatch.setattr(profiles, "answer_prompts", answer)
        settings = generated(settings_of, folders("llama"))
        one = fitted("RLMRecGen", settings)
        made, texts = profiles_of(one), one.trainer.item_text.texts
        items, users = made["item_profiles.json"], made["user_profiles.json"]
        assert items == [f"Row {row}" if row % 3 else text for row, text in enumerate(texts)]
        assert users[1:3] == ["Row 1", "Row 2"] and users[3].startswith("Likes: ") and users[0] == ""
        assert len(asked) == 2 and asked[0][0] == asked[1][0] == ""
        squeezed = ["".join(text.split()) for text in asked[0]]
        assert all("".join(text.split()) in prompt for text, prompt in zip(texts[1:], squeezed[1:], strict=True))
        # Users are asked about by what was written of their items.
        own = {"".join(items[item].split()) for item in one.train_data._dataset.train_histories.of(1)}
        assert sum(text[:8] in "".join(asked[1][1].split()) for text in own) >= 2
        assert profiles_of(fitted("RLMRecCon", settings)) == made and len(asked) == 2, "a finished stage is found"
        lines = {stage["name"]: stage["tokens"] for stage in one.stages}
        assert lines["item_profiles"] is None and lines["user_profiles"] is None

    def test_a_tiny_model_writes(
        self, folders: Callable[[str], Path], settings_of: Callable[..., dict[str, Any]]
    ) -> None:
        first = run("RLMRecCon", "small", config_dict=generated(settings_of, folders("llama")))
        again = run("RLMRecCon", "small", config_dict=generated(settings_of, folders("llama")))
        assert all(stage["cached"] for stage in again["stages"]) and again["test"] == first["test"]
        assert (Path(first["result_file"]).parent / "user_profiles.json").is_file()

    @pytest.mark.skipif(
        not STORIES.is_dir(),
        reason="REAL MODEL MISSING: no folder ../shared/data/lm/stories260K; none writes",
    )
    def test_a_trained_model_writes_words(self, settings_of: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
        folder = tmp_path / "lm"
        shutil.copytree(STORIES, folder)
        own = tmp_path / "own.yaml"
        text = (ROOT / "properties" / "prompts" / "rlmrec.yaml").read_text(encoding="utf-8")
        for key in ("item", "user"):
            place = "{text}" if key == "item" else "{items}"
            begin = text.index(f"\n{key}: |-") + 1
            end = text.index("\n", text.index('"summarization": "', begin)) + 1
            text = text[:begin] + f'{key}: "One day, {place} said: I like"\n' + text[end:]
        own.write_text(text, encoding="utf-8")
        settings = generated(settings_of, folder, profile_prompts=str(own), profiles="auto")
        made = profiles_of(fitted("RLMRecCon", settings))
        template = profiles_of(fitted("RLMRecCon", settings | {"profiles": "template"}))
        for name, texts in made.items():
            assert all(texts[1:]) and not texts[0]
            differing = [text for text, other in zip(texts[1:], template[name][1:], strict=True) if text != other]
            assert len(differing) > 0.9 * len(texts) and all(len(text.split()) <= 8 for text in differing)
        assert len(set(made["user_profiles.json"])) > 5

    def test_prompts_too_long_for_the_model_are_refused(
        self, folders: Callable[[str], Path], settings_of: Callable[..., dict[str, Any]]
    ) -> None:
        with pytest.raises(UserError, match=r"^the prompts that have the language model write profiles take up to"):
            fitted("RLMRecCon", generated(settings_of, folders("llama"), profile_new_tokens=100000))


@pytest.mark.parametrize("kind", ["RLMRecCon", "RLMRecGen"])
def test_how_a_language_model_writes_is_no_setting_of_templates(kind: str) -> None:
    def keys(profiles: str, llm: str, **more: int) -> dict[str, Any]:
        settings = {"profiles": profiles, "llm": llm, **more}
        return Config(kind, "tiny", config_dict=settings, command_line=[]).stage_keys()

    for name in ("profile_words", "profile_new_tokens", "profile_batch_size"):
        assert keys("template", "some", **{name: 7}) == keys("template", "some"), name
        assert keys("auto", "embedded", **{name: 7}) == keys("auto", "embedded"), name
        assert keys("auto", "some", **{name: 7}) != keys("auto", "some"), name
        assert keys("generated", "embedded", **{name: 7}) != keys("generated", "embedded"), name
    # The template has these.
    assert keys("template", "some", profile_keywords=7) != keys("template", "some")


def test_prompts_that_are_not_there_are_refused_before_work(tmp_path: Path) -> None:
    settings = {"output_dir": str(tmp_path), "show_progress": False, "gpu_id": "", "profile_prompts": "nothere"}
    config = Config("RLMRecCon", "tiny", config_dict=settings, command_line=[])
    with pytest.raises(UserError, match="there is no 'nothere'"):
        fit(config, store_of(config))
    assert not list(tmp_path.rglob("stage.json"))
