"""The stage that gives items their tokens: every recipe, what it hangs on, what it refuses, going on after a break."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from small_models import SMALL
from tiny_lm import TinyBackbone, llama

from recbole_llm.backbone import text_projector
from recbole_llm.cli import main
from recbole_llm.config import Config
from recbole_llm.data import create_dataset
from recbole_llm.data.phases import TEST, TRAIN, VALID
from recbole_llm.errors import TrainingStoppedError, UserError
from recbole_llm.inspection import inspect
from recbole_llm.itemid import alignment
from recbole_llm.itemid.index_file import read_index
from recbole_llm.itemid.rqvae import RQVAE
from recbole_llm.model.dccf import DCCF
from recbole_llm.training import state
from recbole_llm.training.embeddings import graph_embeddings, item_embeddings, text_embeddings
from recbole_llm.training.item_tokens import CARD, INDEX, ORIGIN, TOKENS, Tokenized, tokenize_items
from recbole_llm.training.pipeline import fit, fit_parts_of, prepared, store_of
from recbole_llm.training.runs import run
from recbole_llm.training.state import ResumeFile
from recbole_llm.training.store import Stage, StageStore

PROPERTIES = ROOT / "recbole_llm" / "properties" if (ROOT / "recbole_llm/properties").is_dir() else ROOT / "properties"
RECIPES = sorted(file.stem for file in (PROPERTIES / "item_tokens").glob("*.yaml") if file.stem != "overall")
IDS = {"random", "sequential", "collaborative", "semantic"}
# What a recipe needs to be told of the data.
TOLD: dict[str, dict[str, Any]] = {"semantic": {"id_categories": "genre", "id_category_separator": " "}}
# Of these policies no two items have the same tokens.
APART = ("nearest", "extra_token")


def quick(output: Path, **more: Any) -> dict[str, Any]:
    """Settings of small codebooks of the data set ``tiny``."""
    return SMALL["SASRecCodes"] | {
        "output_dir": str(output), "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 1,
        "eval_step": 0, "embedding_model.embedding_size": 8,
    } | more  # fmt: skip


def tokenized(settings: Mapping[str, Any], dataset: str = "tiny", command_line: tuple[str, ...] = ()) -> Tokenized:
    config = Config("SASRecCodes", dataset, config_dict=dict(settings), command_line=list(command_line))
    _, train_data, _, _ = prepared(config)
    store = store_of(config)
    return tokenize_items(config, train_data._dataset, store, fit_parts_of(config, store))


def raw_ids_of(dataset: str = "tiny", **settings: Any) -> list[str]:
    config = Config("SASRecCodes", dataset, config_dict=settings)
    return create_dataset(config).field2id_token["item_id"].tolist()


def stages_in(output: Path) -> list[str]:
    return [file.parent.name for file in output.rglob("stage.json")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Tokenized]:
    """Settings whose stages are all in the cache, and their tokens."""
    settings = quick(tmp_path_factory.mktemp("base"))
    return settings, tokenized(settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    result = run("SASRecCodes", "tiny", config_dict=quick(tmp_path_factory.mktemp("finished")))
    return Path(result["result_file"]).parent


# --- recipes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_every_item_tokens(recipe: str, base: tuple[dict[str, Any], Tokenized]) -> None:
    # A seed that the other tests have not, so that nothing is there yet.
    settings = base[0] | {"item_tokens": recipe, "code_kmeans_points": 0, "seed": 5} | TOLD.get(recipe, {})
    if recipe == "letter":
        # Codes are as wide as its collaborative model, and that calls its width otherwise.
        settings["embedding_model.hidden_size"] = settings.pop("embedding_model.embedding_size")
        settings["code_dim"] = 8
    made = tokenized(settings)
    tokens, raw_ids = made.tokens, raw_ids_of()
    assert not made.stage.cached and tokens.n_items == len(raw_ids) == 81
    assert tokens.lengths[0] == 0 and (tokens.lengths[1:] > 0).all()
    policy = Config("SASRecCodes", "tiny", config_dict=settings)["code_collisions"]
    if recipe == "raw" or recipe in IDS:
        assert tokens.kind == ("raw" if recipe == "raw" else "ids") and not (made.stage.folder / INDEX).exists()
    else:
        assert tokens.kind == "codes" and tokens.level_sizes[:3] == (8, 8, 8)
        again = read_index(made.stage.folder / INDEX, raw_ids, tokens.level_sizes)
        assert again.fingerprint() == tokens.fingerprint()
        card = json.loads((made.stage.folder / CARD).read_text())
        assert card["items"] == 80 and card["policy"] == policy
    assert tokens.collision_rate() == 0 or policy not in APART

    found = tokenized(settings)
    assert found.stage.cached and found.stage.fingerprint == made.stage.fingerprint
    shutil.rmtree(made.stage.folder)
    anew = tokenized(settings)
    assert not anew.stage.cached and anew.tokens.fingerprint() == tokens.fingerprint() == found.tokens.fingerprint()


def test_every_policy_of_the_recipes_was_met() -> None:
    policies = {Config("SASRecCodes", "tiny", config_dict={"item_tokens": name})["code_collisions"] for name in RECIPES}
    assert policies == {"nearest", "sinkhorn", "extra_token"}


def test_a_recipe_stands_above_the_defaults_and_below_files_and_flags(tmp_path: Path) -> None:
    def distance(command_line: tuple[str, ...] = (), **settings: Any) -> str:
        return Config("SASRecCodes", "tiny", [file], settings, list(command_line))["code_distance"]

    file = tmp_path / "mine.yaml"
    file.write_text("item_tokens: rq\n")
    overall = yaml.safe_load((PROPERTIES / "item_tokens" / "overall.yaml").read_text())
    assert overall["code_distance"] == "cosine" and distance() == "l2"
    assert distance(("--item_tokens=literal",)) == "cosine"
    assert distance(("--code_distance=cosine",)) == "cosine"
    assert distance(code_distance="cosine") == "cosine"
    file.write_text("item_tokens: rq\ncode_distance: cosine\n")
    assert distance() == "cosine" and distance(("--code_distance=l2",)) == "l2"
    with pytest.raises(UserError, match=r"no recipe 'lterall'; did you mean 'literal' or"):
        distance(("--item_tokens=lterall",))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_speaks_of_settings_as_their_defaults_do(recipe: str) -> None:
    kinds = []
    for name in (recipe, "overall"):
        text = (PROPERTIES / "item_tokens" / f"{name}.yaml").read_text()
        kinds.append(dict(re.findall(r"^(\w+):.*?# \((.*?)\) ", text, re.MULTILINE)))
        # A recipe may have settings of a part, which are described with that model.
        assert kinds[-1].keys() == {key for key in yaml.safe_load(text) if "." not in key}
    assert kinds[0].items() <= kinds[1].items()


# --- what the stage hangs on -----------------------------------------------------------------------------------------
class Recorder(StageStore):
    """Finds every stage but the last and notes what that one would be made from."""

    noted: dict[str, Any]

    def run(self, name: str, version: int, inputs: Mapping[str, Any], *rest: Any, **more: Any) -> Stage:
        if name != "item_tokens":
            return super().run(name, version, inputs, *rest, **more)
        self.noted = dict(inputs)
        raise StopIteration


def another(kind: str, value: Any) -> Any:
    """Another value that a setting may have."""
    if kind.startswith("str"):
        return next(choice for choice in kind.removeprefix("str: ").split(" | ") if choice != value)
    if kind.startswith("bool"):
        return not value
    if kind.startswith("list"):
        return [*value, 7]
    return value / 2 + 0.01 if kind.startswith("float") else value + 1 if value else 16


def test_every_setting_of_the_codes_makes_the_stage_anew(base: tuple[dict[str, Any], Tokenized]) -> None:
    config = Config("SASRecCodes", "tiny", config_dict=base[0])
    _, train_data, _, _ = prepared(config)
    store = Recorder(store_of(config).root)
    trained = fit_parts_of(config, store)("embedding_model")

    def noted() -> dict[str, Any]:
        with pytest.raises(StopIteration):
            tokenize_items(config, train_data._dataset, store, lambda _, look: trained)
        return store.noted

    before = noted()
    assert noted() == before
    text = (PROPERTIES / "item_tokens" / "overall.yaml").read_text()
    # Of LETTER's two weights, which this method refuses, test_letter tells.
    keys = set(re.findall(r"^(code_\w+):", text, re.MULTILINE))
    keys -= {"code_tokens", "code_cf_weight", "code_diversity_weight"}
    assert len(keys) > 30
    for key in sorted({*keys, "unseen_items"}):
        value = config[key]
        # An autoencoder has one distance and one residual, which are not those of this recipe.
        config[key] = "kmeans" if key == "code_method" else another(config.specs[key].text, value)
        assert noted() != before, key
        config[key] = value


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 7},
        {"embedding_layer": "e0"},
        {"embedding_model": "BPR"},
        {"embedding_model.embedding_size": 12},
        {"text_embedding": "last"},
        {"text_embedding_tokens": 3},
        {"item_text": "{genre}"},
        {"llm_train_steps": 3},
        {"llm_random_init": True},
    ],
    ids=str,
)
def test_what_the_points_and_texts_come_from_makes_the_stage_anew(
    base: tuple[dict[str, Any], Tokenized], changed: dict[str, Any]
) -> None:
    settings, made = base
    other = tokenized(settings | changed)
    assert not other.stage.cached and other.stage.fingerprint != made.stage.fingerprint
    # Not a mark alone: what is made of them is other, too.
    same = [np.array_equal(getattr(made.sources, name), getattr(other.sources, name)) for name in ("points", "texts")]
    assert not all(same) or made.tokens.fingerprint() != other.tokens.fingerprint()


def test_other_train_rows_make_the_stage_anew(base: tuple[dict[str, Any], Tokenized]) -> None:
    settings, made = base
    assert tokenized(settings | {"train_share": 0.8}).stage.fingerprint != made.stage.fingerprint


def test_how_sasrec_trains_does_not(base: tuple[dict[str, Any], Tokenized]) -> None:
    settings, made = base
    changed = {
        "learning_rate": 0.5, "hidden_size": 32, "epochs": 3, "item_input": "codes_and_id", "n_layers": 1,
        "train_batch_size": 16, "loss_type": "BCE", "topk": [10], "state": "ERROR",
    }  # fmt: skip
    found = tokenized(settings | changed)
    assert found.stage.cached and found.stage.fingerprint == made.stage.fingerprint
    assert all(line["cached"] for line in found.sources.lines)


def test_texts_that_have_no_part_do_not_either(tmp_path: Path) -> None:
    settings = quick(tmp_path, code_text_weight=0.0, unseen_items="embedding")
    made = tokenized(settings)
    assert made.sources.texts is None and [line["name"] for line in made.sources.lines] == ["embedding_model"]
    assert tokenized(settings | {"item_text": "{genre}", "llm_train_steps": 9}).stage.cached


# --- nothing looks at valid and test rows ----------------------------------------------------------------------------
COLD = {"cold_item_share": 0.3, "code_collisions": "keep"}


def write_world(target: Path, phase: int | None) -> Path:
    """Tiny with one phase's items dealt out anew among its rows, so that the same items are unseen.

    Train rows come first and the others in the order of their items, so that ids are the same.
    """
    config = Config("BPR", "tiny", config_dict={"output_dir": str(target / "saved")})
    dataset = create_dataset(config)
    split = dataset.make_split(config.split_protocol())
    users, ids = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    items = split.items.copy()
    had = set(zip(split.users.tolist(), items.tolist(), strict=True))
    rows = np.flatnonzero(split.phases == phase).tolist()
    for row, other in zip(rows[::2], rows[1::2], strict=False):
        if (split.users[row], items[other]) not in had and (split.users[other], items[row]) not in had:
            items[[row, other]] = items[[other, row]]
    trained = split.phases == TRAIN
    order = np.lexsort((np.where(trained, 0, items), ~trained))
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"{users[split.users[row]]}\t{ids[items[row]]}\t1\t{split.ranks[row]}" for row in order]
    (target / "tiny").mkdir(parents=True)
    (target / "tiny" / "tiny.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "dataset/tiny/tiny.item", target / "tiny/tiny.item")
    return target


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [write_world(tmp_path_factory.mktemp("world"), phase) for phase in (None, TEST, VALID)]


@pytest.mark.parametrize("unseen", ["text", "projection", "embedding"])
def test_items_without_train_rows_have_codes_that_know_nothing_of_valid_and_test(
    worlds: list[Path], unseen: str
) -> None:
    made, rows = [], set()
    for world in worlds:
        settings = quick(world / "saved", **COLD, data_path=str(world), unseen_items=unseen)
        made.append(tokenized(settings))
        rows.add((world / "tiny" / "tiny.inter").read_text())
        assert raw_ids_of(data_path=str(world)) == raw_ids_of(data_path=str(worlds[0]))
    assert len(rows) == 3
    plain, *swapped = made
    assert (~plain.sources.seen[1:]).sum() > 20
    for other in swapped:
        assert np.array_equal(plain.sources.seen, other.sources.seen)
        assert np.array_equal(plain.sources.points, other.sources.points)
        assert torch.equal(plain.tokens.codes, other.tokens.codes)


def test_the_codes_of_unseen_items_come_from_where_is_said(tmp_path: Path) -> None:
    made = {
        kind: tokenized(quick(tmp_path, **COLD, code_epochs=60, unseen_items=kind))
        for kind in ("text", "projection", "embedding")
    }
    seen = made["text"].sources.seen
    for one in made.values():
        assert torch.equal(one.tokens.codes[seen], made["text"].tokens.codes[seen])
    for first, second in (("text", "projection"), ("projection", "embedding"), ("embedding", "text")):
        differ = (made[first].tokens.codes[~seen] != made[second].tokens.codes[~seen]).any(dim=1)
        assert differ.float().mean() > 0.3, (first, second)
    unseen = ~seen & (np.arange(len(seen)) > 0)
    assert not np.isclose(made["text"].sources.points, made["embedding"].sources.points)[unseen].any(axis=1).all()
    # What the projection makes of a text is in nobody's table.
    assert np.array_equal(made["projection"].sources.points, made["embedding"].sources.points)


# --- no codebook: raw ids, tokens that were given --------------------------------------------------------------------
def test_one_level_is_raw_ids_and_trains_nothing(tmp_path: Path) -> None:
    made = tokenized(quick(tmp_path, code_levels=1))
    assert made.tokens.kind == "raw" and made.tokens.size == 80
    assert made.sources.points is None and not made.sources.parts
    assert [name.partition("-")[0] for name in stages_in(tmp_path)] == ["item_tokens"]
    raw = tokenized(quick(tmp_path, item_tokens="raw"))
    assert raw.stage.cached and raw.tokens.fingerprint() == made.tokens.fingerprint()


def test_tokens_that_are_there_already(finished: Path, tmp_path: Path) -> None:
    given = {name: tokenized(quick(tmp_path, code_tokens=str(finished / name))) for name in (".", INDEX)}
    wanted = read_index(finished / INDEX, raw_ids_of())
    for made in given.values():
        assert torch.equal(made.tokens.codes, wanted.codes) and not made.sources.parts
    assert all(name.startswith("item_tokens") for name in stages_in(tmp_path))
    result = run("SASRecCodes", "tiny", config_dict=quick(tmp_path, code_tokens=str(finished)))
    assert [stage["name"] for stage in result["stages"]] == ["item_tokens", "train-SASRecCodes"]
    folder = Path(result["result_file"]).parent
    assert (folder / INDEX).read_bytes() == (finished / INDEX).read_bytes() and not (folder / CARD).exists()


def test_tokens_made_from_other_rows_are_refused(finished: Path, tmp_path: Path) -> None:
    """Another split's train rows may be test rows here."""
    for more in ({"cold_item_share": 0.2}, {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO"}}):
        with pytest.raises(UserError, match="made from other train rows than this run's"):
            tokenized(quick(tmp_path, code_tokens=str(finished), **more))
    known = tokenized(quick(tmp_path, code_tokens=str(finished)))
    unknown = tokenized(quick(tmp_path, code_tokens=str(finished / INDEX)))
    assert (known.stage.folder / ORIGIN).is_file() and not (unknown.stage.folder / ORIGIN).exists()


def test_known_tokens_are_refused_at_once_where_a_second_training_would_refuse_them(
    finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"refit_on_valid: true trains again .* leave code_tokens out") as caught:
        tokenized(quick(tmp_path, code_tokens=str(finished), refit_on_valid=True))
    assert "\n" not in str(caught.value) and not stages_in(tmp_path)
    # Where no valid row is there, nothing is trained again; and of a file alone nothing is known.
    without = {"eval_args": {"split": {"LS": "test_only"}, "order": "TO"}}
    made = tokenized(quick(tmp_path, item_tokens="raw", **without)).stage.folder
    tokenized(quick(tmp_path, code_tokens=str(made), refit_on_valid=True, **without))
    tokenized(quick(tmp_path, code_tokens=str(finished / INDEX), refit_on_valid=True))


def damage(folder: Path, name: str, content: str | bytes | None) -> Path:
    """A copy of the run with one file cut short (``None``) or replaced."""
    file = folder / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content.encode())
    return file if name == INDEX else folder


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            INDEX,
            '{"i1": ["<a_1>", "<b_2>"], "i100": ["<a_1>", "<b_3>"]}',
            r"'i100', entry 2 of 2, is not.*did you mean 'i10'",
        ),
        (INDEX, '{"i1": ["<a_1>", "<b_2>"]}', r"has no codes for 79 of the data set's 80 items"),
        (INDEX, None, "is not JSON"),
        (TOKENS, None, "cannot be read"),
        (TOKENS, "[]", "cannot be read"),
        ("item_tokens.safetensors", None, "cannot be read"),
    ],
)
def test_tokens_that_cannot_be_had_are_told_in_one_line(
    finished: Path, tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    path = damage(tmp_path / "copy", name, content)
    with pytest.raises(UserError, match=says) as caught:
        run("SASRecCodes", "tiny", config_dict=quick(tmp_path / "saved", code_tokens=str(path)))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "saved").iterdir()) == []


def test_tokens_of_another_data_set(finished: Path, small_data: Path, tmp_path: Path) -> None:
    more = {"data_path": str(small_data), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    for path, says in ((finished, "another data set or item pool"), (finished / INDEX, "item 'i.*is not in the data")):
        with pytest.raises(UserError, match=says):
            tokenized(quick(tmp_path, code_tokens=str(path), **more), "small")
    with pytest.raises(UserError, match="code_shuffle swaps the codes of a codebook, and none is made"):
        tokenized(quick(tmp_path, code_tokens=str(finished), code_shuffle=True))
    for path in (finished.parent, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"holds no item tokens|there is no index file"):
            tokenized(quick(tmp_path, code_tokens=str(path)))
    assert not stages_in(tmp_path)


# --- refused ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"code_size": 100}, "fewer items than codes: 80 items for 100 codes"),
        ({"code_size": 100, "item_tokens": "lcrec"}, "fewer items than codes: 80 items for 100 codes"),
        ({"code_levels": 2}, r"80 items cannot have codes of their own: 2 level\(s\) of 8 codes make 64"),
        ({"code_kmeans_points": 3}, "code_kmeans_points 3 is below the 8 codes"),
        ({"code_kmeans_points": 3, "item_tokens": "ed"}, "code_kmeans_points is 3, too few"),
        ({"code_epochs": 0}, "code_epochs should be at least 1"),
        ({"code_sinkhorn_levels": 5, "item_tokens": "ed"}, "code_sinkhorn_levels is 5"),
        ({"code_layers": [8, 0], "item_tokens": "ed"}, r"code_layers should be.*\[8, 0\]"),
        ({"code_cf_weight": 0.1}, "code_cf_weight above 0 is of code_method: rqvae, and not of alignment"),
        ({"code_diversity_weight": 0.1, "item_tokens": "kmeans"}, "code_diversity_weight above 0 .* not of kmeans"),
        ({"code_layers": ["wide"], "item_tokens": "ed"}, "code_layers should be"),
        ({**COLD, "unseen_items": "projection", "item_tokens": "kmeans"}, "unseen_items: projection needs"),
        ({**COLD, "unseen_items": "projection", "code_text_weight": 0.0}, "unseen_items: projection needs"),
        ({"item_text": ""}, r"has no template; set item_text: .*; or leave texts out: code_text_weight=0$"),
        (
            {"item_text": "", "item_tokens": "tiger"},
            r"has no template; set item_text: '\{column\}' with .*tiny.item$",
        ),
        ({"item_text": "{titel}"}, "no column 'titel'; did you mean 'title'"),
        ({"llm": "no/such/folder"}, "no/such/folder"),
        ({"code_shuffle": True, "item_tokens": "raw"}, "code_shuffle swaps the codes of a codebook, and none is made"),
        ({"code_even_levels": 1, "code_sinkhorn_epsilon": 0.001}, "code_sinkhorn_epsilon"),
    ],
    ids=str,
)
def test_refused_before_anything_trains(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        run("SASRecCodes", "tiny", config_dict=quick(tmp_path, **settings))
    assert "\n" not in str(caught.value) and not stages_in(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_what_is_said_about_missing_texts_helps(tmp_path: Path, weight: float) -> None:
    """Some items are unseen, so texts are asked for even where codes are not aligned with them."""
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    shutil.copy(ROOT / "dataset/tiny/tiny.inter", tmp_path / "data/tiny/tiny.inter")
    settings = quick(tmp_path / "saved", data_path=str(tmp_path / "data"), code_text_weight=weight, **COLD)
    with pytest.raises(UserError, match=r"tiny.item.*or leave texts out: ") as caught:
        tokenized(settings)
    assert not stages_in(tmp_path)
    advice = str(caught.value).partition("leave texts out: ")[2].split()
    assert tokenized(settings, command_line=tuple(f"--{way}" for way in advice)).sources.texts is None


def test_embeddings_that_are_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: DCCF, layer: str = "final") -> tuple[torch.Tensor, torch.Tensor]:
        users, items = self.forward()
        return users, torch.where(torch.arange(len(items))[:, None] < 4, torch.nan, items)

    monkeypatch.setattr(DCCF, "graph_embeddings", broken)
    with pytest.raises(UserError, match="4 item embeddings of DCCF are NaN or infinite") as caught:
        tokenized(quick(tmp_path))
    assert "\n" not in str(caught.value)
    assert not any(name.startswith("item_tokens") for name in stages_in(tmp_path))


@pytest.mark.parametrize("recipe", ["literal", "ed"])
def test_a_collapse_stops_with_one_line(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def three_alike(self: DCCF, layer: str = "final") -> tuple[torch.Tensor, torch.Tensor]:
        users, items = self.forward()
        return users, torch.eye(items.shape[1])[torch.arange(len(items)) % 3]

    monkeypatch.setattr(DCCF, "graph_embeddings", three_alike)
    settings = quick(tmp_path, item_tokens=recipe, code_least_usage=1.0)
    status = main(
        ["run", "--model=SASRecCodes", "--dataset=tiny", *(f"--{key}={value}" for key, value in settings.items())]
    )
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recbole-llm: ")]
    assert status == 2 and len(told) == 1
    assert re.search(r"collapsed: at level 1 items use [123] of 8 codes \(.*%, the least allowed is 100.0%\)", told[0])
    # The log of what happened is all that is left of the run.
    runs = [folder for folder in tmp_path.iterdir() if folder.name != "cache"]
    assert [[file.name for file in folder.iterdir()] for folder in runs] == [["run.log"]]
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(("codebook", "item_tokens."))]
    assert not any(name.startswith("item_tokens") for name in stages_in(tmp_path))
    with pytest.raises(TrainingStoppedError):
        tokenized(settings)
    tokenized(settings | {"code_least_usage": 0.0})


# --- going on --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["literal", "ed"])
def test_a_stage_that_was_cut_off_ends_with_the_same_codes(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    more = {
        "item_tokens": recipe,
        "code_epochs": 6,
        "code_batch_size": 30,
        "code_dropout": 0.3,
        "code_learning_rate": 0.05,
    }
    whole = tokenized(quick(tmp_path / "whole", **more))
    monkeypatch.setattr(state, "RESUME_SECONDS", 0.0)
    owner, name = (RQVAE, "losses") if recipe == "ed" else (alignment, "step")
    honest, calls = getattr(owner, name), {"made": 0, "last": 10}

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        calls["made"] += 1
        if calls["made"] > calls["last"]:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)

    settings = quick(tmp_path / "saved", **more)
    monkeypatch.setattr(owner, name, cut_off)
    with pytest.raises(KeyboardInterrupt):
        tokenized(settings)
    calls |= {"made": 0, "last": 99}
    with caplog.at_level("INFO", "recbole_llm"):
        resumed = tokenized(settings)
    assert "item_tokens: going on where it was cut off" in caplog.text
    # Three batches an epoch: three of six epochs stood in the file.
    assert 9 <= calls["made"] < 12
    assert resumed.tokens.fingerprint() == whole.tokens.fingerprint()
    assert not list(resumed.stage.folder.glob("resume*"))


# --- inspect codebook ------------------------------------------------------------------------------------------------
def test_the_card_of_a_run(finished: Path) -> None:
    for path in (finished, finished / "result.json"):
        text = inspect(["codebook", str(path)])
        assert text.startswith("80 items with tokens; levels: 4 of 8 codes each")
        picture = finished / "codebook.png"
        assert str(finished / CARD) in text and str(picture) in text
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    picture.mkdir()
    assert f"picture     {picture} cannot be written (" in inspect(["codebook", str(finished)])
    picture.rmdir()
    with pytest.raises(UserError, match="'--fast' is not understood here"):
        inspect(["codebook", str(finished), "--fast"])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", "3", '{"sizes": []}', "half", "neighbours", "usage"])
def test_a_damaged_card_is_told_in_one_line(finished: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / CARD
    whole = (finished / CARD).read_text()
    if content in ("neighbours", "usage"):
        card = json.loads(whole)
        whole = json.dumps(card | {content: [card[content]] if content == "usage" else []})
    file.write_text(whole[: len(whole) // 2] if content == "half" else whole if len(content) > 4 else content)
    if content.startswith('{"'):
        file.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{file} cannot be read")) as caught:
        inspect(["codebook", str(tmp_path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        ("SASRecCodes", {"code_levels": 1}, "SASRecCodes, its tokens are raw ids"),
        ("SASRecCodes", {"item_tokens": "random", "code_method": "random"}, "SASRecCodes, its tokens are random ids"),
        ("Pop", {}, "Pop, it reads no item tok"),
    ],
)
def test_a_run_without_a_codebook(tmp_path: Path, model: str, settings: dict[str, Any], says: str) -> None:
    shared = {
        key: value
        for key, value in quick(tmp_path).items()
        if model == "SASRecCodes" or key in ("output_dir", "show_progress", "tensorboard", "gpu_id")
    }
    result = run(model, "tiny", config_dict=shared | settings)
    with pytest.raises(UserError, match=f"has no codebook: {says}"):
        inspect(["codebook", str(Path(result["result_file"]).parent)])
    with pytest.raises(UserError, match=r"no result\.json"):
        inspect(["codebook", str(tmp_path / "nowhere")])


# --- embeddings ------------------------------------------------------------------------------------------------------
def trained(model: str, output: Path) -> Any:
    settings = {"output_dir": str(output), "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 1}
    small = {"hidden_size": 16, "inner_size": 16} if model == "SASRec" else {}
    config = Config(model, "tiny", config_dict=settings | small | {"eval_step": 0})
    return fit(config, store_of(config))


@pytest.mark.parametrize("model", ["DCCF", "LightGCN", "BPR"])
def test_final_embeddings_are_what_a_model_scores_with(model: str, tmp_path: Path) -> None:
    fitted = trained(model, tmp_path)
    made = item_embeddings(fitted.model, model, "final")
    users = graph_embeddings(fitted.model, model)[0]
    asked = torch.arange(1, 6)
    scores = fitted.model.full_sort_predict({"user_id": asked}).view(5, -1).detach().numpy()
    np.testing.assert_allclose(users[1:6] @ made.T, scores, atol=1e-5)
    assert made.dtype == np.float32
    below = item_embeddings(fitted.model, model, "e0")
    np.testing.assert_array_equal(below, fitted.model.item_embedding.weight.detach().numpy())
    assert np.array_equal(below, made) == (model == "BPR")


def test_a_sequential_models_embeddings_are_its_table(tmp_path: Path) -> None:
    fitted = trained("SASRec", tmp_path)
    for layer in ("final", "e0"):
        made = item_embeddings(fitted.model, "SASRec", layer)
        np.testing.assert_array_equal(made, fitted.model.item_embedding.weight[:81].detach().numpy())
    settings = quick(tmp_path, embedding_model="SASRec")
    del settings["embedding_model.embedding_size"]
    before = tokenized(settings | COLD | {"unseen_items": "projection"}).sources
    table = before.parts["embedding_model"].model.item_embedding.weight[:81].detach().numpy()
    again = tokenized(settings | COLD | {"unseen_items": "embedding"}).sources
    np.testing.assert_array_equal(again.points, table)


def test_a_model_without_a_table_is_refused(tmp_path: Path) -> None:
    for layer in ("final", "e0"):
        with pytest.raises(UserError, match=r"embedding_model: EASE has no .*; take one such as") as caught:
            item_embeddings(trained("EASE", tmp_path).model, "EASE", layer)
        assert "\n" not in str(caught.value)


class WithBatches(TinyBackbone):
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def test_text_embeddings_are_means_of_the_input_table() -> None:
    backbone = WithBatches(llama())
    texts = ["", "one", "", "two words", "a text that is cut, as it is long", ""]
    table = backbone.embed_tokens.weight
    made = text_embeddings(backbone, texts, "input", 5)
    assert made.dtype == np.float32 and made.shape == (6, 32)
    for row, text in zip(made, texts, strict=True):
        ids = backbone.encode(text)[:5]
        assert not {backbone.bos_id, backbone.eos_id, backbone.pad_id} & set(ids)
        wanted = np.zeros(32)
        for token in ids:
            wanted += table[token].numpy() / len(ids)
        np.testing.assert_allclose(row, wanted, atol=1e-6)
    assert (text_embeddings(backbone, ["", ""], "input", 5) == 0).all()
    last = text_embeddings(backbone, texts, "last", 5)
    for row, text in zip(last, texts, strict=True):
        ids = torch.tensor([[backbone.bos_id, *backbone.encode(text)[:5]]])
        states = backbone.decoder(input_ids=ids).last_hidden_state[0, 1:]
        np.testing.assert_allclose(row, states.mean(0).numpy() if text else np.zeros(32), atol=1e-5)


def test_texts_that_were_read_before_a_cut_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_projector, "BATCH", 2)
    monkeypatch.setattr(state, "RESUME_SECONDS", 0.0)
    texts = ["", "one", "two words", "three words here", "", "a text that is longer", "and one more", "last"]
    states, calls = text_projector.text_states, []

    def embed(stops: int, resume: ResumeFile | None) -> tuple[np.ndarray, int]:
        backbone = WithBatches(llama())
        calls.clear()

        def read(decoder: torch.nn.Module, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            if len(calls) == stops:
                raise KeyboardInterrupt
            calls.append(ids)
            backbone.tokens_read += ids.numel()
            return states(decoder, ids, lengths)

        monkeypatch.setattr(text_projector, "text_states", read)
        return text_embeddings(backbone, texts, "last", 5, resume), backbone.tokens_read

    whole, tokens = embed(9, None)
    resume = ResumeFile(tmp_path / "resume")
    with pytest.raises(KeyboardInterrupt):
        embed(2, resume)
    gone_on, read = embed(9, resume)
    np.testing.assert_array_equal(gone_on, whole)
    assert len(calls) == 1 and read == tokens
