"""Training of the residual-quantised autoencoder."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.errors import TrainingStoppedError, UserError
from recbole_llm.itemid.alignment import Resume
from recbole_llm.itemid.codebook import residual_kmeans
from recbole_llm.itemid.collapse import check_collapse
from recbole_llm.itemid.even_kmeans import even_residual_kmeans
from recbole_llm.itemid.kmeans import check_count, check_points
from recbole_llm.itemid.letter import cluster_codes
from recbole_llm.itemid.rqvae import RQVAE, RQVAESettings
from recbole_llm.progress import Steps

# All items are looked at in batches of this size.
LOOK_BATCH = 8192
# By the names of the settings that users know.
REMEDIES = (
    "code_reseed_dead: true, a smaller code_size, more code_kmeans_points, a lower code_learning_rate or "
    "code_text_weight"
)


@dataclasses.dataclass
class Look:
    """All items as the autoencoder sees them between two epochs.

    Attributes:
        parts: the losses of :meth:`RQVAE.losses`, means over all items.
        codes: int64 ``[n, N]``.
        collision_rate: 1 - distinct sequences / items.
        used: codes in use by level.
    """

    parts: dict[str, float]
    codes: Tensor
    collision_rate: float
    used: list[int]


def train_rqvae(
    points: np.ndarray | Tensor,
    settings: RQVAESettings,
    *,
    seed: int,
    texts: np.ndarray | Tensor | None = None,
    behaviour: np.ndarray | Tensor | None = None,
    device: str | torch.device = "cpu",
    resume: Resume | None = None,
    show_progress: bool = True,
) -> RQVAE:
    """Train the autoencoder on the items that are to have codes.

    The whole data stands on the device. For a seed the result is the same, also after a break, on the same kind of
    machine with the same number of threads.

    Args:
        points: float ``[n, d_in]``, behaviour or text embeddings; the padding item is left out.
        settings: sizes, loss and budget.
        seed: of the first weights, of the codes' start, and of the order of the items.
        texts: float ``[n, H]``, what the codes are aligned with; needed if ``text_weight`` is above 0.
        behaviour: float ``[n, d]``, the items' embeddings in a collaborative model, of the codes' width; needed if
            ``cf_weight`` is above 0. Rows of NaN for items that it knows nothing of.
        device: where to train.
        resume: where to keep what is needed to go on, and to find what an attempt that was cut off kept.
        show_progress: whether to tell how far along it is.

    Returns:
        The best weights by ``checkpoint``, ready for use. Its ``figures`` tell ``epochs``, ``steps``, ``seconds`` of
        this attempt, ``best_epoch``, the losses by their names, ``collision_rate``, ``used`` codes by level, and
        ``explained``, the share of the points' variance that the decoder gives back.

    Raises:
        UserError: a value that is no number, fewer items than codes, or texts that are missing or of other items.
        TrainingStoppedError: the codebook collapsed, or the loss became no number.
    """
    start = time.perf_counter()
    x = _checked(points, "points to quantise")
    check_count(len(x), settings.codes)
    aims = None if texts is None or not settings.text_weight else _checked(texts, "text embeddings")
    if settings.text_weight and aims is None:
        raise UserError("RQ-VAE: text_weight is above 0, and there are no text embeddings to align the codes with")
    if aims is not None and len(aims) != len(x):
        raise UserError(f"RQ-VAE: {len(aims)} text embeddings for {len(x)} points: they are not of the same items")
    done = _behaviour(behaviour, len(x), settings)
    mark = _mark((x, aims, done), settings, seed)
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = RQVAE(x.shape[1], settings, 0 if aims is None else aims.shape[1]).to(device)
        if aims is not None:
            model.text_mean.copy_(aims.mean(0))
            model.text_scale.copy_((aims - aims.mean(0)).square().mean().sqrt().clamp_min(1e-12))
        training = _Training(
            model,
            x.to(device),
            None if aims is None else aims.to(device),
            None if done is None else done.to(device),
            seed,
            mark,
            resume,
        )
        training.run(show_progress)
    model.figures["seconds"] = time.perf_counter() - start
    return model


class _Training:
    """One training: what changes from step to step."""

    def __init__(
        self,
        model: RQVAE,
        x: Tensor,
        texts: Tensor | None,
        behaviour: Tensor | None,
        seed: int,
        mark: str,
        resume: Resume | None,
    ) -> None:
        self.model, self.settings, self.x, self.texts, self.behaviour = model, model.settings, x, texts, behaviour
        self.seed, self.mark, self.resume = seed, mark, resume
        self.batches = math.ceil(len(x) / self.settings.batch_size)
        self.epochs = math.ceil(self.settings.steps / self.batches) if self.settings.steps else self.settings.epochs
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay, fused=True
        )
        rise = self.settings.warm_up * self.batches
        steps = self.epochs * self.batches
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _rate(rise, steps, self.settings.schedule))
        self.epoch = 0
        self.best: dict[str, Any] = {}
        self.clusters: Tensor | None = None

    def run(self, show_progress: bool) -> None:
        """Train to the end, and leave the best weights in the model."""
        if not self._take_up():
            start_codes(self.model, self.x, self.seed)
            # An untrained encoder spreads items well, and would often have the best collision rate of all.
            if not self.epochs:
                self._look()
        steps = Steps("training the RQ-VAE", self.epochs, show_progress)
        steps.done = self.epoch
        try:
            while self.epoch < self.epochs:
                self._train_epoch()
                self.epoch += 1
                if self.epoch % self.settings.check_every == 0 or self.epoch == self.epochs:
                    steps.note(f"collision rate {self._look().collision_rate:.4f}")
                steps.advance()
                if self.resume is not None and self.resume.due():
                    self.resume.save(self._state())
        finally:
            steps.close()
        self.model.load_state_dict(self.best["weights"])
        self.model.eval()
        self._tell()

    def _train_epoch(self) -> None:
        # A stream of its own for each epoch, so that going on needs no state of any stream.
        drawn = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0])
        torch.manual_seed(drawn)
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(drawn)).to(self.x.device)
        self.model.train()
        if self.settings.diversity_weight and self.epoch % self.settings.diversity_every == 0:
            self.clusters = cluster_codes(self.model.levels, self.settings.diversity_clusters, self.seed, self.clusters)
        total = torch.zeros((), device=self.x.device)
        for rows in order.tensor_split(self.batches):
            texts, behaviour = (None if table is None else table[rows] for table in (self.texts, self.behaviour))
            parts, _ = self.model.losses(self.x[rows], texts, behaviour, self.clusters)
            self.optimizer.zero_grad()
            parts["loss"].backward()
            if self.settings.max_norm:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_norm)
            self.optimizer.step()
            self.schedule.step()
            total += parts["loss"].detach()
        if not torch.isfinite(total):
            raise TrainingStoppedError(
                f"RQ-VAE: the loss is no number in epoch {self.epoch + 1}; "
                "try a lower code_learning_rate or a code_max_norm"
            )

    def _look(self) -> Look:
        """See all items, keep the best weights, and stop a collapse."""
        found = look(self.model, self.x, self.texts, self.behaviour)
        settings = self.settings
        by_collision = settings.checkpoint == "collision"
        key = [found.collision_rate, found.parts["loss"]] if by_collision else [found.parts[settings.checkpoint]]
        if not self.best or key < self.best["key"]:
            weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.best = {"key": key, "epoch": self.epoch, "weights": weights}
        if settings.reseed_dead and self.epoch < self.epochs:
            # The remedy comes first; whether it helped shows at the end.
            reseed_dead(self.model, self.x, found.codes, self.optimizer)
        else:
            check_collapse(found.used, settings.codes, len(self.x), settings.least_usage, REMEDIES)
        return found

    def _state(self) -> dict[str, Any]:
        return {
            "mark": self.mark,
            "epoch": self.epoch,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "clusters": self.clusters,
        }

    def _take_up(self) -> bool:
        """Whether an earlier attempt at the same training left something to go on from."""
        state = self.resume.take_up() if self.resume is not None else None
        if self.resume is None or state is None:
            return False
        if state.get("mark") != self.mark:
            self.resume.refuse("what an earlier RQ-VAE left is of other items or settings")
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.best = state["epoch"], state["best"]
        self.clusters = state["clusters"]
        return True

    def _tell(self) -> None:
        found = look(self.model, self.x, self.texts, self.behaviour)
        spread = (self.x - self.x.mean(0)).square().sum().item()
        missed = (self.x - self.model.reconstruct(self.x)).square().sum().item()
        self.model.figures = {
            "epochs": self.epochs,
            "steps": self.epochs * self.batches,
            "best_epoch": self.best["epoch"],
            **found.parts,
            "collision_rate": found.collision_rate,
            "used": found.used,
            "explained": 1 - missed / spread if spread else None,
        }


@torch.no_grad()
def start_codes(model: RQVAE, x: Tensor, seed: int) -> None:
    """Start each level's codes at the k-means centres of its inputs, as the untrained encoder makes them.

    Args:
        model: whose codes to set.
        x: float ``[n, d_in]``; ``kmeans_points`` of them are drawn.
        seed: of the draw and of k-means.
    """
    settings = model.settings
    count = min(settings.kmeans_points or len(x), len(x))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    # In training mode as in the first batch: an untrained batch norm knows no means yet.
    model.train()
    latent = model.encoder(x[chosen.to(x.device)]).cpu().numpy()
    if settings.kmeans_even:
        made = even_residual_kmeans(latent, settings.levels, settings.codes, seed)
        model.levels.copy_(torch.from_numpy(made))
        return
    sizes = [settings.codes] * settings.levels
    model.levels.copy_(residual_kmeans(latent, sizes, "l2", "signed", seed, settings.kmeans_iterations).levels)


@torch.no_grad()
def look(model: RQVAE, x: Tensor, texts: Tensor | None, behaviour: Tensor | None = None) -> Look:
    """See all items, each with its nearest codes.

    The diversity of codes, which is drawn at random, is no part of these losses.

    Args:
        model: the autoencoder.
        x: float ``[n, d_in]``.
        texts: float ``[n, H]``.
        behaviour: float ``[n, d]``. The more items a batch has, the greater is the loss that they are of: batches are
            then those of training.
    """
    model.eval()
    batch = LOOK_BATCH if behaviour is None else model.settings.batch_size
    totals: dict[str, Tensor] = {}
    chosen = []
    for first in range(0, len(x), batch):
        rows = slice(first, first + batch)
        told, done = (None if table is None else table[rows] for table in (texts, behaviour))
        parts, codes = model.losses(x[rows], told, done)
        for name, value in parts.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value * len(codes)
        chosen.append(codes)
    codes = torch.cat(chosen)
    return Look(
        {name: value.item() / len(x) for name, value in totals.items()},
        codes,
        1 - len(torch.unique(codes, dim=0)) / len(x),
        [len(torch.unique(column)) for column in codes.T],
    )


@torch.no_grad()
def reseed_dead(model: RQVAE, x: Tensor, codes: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Put each code that no item has where an item is that is far from its own, and forget the code's momentum.

    Args:
        model: whose codes to move.
        x: float ``[n, d_in]``.
        codes: int64 ``[n, N]``, the items' codes.
        optimizer: of the model.
    """
    inputs = model.latent(x)
    memory = optimizer.state.get(model.levels, {})
    for level in range(model.settings.levels):
        column = codes[:, level]
        left = inputs - model.levels[level][column]
        dead = torch.bincount(column, minlength=model.settings.codes) == 0
        farthest = left.square().sum(1).topk(int(dead.sum())).indices
        model.levels[level, dead] = inputs[farthest]
        for name in ("exp_avg", "exp_avg_sq"):
            if name in memory:
                memory[name][level, dead] = 0
        inputs = left


def _rate(rise: int, steps: int, schedule: str) -> Callable[[int], float]:
    """The learning rate's factor by step: up in a line, then down in a line or level."""

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 1.0 if schedule == "constant" else max(0.0, (steps - step) / max(1, steps - rise))

    return factor


def _checked(table: np.ndarray | Tensor, what: str) -> Tensor:
    """Float32 rows on the CPU, all of them numbers."""
    made = torch.as_tensor(table).detach().to("cpu", torch.float32).contiguous()
    if made.dim() != 2:
        raise UserError(f"RQ-VAE: {what} should be a table [items, dimensions], but have shape {tuple(made.shape)}")
    check_points(made.numpy(), what)
    return made


def _behaviour(table: np.ndarray | Tensor | None, items: int, settings: RQVAESettings) -> Tensor | None:
    """Embeddings of a collaborative model for ``cf_weight``, float32 on the CPU; ``None`` where it is 0."""
    if not settings.cf_weight:
        return None
    if table is None:
        raise UserError("RQ-VAE: cf_weight is above 0, and there are no embeddings of a collaborative model")
    made = torch.as_tensor(table).detach().to("cpu", torch.float32).contiguous()
    if made.dim() != 2 or made.shape[1] != settings.latent_size:
        raise UserError(
            f"RQ-VAE: cf_weight multiplies codes of {settings.latent_size} numbers with embeddings of "
            f"{tuple(made.shape)[1:]}: both should be as wide"
        )
    if len(made) != items:
        raise UserError(f"RQ-VAE: {len(made)} embeddings for {items} points: they are not of the same items")
    return made


def _mark(tables: tuple[Tensor | None, ...], settings: RQVAESettings, seed: int) -> str:
    """What a state has to belong to; the first of the tables is the points."""
    shapes = [None if table is None else tuple(table.shape) for table in tables]
    digest = hashlib.sha256(repr((settings, seed, shapes)).encode())
    for table in tables:
        if table is not None:
            digest.update(table.numpy().data)
    return digest.hexdigest()
