"""What bad input gets: one plain line, exit 2, and nothing half-written."""

from __future__ import annotations

import errno
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, small_ml100k

from recbole_llm.cli import HELP, VERBS, main
from recbole_llm.config import Config
from recbole_llm.data import create_dataset, data_preparation
from recbole_llm.errors import UserError
from recbole_llm.training.runs import run


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command line, expect exit 2 and one or two lines without a traceback."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err.strip()
    said = [line for line in error.splitlines() if line.startswith("recbole-llm: ")]
    assert len(said) == 1 and "Traceback" not in error
    return said[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--model=LihgtGCN", "--dataset=ml-100k"], ["unknown model 'LihgtGCN'", "'LightGCN'"]),
        (["run", "--model=BPR", "--dataset=ml-100kk"], ["no data set 'ml-100kk'", "'ml-100k'"]),
        (["run", "--model=BPR", "--dataset=ml-100k", "--epoch=3"], ["unknown setting 'epoch'", "'epochs'"]),
        (["run", "--model=BPR", "--dataset=ml-100k", "--metrics=[NDGC]"], ["unknown metric 'NDGC'", "'ndcg'"]),
        (["run", "--model=BPR", "--dataset=ml-100k", "--valid_metric=MAP@10"], ["valid_metric", "not among"]),
        (["run", "--model=BPR", "--dataset=ml-100k", "--epochs=many"], ["epochs should be int >= 0", "'many'"]),
        (["run", "--model=BPR", "--dataset=ml-100k", "--epochs=-1"], ["epochs should be int >= 0"]),
        (["run", "--model=BPR", "--dataset=ml-100k", "--learning_rate=0"], ["learning_rate should be float"]),
        (["run", "--model=BPR", "--dataset=ml-100k", "--topk=[0]"], ["topk"]),
        (["run", "--model=BPR", "--dataset=ml-100k", "--policy=unfied"], ["policy should be"]),
        (["run", "--model=BPR", "--dataset=ml-100k", "--eval_args={order: XX}"], ["eval_args.order", "TO, RO"]),
        (["run", "--model=BPR", "--dataset=ml-100k", "--eval_args={mode: uni100}"], ["whole catalogue"]),
        (["run", "--model=BPR", "--dataset=ml-100k", "--config_files=nowhere.yaml"], ["nowhere.yaml does not exist"]),
        (["run", "--model=GLTA", "--dataset=ml-100k", "--graph_modle.epochs=3"], ["no part 'graph_modle'"]),
        (["run", "--model=GLTA", "--dataset=ml-100k", "--graph_model.epoch=3"], ["'graph_model.epoch'", "'epochs'"]),
        (["run", "--model=GLTA", "--dataset=ml-100k", "--graph_model=LightGNC"], ["'LightGNC'", "'LightGCN'"]),
        (["run", "--model=BPR"], ["no dataset is named", "a folder in dataset/"]),
        (["run", "--model=BPR", "--dataset=tiny/"], ["a folder's name", "'tiny/'"]),
        (["run", "--model=BPR", "--dataset="], ["a folder's name"]),
        (["run", "--model=BPR", "--dataset=tiny", "--config_files=."], ["settings file . is a folder"]),
        (["run", "--model=BPR", "--dataset=tiny", "--config_files='a"], ["config_files", "quotation"]),
        (["run", "--model=BPR", "--dataset=tiny", "--eval_args={order: TO, order: RO}"], ["'order' stands twice"]),
        (["leaderboard", "--models=Pop,EASE,Pop", "--datasets=tiny"], ["--models names Pop twice"]),
        (["leaderboard", "--models=EASE", "--datasets=tiny", "--EASY.epochs=1"], ["--EASY.epochs=1: 'EASY'"]),
        (["run", "BPR"], ["'BPR' is not understood", "--key=value"]),
        (["run", "--model=BPR", "--dataset=tiny", "--user_inter_num_interval=[5,inf"], ["num_interval should be"]),
        (["run", "--model=BPR", "--dataset=tiny", "--val_interval={rating: foo}"], ["val_interval.rating"]),
        (["run", "--model=BPR", "--dataset=tiny", "--lr=0.1"], ["did you mean 'learning_rate'"]),
        (["run", "--model=BPR", "--dataset=tiny", "--patience=3"], ["did you mean 'stopping_step'"]),
        (["run", "--model=BPR", "--dataset=tiny", "--blargh_q=3"], ["unknown setting 'blargh_q'", "the nearest"]),
        (["run", "--model=GLTA", "--dataset=tiny", "--graph_model.lr=3"], ["did you mean 'learning_rate'"]),
        (["run", "--model=BPR", "--dataset=tiny", "--val_interval={rating: 3}"], ["val_interval.rating", "is 3"]),
        (["run", "--model=BPR", "--dataset=tiny", "--val_interval={rating: ~}"], ["val_interval.rating", "is None"]),
        (["run", "--model=BPR", "--dataset=tiny", "--val_interval={rating: [3]}"], ["rating should be an interval"]),
        (["run", "--model=BPR", "--dataset=tiny", "--val_interval={user_id: '[3,4]'}"], ["user_id should be a list"]),
        (["run", "--model=BPR", "--dataset=tiny", "--val_interval={ratin: '[3,4]'}"], ["ratin", "'rating'"]),
        (["run", "--model=BPR", "--dataset=tiny", "--seq_len={ratin: 3}"], ["seq_len.ratin", "'rating'"]),
        (["run", "--model=BPR", "--dataset=tiny", "--seq_len={rating: 3}"], ["seq_len.rating", "one value a row"]),
        (["run", "--model=BPR", "--dataset=tiny", "--threshold={rating: high}"], ["threshold.rating", "'high'"]),
        (["run", "--model=BPR", "--dataset=tiny", "--load_col={item: [item_id]}"], ["load_col", "add inter:"]),
        (["run", "--model=BPR", "--dataset=tiny", "--load_col={inter: ~}"], ["load_col.inter", "is None"]),
        (["run", "--model=BPR", "--dataset=tiny", "--train_neg_sample_args={distribtion: x}"], ["'distribution'"]),
        (["run", "--model=BPR", "--dataset=tiny", "--train_neg_sample_args={candidate_num: -3}"], ["candidate_num"]),
        (
            ["run", "--model=BPR", "--dataset=tiny", "--train_neg_sample_args={dynamic: 2, candidate_num: 3}"],
            ["dynamic should be"],
        ),
        (["run", "--model=BPR", "--dataset=tiny", "--encoding=utf-16"], ["line 1"]),
        (
            ["run", "--model=BPR", "--dataset=tiny", "--short_users=train", "--eval_args={split: {TS: [8, 1, 1]}}"],
            ["short_users: train"],
        ),
        (
            ["run", "--model=BPR", "--dataset=tiny", "--time_scope=user",
             "--eval_args={split: {RS: [8, 1, 1]}, group_by: none}"],
            ["positions inside a user", "group_by: user"],
        ),
        (["run", "--model=BPR", "--dataset=tiny", "--learner=foo"], ["learner should be"]),
        (["run", "--model=BPR", "--dataset=tiny", "--train_neg_sample_args=None"], ["BPR learns from negatives"]),
        (["run", "--model=BPR", "--dataset=tiny", "--rm_dup_inter=foo"], ["rm_dup_inter should be"]),
        (["run", "--model=BPR", "--dataset=tiny", "--seed=99999999999999999999"], ["seed should be"]),
        (["run", "--model=BPR", "--dataset=tiny", "--topk=[10,1000]"], ["1000 items, but only 80"]),
        (["run", "--model=BPR", "--dataset=tiny", "--eval_args={split: {RS: [0.8, 0.1, .inf]}}"], ["three shares"]),
        (["run", "--model=BPR", "--dataset=tiny", "--encoding=utf8x"], ["there is no 'utf8x'"]),
        (["run", "--model=BPR", "--dataset=tiny", "--field_separator=::"], ["should be one ASCII character", "'::'"]),
        (["run", "--model=BPR", "--dataset=tiny", "--field_separator="], ["should be one ASCII character"]),
        (["run", "--model=BPR", "--dataset=tiny", "--learner=sparse_adam"], ["sparse gradients", "take adam"]),
        (["run", "--model=BPR", "--dataset=tiny", "--topk=[]"], ["topk is empty"]),
        (["run", "--model=BPR", "--dataset=tiny", "--eval_args={mode: [full]}"], ["whole catalogue"]),
        (["run", "--model=BPR", "--dataset=tiny", "--load_col={inter: 5}"], ["load_col.inter should be a list"]),
        (["run", "--model=BPR", "--dataset=tiny", "--seq_len={title: x}"], ["seq_len.title should be a whole number"]),
        (["run", "--model=SASRec", "--dataset=tiny", "--hidden_dropout_prob=1.5"], ["hidden_dropout_prob", "0..1"]),
        (["run", "--model=SASRecAllPositions", "--dataset=tiny", "--attn_dropout_prob=-0.1"], ["attn_dropout_prob"]),
        (["run", "--model=BERT4RecWindows", "--dataset=tiny", "--n_layers=0"], ["n_layers", "int >= 1"]),
        (["run", "--model=SASRec", "--dataset=tiny", "--initializer_range=-1"], ["initializer_range", "float > 0"]),
        (["run", "--model=SGL", "--dataset=tiny", "--drop_ratio=1.5"], ["drop_ratio", "0..0.99"]),
        (["run", "--model=SGL", "--dataset=tiny", "--type=EDD"], ["type should be one of ED, ND, RW", "'EDD'", "'ED'"]),
        (["run", "--model=NAIS", "--dataset=tiny", "--algorithm=sum"], ["algorithm should be one of prod, concat"]),
        (["run", "--model=NNCF", "--dataset=tiny", "--neigh_info_method=knm"], ["neigh_info_method", "'knn'"]),
        (["run", "--model=BERT4Rec", "--dataset=tiny", "--MAX_ITEM_LIST_LENGTH=4"], ["mask_ratio 0.2 of MAX_"]),
        (["run", "--model=HCCF", "--dataset=tiny", "--clip_grad_norm={max_norm: 1, foo: 2}"], ["clip_grad_norm"]),
        (["run", "--model=BPR", "--dataset=tiny", "--train_neg_sample_args={alpha: abc}"], ["alpha should be a"]),
        (["run", "--model=SASRecAllPositions", "--dataset=tiny", "--train_share=0.01"], ["no training interaction"]),
        (["run", "--model=BPR", "--dataset=tiny", "--device=cuda:3"], ["device is not read here", "gpu_id"]),
        (["run", "--model=BPR", "--dataset=tiny", "--nproc=4"], ["nproc is not read here", "accelerate launch"]),
        (["run", "--model=BPR", "--dataset=tiny", "--checkpoint_dir=x"], ["checkpoint_dir is not read", "output_dir"]),
        (["run", "--model=BPR", "--dataset=tiny", "--save_dataset=true"], ["save_dataset is not read here"]),
        (["run", "--model=BPR", "--dataset=tiny", "--policy=recbole", "--dataloaders_save_path=x"], ["not read here"]),
        (["run", "--model=NAIS", "--dataset=tiny", "--pretrain_path=no.pth"], ["pretrain_path: there is no file no"]),
        (["run", "--model=LDiffRec", "--dataset=tiny", "--n_cate=2"], ["n_cate above 1", "pickle"]),
        (
            ["run", "--model=BPR", "--dataset=tiny",
             "--train_neg_sample_args={distribution: uniform, sample_num: 1, dynamic: true}"],
            ["candidate_num"],
        ),
        (["run", "--model=GLTA", "--dataset=tiny", "--llm_quantization=nf4"], ["bitsandbytes"]),
        (["run", "--model=GLTA", "--dataset=tiny", "--graph_model=GLTA"], ["graph_model should be"]),
        (["run", "--model=GLTA", "--dataset=tiny", "--graph_model.eval_args={order: RO}"], ["LightGCN on another"]),
        (["run", "--model=AlignTokenRec", "--dataset=tiny", "--embedding_model.split_seed=1"], ["DCCF on another"]),
        (["inspect", "dataset", "tiny", "--policy=recbole"], ["policy: unified"]),
        (["rum", "--model=BPR"], ["unknown verb 'rum'", "'run'"]),
        (["--model=BPR"], ["recbole-llm run --model=BPR"]),
        (["inspect", "datsaet", "ml-100k"], ["'dataset'"]),
        (["compare", "nowhere", "nowhere"], ["no result.json in nowhere"]),
        (["models", "--kind=lnguage"], ["kinds: "]),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *arguments)
    for word in words:
        assert word in line
    assert not (tmp_path / "saved").exists() or not list((tmp_path / "saved").iterdir())


def test_values_are_yaml_and_never_python() -> None:
    config = Config(
        "BPR",
        "ml-100k",
        command_line=["--topk=[3, 7]", "--valid_metric=NDCG@3", "--data_path=__import__('os').getcwd()"],
    )
    assert config["topk"] == [3, 7]
    assert "__import__" in str(config.external_config_dict["data_path"])


@pytest.mark.parametrize("place", ["beside the data", "command line"])
def test_a_teacher_is_a_name_and_no_python(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "dataset" / "tiny", tmp_path / "dataset" / "mine")
    for file in (tmp_path / "dataset" / "mine").glob("tiny.*"):
        file.rename(file.with_name(f"mine{file.suffix}"))
    code = f"open('{tmp_path / 'evaluated'}', 'w')"
    given = ["run", "--model=KD_DAGFM", "--dataset=mine", "--policy=recbole", "--metrics=[AUC]", "--valid_metric=AUC"]
    if place == "command line":
        given.append(f"--teacher={code}")
    else:
        (tmp_path / "dataset" / "mine" / "mine.yaml").write_text(f'teacher: "{code}"\n', encoding="utf-8")
    assert "teacher should be one of" in refused(capsys, *given)
    assert not (tmp_path / "evaluated").exists()


def test_loaders_of_an_earlier_run_are_not_unpickled(tmp_path: Path, small_data: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "unpickled"), "w")

    path = tmp_path / "small-for-BPR-dataloader.pth"
    path.write_bytes(pickle.dumps([(Evil(), None)] * 3))
    config = Config("BPR", "small", config_dict={
        "policy": "recbole", "output_dir": str(tmp_path), "data_path": str(small_data), "gpu_id": "",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    })  # fmt: skip
    train_data, _, _ = data_preparation(config, create_dataset(config))
    assert len(train_data) and not (tmp_path / "unpickled").exists()


def test_settings_files_are_a_list_or_words(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("epochs: 7\n", encoding="utf-8")
    for files in (str(tmp_path / "a.yaml"), [str(tmp_path / "a.yaml")]):
        assert Config("BPR", "tiny", config_dict={"config_files": files})["epochs"] == 7
    for files in ([str(tmp_path / "b.yaml")], [3]):
        with pytest.raises(UserError, match=r"b\.yaml does not exist|should be a list of files"):
            Config("BPR", "tiny", config_dict={"config_files": files})
    with pytest.raises(UserError, match="model should be a name or a class, but is 5"):
        Config(5, "tiny")


def test_a_missing_llm_folder_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "llama-2-7b").mkdir()
    line = refused(
        capsys,
        "run",
        "--model=GLTA",
        "--dataset=tiny",
        f"--llm={tmp_path}/lama-2-7b",
        f"--output_dir={tmp_path}/saved",
        "--graph_model.epochs=1",
    )
    assert "lama-2-7b" in line and "llama-2-7b" in line


def broken(tmp_path: Path, change: Any) -> dict[str, Any]:
    folder = small_ml100k(tmp_path / "data", users=8)
    file = folder / "small" / "small.inter"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(change(lines)) + "\n", encoding="utf-8")
    return {
        "data_path": str(folder),
        "output_dir": str(tmp_path / "saved"),
        "epochs": 1,
        "show_progress": False,
        "tensorboard": False,
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [*lines[:3], lines[3] + "\textra", *lines[4:]], r"line 4: 5 fields where the header has 4"),
        (lambda lines: [*lines[:3], "1\t2", *lines[4:]], r"small.inter, line 4: 2 fields"),
        (lambda lines: [*lines[:5], "1\t2\t3\tyesterday", *lines[6:]], r"line 6, column 'timestamp': 'yesterday'"),
        (lambda lines: [lines[0].replace("user_id:token", "uesr_id:token"), *lines[1:]], r"'user_id'.*mean 'uesr_id'"),
        (lambda lines: [lines[0].replace("stamp:float", "stamp:token"), *lines[1:]], r"should be timestamp:float, not"),
        (lambda lines: [lines[0].replace("item_id:token", "item_id:token_seq"), *lines[1:]], r"item_id:token, not"),
        (lambda lines: [lines[0].replace("user_id:token", "user_id:float"), *lines[1:]], r"user_id:token, not :float"),
        (lambda lines: [lines[0].replace(":float", ""), *lines[1:]], r"line 1: column 'rating' should read name:type"),
        (lambda lines: [*lines[:5], "1\t2\t3\t", *lines[6:]], r"1 interactions have no timestamp"),
        (lambda lines: [*lines[:5], "1\0a\t2\t3\t4", *lines[6:]], r"line 6: a null character"),
    ],
)  # fmt: skip
def test_a_broken_atomic_file_is_named_by_line_and_column(tmp_path: Path, change: Any, words: str) -> None:
    settings = broken(tmp_path, change) | {"load_col": {"inter": "*"}}
    with pytest.raises(UserError, match=words):
        run("BPR", "small", config_dict=settings)
    assert not list((tmp_path / "saved").rglob("result.json"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"encoding": "hex"}, "encoding: there is no 'hex'"),
        ({"encoding": 5}, "encoding: there is no '5'"),
        ({"field_separator": "\u00a6"}, "field_separator should be one ASCII character"),
        ({"seq_separator": ""}, "seq_separator should be"),
    ],
)
def test_how_a_file_is_read_is_refused_in_one_line(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run("BPR", "small", config_dict=broken(tmp_path, lambda lines: lines) | settings)


def test_no_timestamp_under_an_order_by_time(tmp_path: Path) -> None:
    settings = broken(tmp_path, lambda lines: lines) | {"load_col": {"inter": ["user_id", "item_id"]}}
    with pytest.raises(UserError, match="but load_col leaves it out"):
        run("BPR", "small", config_dict=settings)


def test_no_item_text_for_a_model_that_needs_it(tmp_path: Path) -> None:
    settings = broken(tmp_path, lambda lines: lines) | {
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "graph_model.epochs": 1,
    }
    with pytest.raises(UserError, match="item_text"):
        run("GLTA", "small", config_dict=settings)
    (tmp_path / "data" / "small" / "small.item").unlink()
    with pytest.raises(UserError, match=r"small\.item"):
        run("GLTA", "small", config_dict=settings | {"item_text": "{movie_title}"})


def test_users_too_short_for_the_split(tmp_path: Path) -> None:
    settings = broken(tmp_path, lambda lines: [*lines, "99\t1\t3\t874965758"]) | {
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}
    }
    with pytest.raises(UserError, match="'99'"):
        run("BPR", "small", config_dict=settings | {"short_users": "refuse"})
    assert run("BPR", "small", config_dict=settings)["split"]["dropped_users"] == 1


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_weights(
    settings_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recbole.model.general_recommender.bpr import BPR

    calls = []
    stock = BPR.calculate_loss

    def diverges(self: Any, interaction: Any) -> Any:
        calls.append(1)
        loss = stock(self, interaction)
        return loss * float("nan") if len(calls) > 8 else loss

    monkeypatch.setattr(BPR, "calculate_loss", diverges)
    settings = settings_of(epochs=9, train_batch_size=2048)
    with pytest.raises(
        UserError, match=r"BPR: the loss became nan in epoch 3, batch 1; the weights of epoch 2 are kept in (\S+);"
    ) as caught:
        run("BPR", "small", config_dict=settings)
    kept = Path(str(caught.value).split("kept in ")[1].split(";")[0])
    assert kept.is_file()


def test_a_bug_of_ours_leaves_a_traceback_and_exit_1(tmp_path: Path) -> None:
    code = "import recbole_llm.cli as c; c.VERBS['run'] = lambda a: 1 / 0; raise SystemExit(c.main(['run']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_the_runner_without_arguments_says_what_is_missing(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "run_recbole_llm.py"
    done = subprocess.run(
        [sys.executable, str(script), "--dataset=tiny"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2 and "no model is named" in done.stderr and "Traceback" not in done.stderr


def test_output_that_nobody_reads_on_is_no_error() -> None:
    for words, reader in (("inspect settings GLTA", "head -n 1"), ("--help", "true")):
        command = f"{sys.executable} -m recbole_llm {words} | {reader}; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert done.stderr == "" and done.stdout.splitlines()[-1] == "0"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_is_its_own(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"recbole-llm {verb} " in told and len(told) < len(HELP) / 2
    assert not any(f"\n  {other}" in told for other in VERBS if other != verb)


def test_a_file_that_may_not_be_read_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 1", encoding="utf-8")
    read = Path.read_text

    def refusing(path: Path, *args: Any, **more: Any) -> str:
        if path == file:  # The superuser, whom tests may run as, may read all.
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *args, **more)

    monkeypatch.setattr(Path, "read_text", refusing)
    assert f"{file}: permission denied" in refused(
        capsys, "run", "--model=BPR", "--dataset=tiny", f"--config_files={file}"
    )

    def forbidden(path: Path, *_args: Any, **_more: Any) -> str:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    # Of no file: no mistake of the user's.
    monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(PermissionError):
        main(["run", "--model=BPR", "--dataset=tiny", f"--config_files={file}"])


def test_a_column_that_load_col_misspells_is_named(tmp_path: Path) -> None:
    settings = broken(tmp_path, lambda lines: lines)
    for key, columns, words in (
        ("load_col", {"inter": ["user_id", "item_id", "timestamp", "ratign"]}, "'ratign'.*did you mean 'rating'"),
        ("load_col", {"intre": ["user_id", "item_id"]}, "load_col: .*'intre'.*did you mean 'inter'"),
        ("unload_col", {"inter": ["ratign"]}, r"no column 'ratign'.*unload_col.*did you mean 'rating'"),
    ):  # fmt: skip
        loaded = {"load_col": {"inter": "*"}} if key == "unload_col" else {}
        with pytest.raises(UserError, match=words):
            run("BPR", "small", config_dict=settings | loaded | {key: columns})
    both = {"load_col": {"inter": ["user_id", "item_id"]}, "unload_col": {"inter": ["rating"]}}
    with pytest.raises(UserError, match=r"load_col\.inter names some; set that to"):
        run("BPR", "small", config_dict=settings | both)
    assert not list((tmp_path / "saved").rglob("result.json"))
