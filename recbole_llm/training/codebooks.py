"""From settings to a trained codebook: alignment tokenization, an RQ-VAE, or residual k-means."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recbole_llm.disk import write_whole
from recbole_llm.errors import UserError
from recbole_llm.itemid.alignment import AlignmentSettings, train_alignment
from recbole_llm.itemid.codebook import ResidualCodebook, residual_kmeans
from recbole_llm.itemid.rqvae import RQVAE, RQVAESettings
from recbole_llm.itemid.rqvae_training import train_rqvae
from recbole_llm.training.state import ResumeFile

CODEBOOK = "codebook.safetensors"
AUTOENCODER = "autoencoder"
PROJECTION = "projection.safetensors"

# Fields whose setting is not called `code_<field>`; those without a name keep their own defaults.
_SETTINGS = {"hidden_sizes": "code_layers", "latent_size": "code_dim", "codes": "code_size", "steps": ""}
# What is trained in passes.
_KINDS: dict[str, Any] = {"alignment": AlignmentSettings, "rqvae": RQVAESettings}


@dataclass
class Quantiser:
    """What turns a point into codes.

    Attributes:
        codebook: the codes.
        autoencoder: what brings a point to where the codes are, where there is one.
        projection: weight and bias of the map from texts that was learned with the codes, where there is no
            autoencoder, which has its own; ``[d, H]`` and ``[d]``.
        losses: of every pass; none where there were no passes, or the autoencoder tells of them in its figures.
    """

    codebook: ResidualCodebook
    autoencoder: RQVAE | None = None
    projection: tuple[Tensor, Tensor] | None = None
    losses: list[float] = field(default_factory=list)

    def latent(self, points: np.ndarray) -> Tensor:
        """Where the codebook takes points, float32 ``[n, d]``."""
        x = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32))
        return x if self.autoencoder is None else self.autoencoder.latent(x)

    def project(self, texts: np.ndarray) -> Tensor:
        """Where the projection learned with the codes puts texts.

        Args:
            texts: float32 ``[n, H]``.

        Returns:
            float32 ``[n, d]``, for the codebook.
        """
        x = torch.from_numpy(texts)
        if self.autoencoder is not None:
            return self.autoencoder.project(x)
        assert self.projection is not None  # see check_settings
        weight, bias = self.projection
        return torch.addmm(bias, x, weight.T)

    def save(self, folder: Path) -> None:
        """Write what is needed to give a new item its codes; see :meth:`load`."""
        self.codebook.save(folder / CODEBOOK)
        if self.autoencoder is not None:
            (folder / AUTOENCODER).mkdir(exist_ok=True)
            self.autoencoder.save(folder / AUTOENCODER)
        if self.projection is not None:
            tensors = dict(zip(("weight", "bias"), self.projection, strict=True))
            write_whole(folder / PROJECTION, lambda part: save_file(tensors, part))

    @classmethod
    def load(cls, folder: Path) -> Quantiser:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: a file is missing or damaged.
        """
        folder = Path(folder)
        autoencoder = RQVAE.load(folder / AUTOENCODER) if (folder / AUTOENCODER).is_dir() else None
        projection = load_file(folder / PROJECTION) if (folder / PROJECTION).is_file() else None
        return cls(
            ResidualCodebook.load(folder / CODEBOOK), autoencoder,
            None if projection is None else (projection["weight"], projection["bias"]),
        )  # fmt: skip


def check_settings(config: Any, projected: bool) -> None:
    """Refuse what :func:`train_quantiser` would, before the models that it needs are trained.

    Args:
        config: the run's; keys ``code_...``.
        projected: whether items are to be placed by the projection of texts that is learned with the codes.

    Raises:
        UserError: a value that cannot be, or a projection of texts that nothing learns.
    """
    if not all(isinstance(width, int) and width > 0 for width in config["code_layers"]):
        raise UserError(f"code_layers should be a list of widths, each at least 1, but is {config['code_layers']}")
    if config["code_method"] in _KINDS:
        _settings(config)
    for key in ("code_cf_weight", "code_diversity_weight"):
        if config[key] and config["code_method"] != "rqvae":
            raise UserError(f"{key} above 0 is of code_method: rqvae, and not of {config['code_method']}: set it to 0")
    if config["code_method"] == "rqvae" and (config["code_distance"], config["code_residual"]) != ("l2", "signed"):
        raise UserError(
            "code_method: rqvae has code_distance: l2 and code_residual: signed; say so, or take item_tokens=ed"
        )
    if projected and (config["code_method"] not in _KINDS or not config["code_text_weight"]):
        raise UserError(
            "unseen_items: projection needs code_text_weight above 0 and code_method: alignment or rqvae; "
            "say unseen_items: text"
        )


def train_quantiser(
    config: Any,
    points: np.ndarray,
    texts: np.ndarray | None,
    resume: ResumeFile,
    behaviour: np.ndarray | None = None,
) -> Quantiser:
    """Train what ``code_method`` names.

    Args:
        config: the run's; keys ``code_...``.
        points: float32 ``[n, d]``, of the items to learn from.
        texts: float32 ``[n, H]`` of the same items.
        resume: where to keep what is needed to go on.
        behaviour: float32 ``[n, d]`` of the same items, for ``code_cf_weight``.

    Raises:
        UserError: fewer items than codes, or values that are no numbers.
        TrainingStoppedError: the codebook collapsed.
    """
    method, seed, device, shown = (config[key] for key in ("code_method", "seed", "device", "show_progress"))
    if method == "kmeans":
        sizes = [config["code_size"]] * config["code_levels"]
        return Quantiser(residual_kmeans(points, sizes, config["code_distance"], config["code_residual"], seed))
    if method == "rqvae":
        settings = _settings(config)
        if config["code_layers_narrow"]:
            below = tuple(width for width in settings.hidden_sizes if width < points.shape[1])
            settings = replace(settings, hidden_sizes=below)
        model = train_rqvae(
            points, settings, seed=seed, texts=texts, behaviour=behaviour, device=device, resume=resume,
            show_progress=shown,
        ).cpu()  # fmt: skip
        return Quantiser(model.codebook, model)
    made = train_alignment(
        points, texts, _settings(config), seed=seed, device=device, resume=resume, show_progress=shown
    )
    learned = made.text_map() if made.weight is not None else None
    projection = None if learned is None else (learned[0].cpu().contiguous(), learned[1].cpu().contiguous())
    return Quantiser(made.codebook.to("cpu"), projection=projection, losses=made.losses.sum(axis=1).tolist())


def _settings(config: Any) -> Any:
    """The settings of a method out of the run's."""
    kind = _KINDS[config["code_method"]]
    named = {entry.name: _SETTINGS.get(entry.name, f"code_{entry.name}") for entry in fields(kind)}
    try:
        return kind(**{name: config[key] for name, key in named.items() if key})
    except UserError as error:
        # It speaks of its fields, which the user knows by other names.
        raise UserError(f"code_{str(error).removeprefix('RQ-VAE: ')}") from None
