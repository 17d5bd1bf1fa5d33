"""RecBole's trainers with checkpoints that can be read safely, exact resuming, and our ranking."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.trainer import TraditionalTrainer, Trainer
from recbole.trainer.trainer import AbstractTrainer
from recbole.utils import get_trainer as recbole_trainer
from torch import nn

from recbole_llm import compat, processes
from recbole_llm.errors import TrainingStoppedError, UserError
from recbole_llm.evaluation.ranking import Measured, measure
from recbole_llm.progress import Steps
from recbole_llm.training.state import (
    RESUME_SECONDS,
    Generator,
    ResumeFile,
    load_state,
    rng_state,
    save_state,
    set_rng_state,
)


class TrainerMixin:
    """What every trainer of ours adds to RecBole's; see :func:`trainer_class`."""

    model: Any
    config: Any
    saved_model_file: str
    # Whether all processes of a run train this model together, and whether they divide its rankings among them.
    together = False
    shares_ranking = False

    def __init__(self, config: Any, model: Any) -> None:
        folder = config["tensorboard_dir"]
        with compat.tensorboard_in(Path(folder) if folder else None):
            super().__init__(config, model)  # type: ignore[call-arg]
        # What has a closed form has one epoch whatever `epochs` says, and is validated after it.
        self.eval_step = min(self.eval_step, self.epochs)  # type: ignore[attr-defined, has-type]
        self.saved_model_file = str(Path(self.saved_model_file).with_suffix(".safetensors"))
        self.resume_file: Path | None = None
        self.part_fits: dict[str, Any] = {}
        self.best_epoch = -1
        self.valid_curve: list[tuple[int, float]] = []
        # A mark of how valid is ranked, where that moves no weight: one who goes on may rank otherwise.
        self.ranked_by = ""
        self.measured = Measured()
        self._train_data: Any = None
        self._steps: Steps | None = None
        self._where = (0, 0)
        self._stopped = False
        self._has_valid = True
        self._last_resume = time.monotonic()
        self._kept = -1
        self._trained = False

    # --- training ----------------------------------------------------------------------------------------------------
    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Callable[[int, float], None] | None = None,
    ) -> tuple[float, dict[str, float] | None]:
        """RecBole's ``fit``; goes on from :attr:`resume_file` when that exists.

        ``callback_fn`` is told of the validations of the attempt before first: it sees the whole curve.

        Returns:
            Best validation score and the metrics at it.

        Raises:
            UserError: the loss became NaN or infinite; the last good weights stay in :attr:`saved_model_file`.
        """
        self._train_data = train_data
        self._has_valid = valid_data is not None and len(valid_data) > 0
        finished = self._restore() and (self._stopped or self.start_epoch >= self.config["epochs"])
        total = max(self.epochs - self.start_epoch, 0) * max(len(train_data), 1)  # type: ignore[attr-defined]
        self._steps = Steps(f"training {self.config['model']}", total, bool(show_progress))

        def after_validation(epoch: int, score: float) -> None:
            self.valid_curve.append((epoch, float(score)))
            self._keep(epoch)
            if callback_fn is not None:
                callback_fn(epoch, score)

        try:
            if callback_fn is not None:
                for epoch, score in self.valid_curve:
                    callback_fn(epoch, score)
            if finished:
                return self.best_valid_score, self.best_valid_result  # type: ignore[has-type]
            return super().fit(  # type: ignore[misc]
                train_data, valid_data if valid_data is not None and len(valid_data) else None, verbose, saved,
                show_progress=False, callback_fn=after_validation,
            )  # fmt: skip
        finally:
            self._steps.close()

    def _train_epoch(self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False) -> Any:
        if self._begin_epoch(epoch_idx):
            return self.train_loss_dict[epoch_idx]  # type: ignore[attr-defined]
        watched = _Watched(train_data, self._tick)
        return super()._train_epoch(watched, epoch_idx, loss_func, show_progress=False)  # type: ignore[misc]

    def _begin_epoch(self, epoch: int) -> bool:
        """Note where training stands; what the epoch before has reached is kept, if no validation did so.

        Returns:
            Whether the epoch was trained before a cut, which came in its validation.
        """
        self._where = (epoch, 0)
        trained, self._trained = self._trained, False
        if self.start_epoch < epoch != self._kept + 1:  # type: ignore[has-type]
            self._save_resumable(epoch - 1)
        return trained

    def _valid_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """RecBole's; a validation may take as long as an epoch, so what it is of is kept first."""
        self._save_resumable(self._where[0] - 1, trained=True)
        return super()._valid_epoch(*args, **kwargs)  # type: ignore[misc]

    def _tick(self, batch: int) -> None:
        self._where = (self._where[0], batch)
        if self._steps is not None:
            self._steps.advance()

    def _check_nan(self, loss: torch.Tensor) -> None:
        if torch.isfinite(loss):
            return
        epoch, batch = self._where
        kept = (
            f"the weights of epoch {self.best_epoch + 1} are kept in {self.saved_model_file}"
            if self.best_epoch >= 0
            else "no epoch was finished before"
        )
        raise TrainingStoppedError(
            f"{self.config['model']}: the loss became {loss.item()} in epoch {epoch + 1}, batch {batch + 1}; {kept}; "
            f"try a lower learning_rate (now {self.config['learning_rate']})"
        )

    def tokens(self) -> int:
        """Positions that a language model read in training."""
        return 0

    # --- checkpoints -------------------------------------------------------------------------------------------------
    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Replaces trainer.py:289, whose pickled Config no safe loader can read."""
        file = Path(kwargs.pop("saved_model_file", self.saved_model_file))
        self.best_epoch = epoch
        state = {
            "model": self.config["model"],
            "epoch": epoch,
            "state_dict": dict(self.model.state_dict()),
            # SASRecF and its kin list a submodule there, whose weights are in the state already.
            "other_parameter": {
                name: value for name, value in self.model.other_parameter().items() if not isinstance(value, nn.Module)
            },
        }
        if processes.is_main():
            save_state(file, state)
        if self.config["eval_step"] <= 0 or not self._has_valid:
            self._keep(epoch)

    def load_best(self, file: str | Path | None = None) -> None:
        """Put a checkpoint's weights into the model; replaces trainer.py:583.

        Args:
            file: by default the one that ``fit`` saved.

        Raises:
            UserError: it is missing, damaged, or of another model.
        """
        path = Path(file or self.saved_model_file)
        state = load_state(path, self.device)  # type: ignore[attr-defined]
        if state["model"] != self.config["model"]:
            raise UserError(f"{path} holds {state['model']}, not {self.config['model']}")
        self.model.load_state_dict(state["state_dict"])
        self.model.load_other_parameter(state["other_parameter"])
        self.best_epoch = state["epoch"]

    def _generators(self) -> list[Generator]:
        # A knowledge graph's loader has one of interactions and one of triples inside.
        inside = [getattr(self._train_data, name, None) for name in ("general_dataloader", "kg_dataloader")]
        owners: list[Any] = []
        for loader in (self._train_data, *filter(None, inside)):
            owners += [loader, *(getattr(loader, "samplers", None) or [getattr(loader, "_sampler", None)])]
        return [getattr(owner, "generator", None) for owner in (*owners, self.model)]

    def _keep(self, epoch: int) -> None:
        """Tell of an epoch that was validated, and save what is needed to go on after it."""
        if self._steps is not None and self.best_valid_result:  # type: ignore[has-type]
            self._steps.note(f"epoch {epoch + 1}, best {self.valid_metric} {self.best_valid_score:.4f}")  # type: ignore[attr-defined]
        self._save_resumable(epoch)

    def _save_resumable(self, epoch: int, trained: bool = False) -> None:
        """Save what is needed to go on after this epoch as if nothing had happened; or after training of the next."""
        self._kept = epoch
        if self.resume_file is None or time.monotonic() - self._last_resume < RESUME_SECONDS:
            return
        if not self._resumable() or not processes.is_main():
            return
        stopping = self.cur_step > self.stopping_step  # type: ignore[attr-defined]
        save_state(self.resume_file, {
            "epoch": epoch,
            "cur_step": self.cur_step,  # type: ignore[attr-defined]
            "best_valid_score": float(self.best_valid_score),
            "best_valid_result": dict(self.best_valid_result or {}),  # type: ignore[has-type]
            "ranked_by": self.ranked_by,
            "best_epoch": self.best_epoch,
            "valid_curve": self.valid_curve,
            "losses": [[key, float(value)] for key, value in self.train_loss_dict.items()],  # type: ignore[attr-defined]
            "stopped": stopping,
            "trained": trained,
            "counters": self._counters(),
            **self._moving_state(),
        })  # fmt: skip
        self._last_resume = time.monotonic()

    def _moving_state(self) -> dict[str, Any]:
        """What every step moves."""
        return {
            "state_dict": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),  # type: ignore[attr-defined]
            "rng": rng_state(*self._generators()),
            **self._own_state(),
        }

    def _put(self, state: dict[str, Any]) -> None:
        """Put a :meth:`_moving_state` back."""
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[attr-defined]
        set_rng_state(state["rng"], *self._generators())
        self._take_state(state)

    def _resumable(self) -> bool:
        """Whether a run can go on from weights, one optimizer and random streams.

        RecBole's trainers with a ``fit`` of their own (NCL, S3Rec, ...) have phases that these do not tell,
        some models move what is in none of them, and what has a closed form has its one epoch behind it.
        """
        if isinstance(self, TraditionalTrainer) or self.config["model"] in _MOVES_MORE:
            return False
        own = [cls for cls in type(self).__mro__ if "fit" in vars(cls) and cls.__module__.startswith("recbole.")]
        return all(cls in _KNOWN_FITS for cls in own)

    def _own_state(self) -> dict[str, Any]:
        """What a trainer keeps beyond model, optimizer and random streams."""
        return {}

    def _take_state(self, state: dict[str, Any]) -> None:
        """Take up :meth:`_own_state`."""

    def _counters(self) -> dict[str, float]:
        """Numbers that a model counts in as it trains, e.g. MultiVAE's annealing steps."""
        return {name: value for name, value in vars(self.model).items() if type(value) in (int, float)}

    def _restore(self) -> bool:
        """Take up the state of a run that was cut off.

        Returns:
            Whether there was one; where it is damaged or does not fit, that is told and training starts over.
        """
        if self.resume_file is None or not self._resumable():
            # What an earlier version kept of a model that cannot go on is not gone on from either.
            return False
        resume = ResumeFile(self.resume_file)
        # On the CPU: random states live there, and loading copies the rest to where it belongs.
        state = resume.take_up()
        if state is None:
            return False
        before = copy.deepcopy(self._moving_state())
        try:
            if state["best_epoch"] >= 0:
                # The best weights so far end as the result without being looked at again.
                load_state(Path(self.saved_model_file))
            self._put(state)
        except (UserError, ValueError, RuntimeError, KeyError, TypeError) as error:
            self._put(before)
            reason = error if isinstance(error, UserError) else f"{resume.path} does not fit {self.config['model']}"
            resume.refuse(str(reason))
            return False
        self.start_epoch = state["epoch"] + 1
        self.cur_step, self.best_valid_score = state["cur_step"], state["best_valid_score"]
        alike = state.get("ranked_by", self.ranked_by) == self.ranked_by
        self.best_valid_result = OrderedDict(state["best_valid_result"] if alike else {})
        self.best_epoch, self._stopped = state["best_epoch"], state["stopped"]
        # What an earlier version kept is of whole epochs.
        self._trained = state.get("trained", False)
        self.train_loss_dict = dict(state["losses"])
        self.valid_curve = [(epoch, score) for epoch, score in state["valid_curve"]] if alike else []
        for name, value in state["counters"].items():
            setattr(self.model, name, value)
        return True

    def resume_checkpoint(self, resume_file: str | Path) -> None:
        """Go on from a resumable state at the next ``fit``; replaces trainer.py:314.

        Args:
            resume_file: a file that an interrupted ``fit`` left.
        """
        self.resume_file = Path(resume_file)

    # --- evaluation --------------------------------------------------------------------------------------------------
    def without_search(self, upstream: list[str]) -> tuple[frozenset[str], list[str]]:
        """What weights do not depend on where no epoch is picked by how it ranks.

        Args:
            upstream: fingerprints of what a stage is made from.

        Returns:
            Settings that rankings alone look at; and the fingerprints without what these alone asked for.
        """
        return frozenset(), upstream

    def rank_valid(self, valid_data: Any) -> Mapping[str, float]:
        """Valid as training looks at it, with the weights as they are."""
        return self.evaluate(valid_data, load_best_model=False) or {}

    def valid_of_training(self, valid_data: Any) -> Mapping[str, float]:
        """What the best weights have on valid, where training has just seen it and would see it again; else nothing.

        Scores of a recommender that is not ours may be drawn.

        Args:
            valid_data: what it would be ranked with.
        """
        return {}

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: str | None = None, show_progress: bool = False
    ) -> OrderedDict[str, float] | None:
        """RecBole's ``evaluate`` through our ranking; each user's values are in :attr:`measured` afterwards.

        Returns:
            Metric names to values; ``None`` without data.
        """
        if not eval_data or not len(eval_data):
            return None
        if load_best_model:
            self.load_best(model_file)
        if not isinstance(eval_data, FullSortEvalDataLoader):
            self.measured = Measured()
            values = super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)  # type: ignore[misc]
            # Some of RecBole's metrics are NumPy's float32, which JSON does not know.
            return OrderedDict((name, float(value)) for name, value in values.items())
        what = f"ranking with {self.config['model']}"
        self.measured = measure(
            self.model, eval_data, self.config, self._train_data, bool(show_progress), what, self.shares_ranking
        )
        # Early stopping must be of one mind, to the last bit.
        return processes.from_main(self.measured.metrics) if self.together else self.measured.metrics


# The fits that checkpoints of ours are made for.
_KNOWN_FITS = (Trainer, AbstractTrainer)
# Models with lists or tensors of their own that training moves: LINE's shuffled vertices, a diffusion's losses by step,
# KGAT's attention; and RecVAE, which makes its optimizers anew for each part of an epoch.
_MOVES_MORE = ("LINE", "DiffRec", "LDiffRec", "KGAT", "RecVAE")


class _Watched:
    """A loader that reports each batch it hands out."""

    def __init__(self, loader: Any, tick: Callable[[int], None]) -> None:
        self._loader, self._tick = loader, tick

    def __iter__(self) -> Iterator[Any]:
        for batch, interaction in enumerate(self._loader):
            self._tick(batch)
            yield interaction

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def trainer_class(model_type: Any, model_name: str, mixin: type = TrainerMixin) -> type:
    """RecBole's trainer for a model, with our checkpoints, resuming and ranking.

    Args:
        model_type: RecBole's ModelType.
        model_name: the model's name.
        mixin: what comes before the last stage, for a model that has some.
    """
    base = recbole_trainer(model_type, model_name)
    return type(f"RecBoleLLM{base.__name__}", (mixin, base), {})
