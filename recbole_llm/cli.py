"""The console script ``recbole-llm``; nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence

from recbole_llm import __version__, processes, threads
from recbole_llm.errors import UserError, did_you_mean

HELP = f"""recbole-llm {__version__}: LLM recommenders and collaborative ones on RecBole, under one provable split

usage: recbole-llm VERB [--key=value ...]

verbs
  run      train a model and rank the whole catalogue with it
           recbole-llm run --model=GLTA --dataset=ml-100k [--config_files='a.yaml b.yaml'] [--key=value ...]
  leaderboard
           run every model of a study, as many at once as fit, and put them into tables and one page with tests, cost
           and examples; goes on where it stood
           recbole-llm leaderboard --suite=quick | --models=BPR,GLTA --dataset=ml-100k [--seeds=1,2]
                       [--only=ROW] [--output=DIR] [--cores=2] [--threads=1] [--memory=8] [--key=value ...]
                       [--ROW.key=value ...]
  compare  put the results of runs beside each other, with the same tests
           recbole-llm compare RUN RUN [...] [--reference=NAME] [--metric=NDCG@10] [--curve=KEY] [--output=DIR]
  tune     search a model's settings on the valid rows; goes on where it stood, and writes a YAML that `run` takes
           recbole-llm tune --model=LightGCN --dataset=ml-100k [--space=FILE] [--trials=20] [--seconds=N] [--output=DIR]
           [--write=FILE.yaml] [--key=value ...]
  prepare  give a model's items their tokens without training the model, and tokens to items that came later
           recbole-llm prepare --model=SASRecCodes --dataset=ml-100k [--index_file=PATH] [--new_items=FILE.item]
           [--new_interactions=FILE.inter] [--key=value ...]
           or turn the raw files of a data set, as they were published, into a folder that --dataset takes
           recbole-llm prepare --source=amazon2018|amazon2023|goodreads|movielens --input=DIR --category=NAME
           [--preset=lcrec|glta|tca4rec] [--output=dataset] [--name=NAME] [--overwrite=true] [--key=value ...]
  recommend
           recommend items to users of a finished run, live or from a store that was built once for all of them
           recbole-llm recommend --run=DIR --user=ID | --users=FILE | --history=ITEM,ITEM [--k=10] [--format=json]
           recbole-llm recommend --run=DIR --build=true|anew [--k=10] [--store=DIR] [--shard=0/4]
           [--history_phases=train,valid,test] what counts as a user's history [--data_path=DIR --search_mode=MODE
           --inference_tokens=N --inference_batch_size=N --eval_batch_size=N --gpu_id=N] where and how it computes
           [--index_file=PATH --new_items=FILE.item] lets in items that came later
  models   what is registered, with each model's kind, stages and needs
           recbole-llm models [--kind=language]
  inspect  a data set, a run, how a run's items stand to their texts, the settings of a model, or what a language model
           takes of a GPU
           recbole-llm inspect dataset NAME [--key=value ...] | inspect run FOLDER | inspect settings MODEL
           recbole-llm inspect alignment FOLDER [--states=true]
           recbole-llm inspect codebook FOLDER
           recbole-llm inspect backbone LLM [--rows=8 --tokens=347 --prefix=38] [--key=value ...]

Settings are read from the shipped properties/, then files, then the command line; `inspect settings MODEL` lists them.
A key of a part is prefixed, e.g. --graph_model.epochs=60 for the graph model behind GLTA.
Exit status: 0 done, 1 a bug of ours, 2 a mistake in what was asked for."""


def _run(arguments: list[str]) -> int:
    processes.start_missing()
    from recbole_llm.training.runs import run, table

    result = run(command_line=arguments)
    processes.leave()
    if not processes.is_main():
        return 0
    parts = list(result["parts"].values())
    split, evaluation = result["split"], result["evaluation"]
    rankings = f"{evaluation['test_users']} rankings of the whole catalogue"
    if not result["per_user"]:
        rankings = f"candidates {evaluation['ranking']}" if result["test"] else "no rows"
    print(f"\n{result['dataset']}: test, {rankings}, policy {evaluation['policy']}")
    if parts and evaluation.get("title_match"):
        print(f"{result['model']} is measured by titles (title_match), {', '.join(result['parts'])} by items")
    print(table([*parts, result]))
    if split["fingerprint"]:
        print(
            f"\nsplit       {split['fingerprint'][:16]} "
            f"({split['train']} train, {split['valid']} valid, {split['test']} test)"
        )
    print(f"result      {result['result_file']}\nlog         {result['log_file']}\ncheckpoint  {result['checkpoint']}")
    return 0


def _compare(arguments: list[str]) -> int:
    from recbole_llm.leaderboard.compare import compare

    print(compare(arguments))
    return 0


def _leaderboard(arguments: list[str]) -> int:
    from recbole_llm.leaderboard.board import leaderboard

    text, failed = leaderboard(arguments)
    print(text)
    return 2 if failed else 0


def _tune(arguments: list[str]) -> int:
    from recbole_llm.leaderboard.tuning import tune

    print(tune(arguments))
    return 0


def _prepare(arguments: list[str]) -> int:
    if any(argument.partition("=")[0] == "--source" for argument in arguments):
        from recbole_llm.sources.prepare import prepare_source

        print(prepare_source(arguments))
        return 0
    from recbole_llm.training.prepare import prepare

    print(prepare(arguments))
    return 0


def _recommend(arguments: list[str]) -> int:
    from recbole_llm.serving.recommend import recommend

    print(recommend(arguments))
    return 0


def _models(arguments: list[str]) -> int:
    from recbole_llm.limits import NEEDS, REFUSED
    from recbole_llm.registry import entries

    kind = _option(arguments, "kind")
    listed = [entry for entry in entries().values() if kind in (None, entry.kind)]
    if not listed:
        kinds = sorted({entry.kind for entry in entries().values()})
        raise UserError(f"no model is of kind '{kind}'; kinds: {', '.join(kinds)}")
    print(f"{'name':20} {'kind':11} {'from':12} stages; needs")
    for entry in sorted(listed, key=lambda entry: (entry.kind, entry.name)):
        home = "recbole_llm" if entry.module.startswith("recbole_llm") else entry.module.partition(".")[0]
        home = "recbole+fast" if entry.fast_of else home
        wanted = entry.needs or NEEDS.get(entry.name) or NEEDS.get(entry.kind, ())
        needs = f"; {', '.join(wanted)}" if wanted else ""
        told = f"does not run: {REFUSED[entry.name][0]}" if entry.name in REFUSED else " > ".join(entry.stages) + needs
        print(f"{entry.name:20} {entry.kind:11} {home:12} {told}")
    return 0


def _option(arguments: list[str], name: str) -> str | None:
    value = None
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key != f"--{name}" or not equals:
            raise UserError(f"{argument!r} is not understood here; --{name}=... is")
        value = text
    return value


def _inspect(arguments: list[str]) -> int:
    from recbole_llm.inspection import inspect

    print(inspect(arguments))
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "leaderboard": _leaderboard,
    "compare": _compare,
    "tune": _tune,
    "prepare": _prepare,
    "recommend": _recommend,
    "models": _models,
    "inspect": _inspect,
}


def help_of(verb: str) -> str:
    """What the command line says of a verb; of all where it is none."""
    if verb not in VERBS:
        return HELP
    start = HELP.index(f"\n  {verb}") + 1
    after = re.search(r"\n  \w|\n\n", HELP[start:])
    assert after is not None
    rest = HELP[HELP.rindex("\n\n") :]
    return HELP[start : start + after.start()] + rest


def _carry_out(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help", "--version") or "--help" in words:
        print(__version__ if words[:1] == ["--version"] else help_of(words[0] if words else ""))
        sys.stdout.flush()
        return 0
    if words[0].startswith("--"):
        raise UserError(f"a verb comes first: recbole-llm run {' '.join(words)}")
    if words[0] not in VERBS:
        raise UserError(f"unknown verb '{words[0]}'{did_you_mean(words[0], VERBS) or '; verbs: ' + ', '.join(VERBS)}")
    status = VERBS[words[0]](words[1:])
    sys.stdout.flush()
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: by default the process's own.

    Returns:
        Exit status: 0 done, 2 the user's mistake (told on stderr in one or two lines). A bug of ours raises, which
        leaves a traceback and status 1.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    threads.share_cores()
    try:
        return _carry_out(words)
    except BrokenPipeError:
        # Whoever read the output has read enough (`| head`); Python would complain again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        if processes.speaks():
            print(f"recbole-llm: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        if error.filename is None:
            raise
        if processes.speaks():
            print(f"recbole-llm: {error.filename}: permission denied", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"recbole-llm: no space is left on the disk ({error.filename or 'while writing'})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrecbole-llm: stopped; the same command goes on from the last finished stage or epoch", file=sys.stderr)
        return 130
