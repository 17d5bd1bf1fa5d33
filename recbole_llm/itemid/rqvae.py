"""A residual-quantised autoencoder of items: the encoder-decoder way to codes (TIGER, LC-Rec).

An MLP encodes a point to a latent vector z, N levels of codes take the residuals of z one after the other, and a
mirrored MLP decodes the sum of the chosen codes::

    r_1 = z,  q_l = the code of level l that is nearest to r_l,  r_(l+1) = r_l - q_l
    loss = |x - decode(sum q_l)|^2 + w * sum_l (|sg(r_l) - q_l|^2 + c |r_l - sg(q_l)|^2) + t * sum_l |q_l - P(text)|^2

sg stops the gradient, and the decoder's gradient goes straight through the codes to z. The last term, with a learned
linear P, is the alignment with texts that "Semantic Convergence" adds to codebooks. LETTER's two terms are in
:mod:`~recbole_llm.itemid.letter`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recbole_llm.disk import write_whole
from recbole_llm.errors import UserError
from recbole_llm.itemid.codebook import ResidualCodebook, distances
from recbole_llm.itemid.letter import collaborative_loss, diversity_losses
from recbole_llm.itemid.sinkhorn import EPSILON, ITERATIONS, balanced

WEIGHTS = "rqvae.safetensors"
DESCRIPTION = "rqvae.json"
REDUCTIONS = ("mean", "sum")
SCHEDULES = ("linear", "constant")
CHECKPOINTS = ("reconstruction", "loss", "collision")


@dataclass(frozen=True)
class RQVAESettings:
    """Sizes, loss and training of the autoencoder. The defaults are LC-Rec's recipe.

    ======================= =========================== ====================================
    setting                 lcrec                       tiger
    ======================= =========================== ====================================
    hidden_sizes            2048 1024 512 256 128 64    512 256 128
    latent_size             32                          32
    levels x codes          4 x 256                     3 x 256
    dropout, batch_norm     0, no                       0, no
    epochs or steps         10,000 epochs               400,000 steps (paper: 20,000 epochs)
    batch_size              1024                        640 (paper: 1024)
    learning_rate           0.001                       0.001 (paper: Adagrad, 0.4)
    weight_decay            0.0001                      0.01
    schedule, warm_up       linear, 50 epochs           constant, 0
    max_norm                1                           0
    reduction               mean                        sum
    quantisation_weight     1                           1
    commitment              0.25                        0.25
    commit_all_levels       no                          yes
    kmeans_points           1024 (its first batch)      640 (its first batch)
    kmeans_iterations       100                         100
    sinkhorn_levels, ..     1, epsilon 0.003, 50        0
    checkpoint              loss or collision           none: the last weights
    ======================= =========================== ====================================

    LC-Rec's are those of its code, of which its author used about half the epochs. TIGER has no official code; where no
    paper is named, the figures are those of its best-known re-implementation (RQ-VAE-Recommender).

    Attributes:
        hidden_sizes: widths between input and latent; the decoder mirrors them.
        latent_size: width of the latent and of the codes.
        levels: N.
        codes: codes of each level.
        dropout: before each linear layer.
        batch_norm: after each linear layer but the last of encoder and of decoder.
        epochs: passes over the items.
        steps: optimizer steps, rounded up to whole epochs; above 0 they stand instead of ``epochs``.
        batch_size: items a step, at most; the batches of an epoch are of even size.
        learning_rate: the highest one, of AdamW.
        weight_decay: of AdamW.
        schedule: after the warm-up, ``linear`` falls to 0 and ``constant`` stays.
        warm_up: epochs in which the learning rate rises.
        max_norm: gradients are clipped to this norm; 0 does not.
        reduction: ``mean`` takes squared errors as means over dimensions and levels, ``sum`` as sums.
        quantisation_weight: w above.
        commitment: c above.
        commit_all_levels: whether the encoder feels the commitment of every level, as TIGER's loss says; otherwise it
            feels the first level's alone, as in LC-Rec's code, whose residuals let no gradient through.
        kmeans_points: items that the codes start from by k-means; 0 all.
        kmeans_iterations: of that k-means.
        kmeans_even: each code starts from about as many items; the iterations are then that k-means' own.
        sinkhorn_levels: in training, so many last levels choose codes by balanced assignment.
        sinkhorn_epsilon: its temperature.
        sinkhorn_iterations: its rounds.
        text_weight: t above; 0 needs no texts.
        cf_weight: of LETTER's pull of latents to embeddings of a collaborative model; 0 needs none.
        diversity_weight: of LETTER's pull of codes to others of their cluster, within w above; 0 clusters nothing.
        diversity_clusters: of each level's codes.
        diversity_every: epochs between two clusterings.
        check_every: epochs between two looks at all items, which find the best weights and a collapse.
        checkpoint: weights are best by the ``reconstruction`` error, the whole ``loss``, or the ``collision`` rate
            (then the loss) of all items. The latter two are often best before much is learned: the loss rises as
            latent vectors grow apart, and an encoder that knows little spreads items well.
        reseed_dead: give codes that no item has at a look the place of the items that are farthest from theirs.
        least_usage: stop if a smaller share of a level's codes is in use at a look.
    """

    hidden_sizes: tuple[int, ...] = (2048, 1024, 512, 256, 128, 64)
    latent_size: int = 32
    levels: int = 4
    codes: int = 256
    dropout: float = 0.0
    batch_norm: bool = False
    epochs: int = 10_000
    steps: int = 0
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    schedule: str = "linear"
    warm_up: int = 50
    max_norm: float = 1.0
    reduction: str = "mean"
    quantisation_weight: float = 1.0
    commitment: float = 0.25
    commit_all_levels: bool = False
    kmeans_points: int = 1024
    kmeans_iterations: int = 100
    kmeans_even: bool = False
    sinkhorn_levels: int = 1
    sinkhorn_epsilon: float = EPSILON
    sinkhorn_iterations: int = ITERATIONS
    text_weight: float = 0.0
    cf_weight: float = 0.0
    diversity_weight: float = 0.0
    diversity_clusters: int = 10
    diversity_every: int = 1
    check_every: int = 50
    checkpoint: str = "reconstruction"
    reseed_dead: bool = False
    least_usage: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        for name, known in (("reduction", REDUCTIONS), ("schedule", SCHEDULES), ("checkpoint", CHECKPOINTS)):
            if getattr(self, name) not in known:
                raise UserError(f"RQ-VAE: {name} is {getattr(self, name)!r}; it can be {' or '.join(known)}")
        for names, low, high in (
            (("latent_size", "levels", "codes", "batch_size", "check_every"), 1, math.inf),
            (("diversity_clusters", "diversity_every"), 1, math.inf),
            (("cf_weight", "diversity_weight"), 0, math.inf),
            (("epochs", "steps", "warm_up", "max_norm", "weight_decay", "text_weight", "kmeans_points"), 0, math.inf),
            (("quantisation_weight", "commitment", "learning_rate"), 0, math.inf),
            (("dropout", "least_usage"), 0, 1),
            (("sinkhorn_levels",), 0, self.levels),
        ):
            for name in names:
                if not low <= getattr(self, name) <= high:
                    limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                    raise UserError(f"RQ-VAE: {name} is {getattr(self, name)}; it should be {limit}")
        if 0 < self.kmeans_points < self.codes:
            raise UserError(f"RQ-VAE: kmeans_points is {self.kmeans_points}, too few to start {self.codes} codes from")
        if self.diversity_weight and self.codes < 2:
            raise UserError("RQ-VAE: diversity_weight is above 0, and a level of one code has no other to come near")


@dataclass(frozen=True)
class Quantised:
    """What a batch of latent vectors became.

    Attributes:
        latent: float ``[B, d]``, the sum of the codes, whose gradient goes to what was quantised.
        codes: int64 ``[B, N]``.
        codebook_loss, commitment_loss: scalars, before their weights.
        vectors: float ``[B, N, d]``, the chosen codes.
    """

    latent: Tensor
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    vectors: Tensor


class RQVAE(nn.Module):
    """Encoder, codes and decoder.

    Args:
        input_size: width of the points.
        settings: sizes and loss.
        text_size: width of the text embeddings, where ``text_weight`` asks for them.
    """

    text_mean: Tensor
    text_scale: Tensor

    def __init__(self, input_size: int, settings: RQVAESettings, text_size: int = 0) -> None:
        super().__init__()
        self.input_size, self.settings, self.text_size = input_size, settings, text_size
        widths = [input_size, *settings.hidden_sizes, settings.latent_size]
        self.encoder = _mlp(widths, settings)
        self.decoder = _mlp(widths[::-1], settings)
        self.levels = nn.Parameter(torch.zeros(settings.levels, settings.codes, settings.latent_size))
        self.text_projector = nn.Linear(text_size, settings.latent_size) if text_size else None
        # Language models put all their vectors into a narrow cone, so texts are centred and brought to one size.
        self.register_buffer("text_mean", torch.zeros(text_size))
        self.register_buffer("text_scale", torch.ones(()))
        self.figures: dict[str, Any] = {}

    @property
    def codebook(self) -> ResidualCodebook:
        """The codes, which quantise what :meth:`latent` returns."""
        return ResidualCodebook(self.levels.detach().clone(), "l2", "signed")

    @torch.no_grad()
    def latent(self, points: Tensor, batch: int = 8192) -> Tensor:
        """Points ``[n, d_in]`` to latent vectors float32 ``[n, d]``, on the model's device.

        Raises:
            UserError: points of another width.
        """
        return self._in_batches(self.encoder, points, batch, self.input_size)

    @torch.no_grad()
    def reconstruct(self, points: Tensor, batch: int = 8192) -> Tensor:
        """Points ``[n, d_in]`` to what encoder, nearest codes and decoder make of them, float32 ``[n, d_in]``.

        Raises:
            UserError: points of another width.
        """

        def there_and_back(rows: Tensor) -> Tensor:
            return self.decoder(self.quantise(self.encoder(rows)).latent)

        return self._in_batches(there_and_back, points, batch, self.input_size)

    @torch.no_grad()
    def project(self, texts: Tensor, batch: int = 8192) -> Tensor:
        """Texts ``[n, text_size]`` to vectors the codebook can quantise, float32 ``[n, d]``: for items without points.

        Raises:
            UserError: the autoencoder was trained without texts, or these are of another width.
        """
        if self.text_projector is None:
            raise UserError("the RQ-VAE was trained without texts (text_weight: 0), so it has no codes for a text")
        return self._in_batches(self._aims, texts, batch, self.text_size)

    def _aims(self, texts: Tensor) -> Tensor:
        assert self.text_projector is not None
        return self.text_projector((texts - self.text_mean) / self.text_scale)

    def _in_batches(self, function: Callable[[Tensor], Tensor], vectors: Tensor, batch: int, width: int) -> Tensor:
        if vectors.dim() != 2 or vectors.shape[1] != width:
            raise UserError(
                f"the RQ-VAE is for vectors of {width} dimensions, but was given {tuple(vectors.shape)[1:]}; it is one "
                "of other embeddings"
            )
        training = self.training
        self.eval()
        made = [function(rows.to(self.levels.device, torch.float32)) for rows in vectors.split(batch)]
        self.train(training)
        return torch.cat(made)

    def choose(self, level: int, inputs: Tensor, even: bool = False) -> Tensor:
        """The code of each input ``[B, d]`` at a level, int64 ``[B]``: the nearest, or by balanced assignment."""
        gaps = distances(inputs.detach(), self.levels[level].detach(), "l2")
        if even:
            return balanced(gaps, self.settings.sinkhorn_epsilon, self.settings.sinkhorn_iterations)
        return gaps.argmin(1)

    def quantise(self, latent: Tensor) -> Quantised:
        """Quantise latent vectors ``[B, d]``; in training the last levels choose by balanced assignment."""
        settings = self.settings
        inputs, chosen, vectors, codebook, commitment = latent, [], [], [], []
        for level in range(settings.levels):
            even = self.training and level >= settings.levels - settings.sinkhorn_levels
            codes = self.choose(level, inputs, even)
            vector = F.embedding(codes, self.levels[level])
            codebook.append(self.squared_error(vector, inputs.detach()))
            commitment.append(self.squared_error(inputs, vector.detach()))
            chosen.append(codes)
            vectors.append(vector)
            inputs = inputs - vector.detach()
            if not settings.commit_all_levels:
                inputs = inputs.detach()
        total = torch.stack(vectors, dim=1).sum(1)
        return Quantised(
            latent + (total - latent).detach(),
            torch.stack(chosen, dim=1),
            self._over_levels(codebook),
            self._over_levels(commitment),
            torch.stack(vectors, dim=1),
        )

    def losses(
        self,
        points: Tensor,
        texts: Tensor | None = None,
        behaviour: Tensor | None = None,
        clusters: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The loss of a batch and its parts.

        Args:
            points: float ``[B, d_in]``.
            texts: float ``[B, text_size]``, where ``text_weight`` asks for them.
            behaviour: float ``[B, d]``, where ``cf_weight`` asks for them; rows of NaN for items that have none.
            clusters: int64 ``[N, C]``, each code's cluster, where ``diversity_weight`` asks for them. Which code
                another is drawn to is then random.

        Returns:
            Scalars ``reconstruction``, ``codebook``, ``commitment``, ``text`` (before weights; 0 without texts),
            ``diversity`` and ``cf`` (likewise; where there is what they are of) and ``loss``, which is the one to
            minimise; and the codes, int64 ``[B, N]``.
        """
        settings = self.settings
        made = self.quantise(self.encoder(points))
        reconstruction = self.squared_error(self.decoder(made.latent), points)
        quantisation = made.codebook_loss + settings.commitment * made.commitment_loss
        more = {}
        if clusters is not None:
            by_level = diversity_losses(made.vectors, made.codes, self.levels, clusters)
            more["diversity"] = self._over_levels(by_level)
            quantisation = quantisation + settings.diversity_weight * more["diversity"]
        loss = reconstruction + settings.quantisation_weight * quantisation
        text = torch.zeros_like(loss)
        if self.text_projector is not None and texts is not None:
            aim = self._aims(texts)
            text = self._over_levels([self.squared_error(vector, aim) for vector in made.vectors.unbind(1)])
            loss = loss + settings.text_weight * text
        if behaviour is not None:
            more["cf"] = collaborative_loss(made.latent, behaviour)
            loss = loss + settings.cf_weight * more["cf"]
        parts = {
            "reconstruction": reconstruction,
            "codebook": made.codebook_loss,
            "commitment": made.commitment_loss,
            "text": text,
            **more,
            "loss": loss,
        }
        return parts, made.codes

    def squared_error(self, left: Tensor, right: Tensor) -> Tensor:
        """Mean over rows of the squared error, which is a mean or a sum over dimensions by ``reduction``."""
        squares = (left - right).square()
        return squares.mean() if self.settings.reduction == "mean" else squares.sum(1).mean()

    def _over_levels(self, terms: list[Tensor]) -> Tensor:
        together = torch.stack(terms)
        return together.mean() if self.settings.reduction == "mean" else together.sum()

    def save(self, folder: Path) -> None:
        """Write weights as safetensors, and settings and figures as JSON.

        Args:
            folder: where to; it exists.
        """
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_whole(folder / WEIGHTS, lambda part: save_file(weights, str(part)))
        description = {
            "input_size": self.input_size,
            "text_size": self.text_size,
            "settings": dataclasses.asdict(self.settings),
            "figures": self.figures,
        }
        text = json.dumps(description, indent=1) + "\n"
        write_whole(folder / DESCRIPTION, lambda part: part.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: Path) -> RQVAE:
        """Read what :meth:`save` wrote, onto the CPU, ready for use.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            told = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            made = cls(told["input_size"], RQVAESettings(**told["settings"]), told["text_size"])
            made.load_state_dict(load_file(str(folder / WEIGHTS)))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder} holds no whole RQ-VAE ({str(error).splitlines()[0]})") from None
        made.figures = told["figures"]
        return made.eval()


def _mlp(widths: list[int], settings: RQVAESettings) -> nn.Sequential:
    """Linear layers with ReLU between them, drawn as LC-Rec draws them (Xavier's normal, no bias at first)."""
    layers: list[nn.Module] = []
    for place, (size, next_size) in enumerate(itertools.pairwise(widths)):
        last = place == len(widths) - 2
        linear = nn.Linear(size, next_size)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [nn.Dropout(settings.dropout)] if settings.dropout else []
        layers.append(linear)
        if not last:
            layers += [nn.BatchNorm1d(next_size)] if settings.batch_norm else []
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
