"""The training loop of staged recommenders, on accelerate: one loop for every stage, in one process or several.

Every process draws the same batch from the same generator and takes its own rows of it, so a run of several processes
takes the steps that one process takes; ``train_batch_size`` is the batch of all of them together. A process's loss is
weighted by its share of the targets: summed over processes (and accumulated batches) losses and gradients are those of
the mean over all targets.

What a stage trains is small beside the frozen language model, and part of it may lie outside the recommender (an
adapter), so gradients are summed here rather than by a wrapper around the whole model, which would also have to know
which layers a batch leaves out. A language model that is sharded (FSDP) sums its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, Self

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, patch_environment
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from recbole_llm import processes
from recbole_llm.config_checks import clip_of
from recbole_llm.errors import UserError

logger = logging.getLogger("recbole_llm")

# Gradients are summed over processes in pieces of at most so many numbers.
BUCKET = 1 << 25


class Batch(Protocol):
    """What a staged recommender's batches can do."""

    def targets_count(self) -> int:
        """How many targets its mean loss is over."""

    def share(self, rank: int, count: int) -> Self:
        """The rows of one of ``count`` processes; over the ranks every row comes once."""


def new_accelerator(config: Any) -> Accelerator:
    """An accelerator for one stage.

    accelerate keeps its settings for the life of the process and refuses others; two runs of one process may differ.

    Args:
        config: ``mixed_precision`` and ``device``; how many processes there are, and whether the language model is
            sharded, comes from the launcher.

    Raises:
        UserError: what was asked for cannot be done here.
    """
    check_settings(config)
    AcceleratorState._reset_state(reset_partial_state=processes.count() == 1)
    GradientState._reset_state()
    # What is trained is whole in every process, also where the language model is sharded.
    with patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="false"):
        return Accelerator(
            cpu=config["device"].type == "cpu",
            mixed_precision=config["mixed_precision"],
            # One batch is divided among the processes, so a step of the optimizer is one step of the schedule.
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )


def check_settings(config: Any) -> None:
    """Refuse settings of the training loop that cannot be.

    Raises:
        UserError: fp16 without a GPU; a precision other than in accelerate's own settings; RecBole's switches of mixed
            precision; a broken ``clip_grad_norm``.
    """
    precision, device = config["mixed_precision"], torch.device(config["device"])
    if precision == "fp16" and device.type == "cpu":
        raise UserError("mixed_precision: fp16 needs a GPU; on a CPU take bf16 or no")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise UserError(
            f"accelerate was told {launched} and the run mixed_precision: {precision}; add --mixed_precision={launched}"
        )
    for key in ("enable_amp", "enable_scaler"):
        if config[key]:
            raise UserError(f"{key} is for RecBole's own models; {config['model']} reads mixed_precision: bf16 or fp16")
    clip_of(config["clip_grad_norm"])


class TrainingLoop:
    """Takes the optimizer's steps of one stage.

    Args:
        config: the settings of ``properties/training.yaml``, ``seed`` and ``device``.
        model: has ``stage_loss(stage, batch)``, the mean over the batch's targets; and ``read_once(stage)`` where its
            language model reads something once for all batches.
        stage: which stage.
        optimizer: of what the stage trains.
        batches: batches an epoch.
        epochs: most epochs; where a schedule ends.

    Raises:
        UserError: see :func:`check_settings`.
    """

    def __init__(
        self,
        config: Any,
        model: Any,
        stage: str,
        optimizer: torch.optim.Optimizer,
        batches: int,
        epochs: int,
    ) -> None:
        self.model, self.stage = model, stage
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if any(hasattr(parameter, "ds_id") for parameter in self.parameters):
            raise UserError("an adapter cannot be trained inside weights that DeepSpeed shards; take FSDP")
        self.accelerator = new_accelerator(config)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.accumulation: int = config["gradient_accumulation_steps"]
        self.clip = clip_of(config["clip_grad_norm"])
        self.seed: int = config["seed"]
        self.step_count = 0
        self._tokens_before = -self._tokens_now()
        self._scheduled = epochs * -(-batches // self.accumulation)
        warmup = round(config["warmup_ratio"] * self._scheduled)
        self.scheduler = self._schedule(config["lr_schedule"], warmup, self._scheduled)
        read_once = getattr(model, "read_once", None)
        if read_once is not None and epochs:
            # Before a state is loaded, whose tokens have it: so they do not hang on how often a run was cut off.
            with self.accelerator.autocast():
                read_once(stage)

    def _tokens_now(self) -> int:
        return getattr(getattr(self.model, "backbone", None), "tokens_read", 0)

    def tokens(self) -> int:
        """Positions that the language model has read for this stage, in all processes and before any kill."""
        own = self._tokens_before + self._tokens_now()
        return sum(processes.gathered(own)) if processes.count() > 1 else own

    def _schedule(self, name: str, warmup: int, steps: int) -> Any:
        if name == "constant" and not warmup:
            return None
        name = "constant_with_warmup" if name == "constant" else name
        return self.accelerator.prepare_scheduler(get_scheduler(name, self.optimizer, warmup, steps))

    def epoch(self, batches: Iterable[Batch], check: Callable[[Tensor], None]) -> Iterator[float]:
        """Train on an epoch's batches.

        Args:
            batches: the same ones in every process.
            check: gets each step's loss before the step is taken, and raises where training cannot go on.

        Yields:
            The loss of each step of the optimizer: the mean over its targets, in all processes.
        """
        self.model.train()
        for group in _groups(batches, self.accumulation):
            self.optimizer.zero_grad()
            loss = self._backward(group)
            check(loss)
            if self.clip:
                self.accelerator.clip_grad_norm_(self.parameters, **self.clip)
            self.optimizer.step()
            # Past its end a cosine would rise again.
            if self.scheduler is not None and self.step_count < self._scheduled:
                self.scheduler.step()
            self.step_count += 1
            value = float(loss)
            logger.debug("%s: step %d, loss %r", self.stage, self.step_count, value)
            yield value

    def _backward(self, group: Sequence[Batch]) -> Tensor:
        """Gradients of the mean loss over a group's targets, and that loss; alike in every process."""
        targets = sum(batch.targets_count() for batch in group)
        losses = []
        for number, batch in enumerate(group):
            own, weight = self._own(batch, targets)
            with self._own_randomness(number), self.accelerator.autocast():
                loss = self.model.stage_loss(self.stage, own)
            loss = loss * weight
            # Processes are averaged below, and so they are by a sharded language model.
            self.accelerator.backward(loss * processes.count() if processes.count() > 1 else loss)
            losses.append(loss.detach())
        total = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
        return self._reduced(total)

    def _own(self, batch: Any, targets: int) -> tuple[Any, float]:
        """This process's rows of a batch, and their weight in the step's loss."""
        if not targets:
            return batch, 1.0
        own = batch.share(processes.rank(), processes.count()) if processes.count() > 1 else batch
        if not own.targets_count():
            # No target to learn from here: the pass is run for its (zero) gradients, which the others' are added to.
            return batch, 0.0
        return own, own.targets_count() / targets

    @contextmanager
    def _own_randomness(self, number: int) -> Iterator[None]:
        """Dropout that differs between processes, and leaves alone the stream that they all draw their batches from."""
        if processes.count() == 1:
            yield
            return
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(hash((self.seed, self.step_count, number, processes.rank())) % 2**63)
            yield

    def _reduced(self, loss: Tensor) -> Tensor:
        """Average gradients over processes, sum the loss."""
        if processes.count() == 1:
            return loss
        mine = [parameter for parameter in self.parameters if not isinstance(parameter, DTensor)]
        for bucket in _buckets([parameter.grad for parameter in mine if parameter.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            torch.distributed.all_reduce(flat)
            flat /= processes.count()
            for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        total = loss.double()
        torch.distributed.all_reduce(total)
        return total

    # --- going on after a kill ---------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands at the end of an epoch, beside model, optimizer and random streams.

        Nothing is accumulated there: an epoch's last batches are a step of their own.
        """
        scaler = self.accelerator.scaler
        return {
            "steps": self.step_count,
            "tokens": self._tokens_before + self._tokens_now(),
            "schedule": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.step_count = state["steps"]
        self._tokens_before = state["tokens"] - self._tokens_now()
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Runs of ``size`` batches; the last one may be shorter."""
    stream = iter(batches)
    while group := list(islice(stream, size)):
        yield group


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type in pieces of at most :data:`BUCKET` numbers, or of one gradient."""
    bucket: list[Tensor] = []
    for gradient in sorted(gradients, key=lambda gradient: str(gradient.dtype)):
        full = sum(other.numel() for other in bucket) + gradient.numel() > BUCKET
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
