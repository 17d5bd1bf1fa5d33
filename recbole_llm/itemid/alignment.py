"""Alignment tokenization: codebooks trained towards what items do and what their texts say.

The training of "Semantic Convergence: Harmonizing Recommender Systems via Two-Stage Alignment and Behavioral Semantic
Tokenization" (AAAI 2025): ``L = L^B + weight * L^L``, its sums over items taken as means. There is no encoder; item
vectors stay as they are, and Adam moves the codes that items select (and the projection of the texts).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from recbole_llm.errors import TrainingStoppedError, UserError, did_you_mean
from recbole_llm.itemid.alignment_loss import gap, step
from recbole_llm.itemid.codebook import Residual, ResidualCodebook, residual_kmeans
from recbole_llm.itemid.collapse import check_collapse
from recbole_llm.itemid.kmeans import Distance, check_count, check_points
from recbole_llm.itemid.text_projection import Projection, TextSide
from recbole_llm.progress import Steps

# By the names of the settings that users know.
REMEDIES = "code_reseed_dead: true, a smaller code_size, a lower code_text_weight or code_projection: learned"


class Resume(Protocol):
    """Where a training keeps what it needs to go on after it was cut off."""

    def take_up(self) -> Any | None:
        """What an earlier attempt left, if anything."""

    def refuse(self, reason: str) -> None:
        """Say why that is of no use."""

    def due(self) -> bool:
        """Whether it is time to save."""

    def save(self, state: Any) -> None:
        """Keep a state instead of the one before."""


@dataclass(frozen=True)
class AlignmentSettings:
    """What alignment tokenization is trained by.

    Args:
        levels: N, the codes of an item.
        codes: C, the codes of a level.
        distance: Dist of both losses, and by which codes are chosen; ``l2`` is squared.
        residual: what goes on to the next level.
        text_weight: of L^L; 0 is the ablation without text alignment, for which texts are not looked at.
        projection: of the texts; see :class:`~recbole_llm.itemid.text_projection.TextSide`.
        learning_rate: Adam's.
        batch_size: items a step.
        epochs: most passes over the items.
        patience: epochs without a loss lower by ``least_gain`` than the lowest before, after which training ends; 0
            never ends it early.
        least_gain: a share of the lowest loss.
        kmeans_points: items whose vectors each level's k-means start looks at, at least ``codes``; 0 is all.
        reseed_dead: whether a code that no item chose in an epoch is put where the loss of an item is highest.
        least_usage: the share of a level's codes that must be in use in every epoch; 0 is no watch.
        least_perplexity: likewise of the perplexity of a level's codes over C, which unevenly used codes lower.

    Raises:
        UserError: an unknown or impossible value.
    """

    levels: int = 4
    codes: int = 256
    distance: Distance = "cosine"
    residual: Residual = "abs"
    text_weight: float = 1.0
    projection: Projection = "learned"
    learning_rate: float = 1e-3
    batch_size: int = 1024
    epochs: int = 500
    patience: int = 10
    least_gain: float = 1e-3
    kmeans_points: int = 0
    reseed_dead: bool = False
    least_usage: float = 0.0
    least_perplexity: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (
            ("distance", get_args(Distance)), ("residual", get_args(Residual)), ("projection", get_args(Projection)),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} can be {', '.join(known)}, not {value!r}{did_you_mean(str(value), known)}")
        for names, low, high, wanted in (
            (("levels", "codes", "batch_size", "epochs"), 1, math.inf, "at least 1"),
            (("text_weight", "patience", "least_gain", "kmeans_points"), 0, math.inf, "0 or more"),
            (("least_usage", "least_perplexity"), 0, 1, "a share from 0 to 1"),
        ):
            for name in names:
                if not low <= getattr(self, name) <= high:
                    raise UserError(f"{name} should be {wanted}, but is {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate should be above 0, but is {self.learning_rate}")
        if 0 < self.kmeans_points < self.codes:
            raise UserError(
                f"kmeans_points {self.kmeans_points} is below the {self.codes} codes that should start there"
            )


@dataclass(frozen=True)
class Aligned:
    """What a training left.

    Args:
        codebook: the trained codes.
        weight: of the projection of texts as they were handed in, float32 ``[d, H]`` (of codes ``[H, d]`` under
            ``code_up``); ``None`` without texts.
        bias: ``[d]``, or ``[H]``.
        projection: which kind it is.
        losses: float64 ``[epochs, 2]``, L^B and L^L (not weighted), means over the items of an epoch.
        used: int64 ``[epochs, N]``, codes that items chose in an epoch.
        perplexity: float64 ``[epochs, N]``, 2 to the entropy in bits of the choices.
        reseeded: dead codes that were given a new place.
        ended: ``flat`` or ``epochs``, why training did.
        seconds: that this attempt took.
    """

    codebook: ResidualCodebook
    weight: Tensor | None
    bias: Tensor | None
    projection: Projection
    losses: np.ndarray
    used: np.ndarray
    perplexity: np.ndarray
    reseeded: int
    ended: Literal["flat", "epochs"]
    seconds: float

    @property
    def epochs(self) -> int:
        """How many were run."""
        return len(self.losses)

    def project(self, texts: Tensor) -> Tensor:
        """Texts as vectors that the codebook can encode: for items without interactions.

        Args:
            texts: ``[n, H]``, made as those of training were.

        Returns:
            float32 ``[n, d]``; under ``code_up`` the vectors whose images are nearest.

        Raises:
            UserError: the codebook was trained without texts, or these are of another width.
        """
        if self.weight is None or self.bias is None:
            raise UserError("the codebook was trained without texts (text_weight: 0), so it has no codes for a text")
        weight, bias = self.text_map()
        if texts.shape[1] != weight.shape[1]:
            raise UserError(f"texts of {texts.shape[1]} dimensions, but the codebook was trained on {weight.shape[1]}")
        return torch.addmm(bias, texts.to(weight.device, torch.float32), weight.T)

    def text_map(self) -> tuple[Tensor, Tensor]:
        """The projection as a map from texts: weight ``[d, H]`` and bias ``[d]``; of ``code_up`` its pseudo-inverse."""
        assert self.weight is not None and self.bias is not None
        if self.projection != "code_up":
            return self.weight, self.bias
        inverse = torch.linalg.pinv(self.weight)
        return inverse, -inverse @ self.bias


def train_alignment(
    points: np.ndarray | Tensor,
    texts: np.ndarray | Tensor | None,
    settings: AlignmentSettings,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    resume: Resume | None = None,
    show_progress: bool = True,
) -> Aligned:
    """Train codebooks on the items that are to have codes.

    Args:
        points: float ``[n, d]``, item vectors; the padding item is left out.
        texts: float ``[n, H]``, of the same items; not looked at where ``text_weight`` is 0.
        settings: sizes, losses and budget.
        seed: of the start and the order of items; equal seeds and numbers of threads give equal codes on a CPU, also
            after a break.
        device: where to train.
        resume: where to keep what is needed to go on, and to find what an attempt that was cut off kept.
        show_progress: whether to tell how far along it is.

    Returns:
        The codebook and how it came about.

    Raises:
        UserError: fewer items than codes, values that are no numbers, texts that are missing or of other items.
        TrainingStoppedError: a level collapsed, or the loss became no number.
    """
    start = time.perf_counter()
    x = _checked(points, "item vectors")
    check_count(len(x), settings.codes)
    told = None
    if settings.text_weight:
        if texts is None:
            raise UserError("text_weight is above 0, but there are no texts to align the codes with")
        told = _checked(texts, "text vectors")
        if len(told) != len(x):
            raise UserError(f"{len(told)} text vectors for {len(x)} item vectors: they are not of the same items")
    training = _Training(x.to(device), None if told is None else told.to(device), settings, seed)
    return training.run(resume, show_progress, start)


def _checked(vectors: np.ndarray | Tensor, what: str) -> Tensor:
    made = torch.as_tensor(vectors).detach().to(torch.float32)
    if made.dim() != 2:
        raise UserError(f"{what} should be a table [items, dimensions], but have shape {tuple(made.shape)}")
    check_points(made.cpu().numpy(), what)
    return made


class _Training:
    """One training: what changes from epoch to epoch."""

    def __init__(self, points: Tensor, texts: Tensor | None, settings: AlignmentSettings, seed: int) -> None:
        self.points, self.settings, self.seed = points, settings, seed
        self.mark = _mark(points, texts, settings, seed)
        self.side = None if texts is None else TextSide(texts, points, settings.projection, seed)
        self.levels = torch.empty(settings.levels, settings.codes, points.shape[1], device=points.device)
        self.trained = [self.levels, *(self.side.trained if self.side is not None else [])]
        self.optimizer = torch.optim.Adam(self.trained, lr=settings.learning_rate, fused=True)
        self.losses: list[list[float]] = []
        self.used: list[list[int]] = []
        self.perplexity: list[list[float]] = []
        self.reseeded = 0

    def run(self, resume: Resume | None, show_progress: bool, start: float) -> Aligned:
        """Train to the end."""
        if not self._take_up(resume):
            self._start_codes()
        steps = Steps("alignment tokenization", self.settings.epochs, show_progress)
        steps.done = len(self.losses)
        try:
            while len(self.losses) < self.settings.epochs and not self._flat():
                self._epoch()
                steps.note(f"loss {self._totals()[-1]:.4f}")
                steps.advance()
                if resume is not None and resume.due():
                    resume.save(self._state())
        finally:
            steps.close()
        weight, bias = (None, None) if self.side is None else self.side.folded()
        codebook = ResidualCodebook(self.levels.clone(), self.settings.distance, self.settings.residual)
        return Aligned(
            codebook, weight, bias, self.settings.projection, np.array(self.losses), np.array(self.used),
            np.array(self.perplexity), self.reseeded, "flat" if self._flat() else "epochs", time.perf_counter() - start,
        )  # fmt: skip

    def _start_codes(self) -> None:
        count = self.settings.kmeans_points
        points = self.points.cpu().numpy()
        if 0 < count < len(points):
            points = points[np.sort(np.random.default_rng(self.seed).permutation(len(points))[:count])]
        sizes = [self.settings.codes] * self.settings.levels
        made = residual_kmeans(points, sizes, self.settings.distance, self.settings.residual, self.seed)
        self.levels.copy_(made.levels)

    def _totals(self) -> np.ndarray:
        return np.array(self.losses) @ [1.0, self.settings.text_weight]

    def _flat(self) -> bool:
        """Whether the lowest loss of all is too little below the lowest before the last ``patience`` epochs."""
        patience = self.settings.patience
        if not patience or len(self.losses) <= patience:
            return False
        totals = self._totals()
        before = totals[:-patience].min()
        return bool(before - totals[-patience:].min() <= self.settings.least_gain * before)

    def _epoch(self) -> None:
        settings, epoch = self.settings, len(self.losses)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.points))
        counts = torch.zeros(settings.levels, settings.codes, dtype=torch.int64, device=self.points.device)
        sums = torch.zeros(2, dtype=torch.float64, device=self.points.device)
        for rows in torch.from_numpy(order).to(self.points.device).split(settings.batch_size):
            losses, codes = self._step(rows)
            sums += losses.double() * len(rows)
            counts.scatter_add_(1, codes, torch.ones_like(codes))
        means = (sums / len(self.points)).tolist()
        if not all(map(math.isfinite, means)):
            raise TrainingStoppedError(
                f"the loss of alignment tokenization is no number after epoch {epoch + 1}; try a lower "
                f"code_learning_rate (now {settings.learning_rate:g})"
            )
        self.losses.append(means)
        self._watch(counts)
        if settings.reseed_dead and len(self.losses) < settings.epochs:
            self._reseed(counts == 0)

    def _step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        settings, side = self.settings, self.side
        done = step(
            self.levels, self.points.index_select(0, rows), settings.distance, settings.residual,
            aims=None if side is None else side.aims(rows), weight=settings.text_weight,
            up=None if side is None else side.up(),
        )  # fmt: skip
        self.levels.grad = done.levels
        if side is not None and side.trained and done.sides is not None:
            side.weight.grad, side.bias.grad = side.gradients(rows, done.sides, done.chosen)
        self.optimizer.step()
        return torch.stack([done.behaviour, done.text]), done.codes

    def _watch(self, counts: Tensor) -> None:
        """Note how the codes were used in an epoch, and stop where they have fallen out of use."""
        shares = counts.double() / len(self.points)
        self.used.append((counts > 0).sum(dim=1).tolist())
        self.perplexity.append(torch.special.entr(shares).sum(dim=1).exp().tolist())
        settings = self.settings
        check_collapse(self.used[-1], settings.codes, len(self.points), settings.least_usage, REMEDIES)
        for level, perplexity in enumerate(self.perplexity[-1], 1):
            share = perplexity / settings.codes
            if share < settings.least_perplexity:
                raise TrainingStoppedError(
                    f"the codebook has collapsed: at level {level} the perplexity of the codes is {perplexity:.1f} of "
                    f"{settings.codes} ({share:.1%}, the least allowed is {settings.least_perplexity:.1%}); "
                    f"try {REMEDIES}"
                )

    def _reseed(self, dead: Tensor) -> None:
        """Put dead codes where the inputs with the highest loss of their level are, and forget their momentum."""
        if not dead.any():
            return
        book = ResidualCodebook(self.levels.clone(), self.settings.distance, self.settings.residual)
        codes, _ = book.encode(self.points)
        inputs = book.residuals(self.points, codes)
        memory = self.optimizer.state[self.levels]
        for level in range(book.depth):
            places = dead[level].nonzero()[:, 0]
            losses = gap(inputs[:, level], book.levels[level, codes[:, level]], book.distance)[0]
            worst = losses.argsort(descending=True, stable=True)[: len(places)]
            self.levels[level, places[: len(worst)]] = inputs[worst, level]
            for name in ("exp_avg", "exp_avg_sq"):
                memory[name][level, places] = 0
            self.reseeded += len(worst)

    def _state(self) -> dict[str, Any]:
        return {
            "mark": self.mark, "trained": self.trained, "optimizer": self.optimizer.state_dict(), "losses": self.losses,
            "used": self.used, "perplexity": self.perplexity, "reseeded": self.reseeded,
        }  # fmt: skip

    def _take_up(self, resume: Resume | None) -> bool:
        """Whether an earlier attempt at the same training left something to go on from."""
        state = resume.take_up() if resume is not None else None
        if resume is None or state is None:
            return False
        if state.get("mark") != self.mark:
            resume.refuse("what an earlier alignment tokenization left is of other items or settings")
            return False
        for ours, kept in zip(self.trained, state["trained"], strict=True):
            ours.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.used, self.perplexity = state["losses"], state["used"], state["perplexity"]
        self.reseeded = state["reseeded"]
        return True


def _mark(points: Tensor, texts: Tensor | None, settings: AlignmentSettings, seed: int) -> str:
    """What a kept state must have been trained on and by."""
    digest = hashlib.sha256(f"{sorted(dataclasses.asdict(settings).items())} {seed}".encode())
    for table in (points, texts):
        if table is not None:
            digest.update(f"{tuple(table.shape)}".encode())
            digest.update(table.contiguous().cpu().numpy().data)
    return digest.hexdigest()
