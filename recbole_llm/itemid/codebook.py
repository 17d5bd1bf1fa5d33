"""Cascaded codebooks: an item's vector becomes one code a level, each level looking at what the one before left over.

The equations are those of "Semantic Convergence: Harmonizing Recommender Systems via Two-Stage Alignment and Behavioral
Semantic Tokenization" (AAAI 2025): ``c = argmin_c Dist(E^n, B^n_c)`` and ``E^{n+1} = | E^n - B^n_c |``. The absolute
value loses the sign, so that the codes of an item do not sum to its vector; ``signed`` leaves it out, as residual
quantisation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recbole_llm.disk import write_whole
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.itemid.kmeans import Distance, check_count, check_points, kmeans

Residual = Literal["abs", "signed"]

# Items whose distances from all codes are held at once.
BATCH = 8192


@dataclass(frozen=True)
class ResidualCodebook:
    """Codebooks of N levels with C codes each.

    Args:
        levels: float32 ``[N, C, d]``, every value finite.
        distance: by which a vector chooses its code: ``cosine`` (1 - cosine similarity; the norm of a code plays no
            part in the choice but in what is left over) or ``l2`` (the squared distance).
        residual: what goes on to the next level, ``signed``: input - code, or ``abs``: its absolute value.

    Raises:
        UserError: an unknown distance or residual.
        ValueError: ``levels`` has another shape or type.
    """

    levels: Tensor
    distance: Distance = "l2"
    residual: Residual = "signed"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("distance", self.distance, get_args(Distance)),
            ("residual", self.residual, get_args(Residual)),
        ):
            if value not in known:
                raise UserError(
                    f"a codebook's {name} can be {' or '.join(known)}, not {value!r}{did_you_mean(str(value), known)}"
                )
        if self.levels.dim() != 3 or self.levels.dtype != torch.float32 or not self.levels.numel():
            raise ValueError(f"levels should be float32 [N, C, d], but are {self.levels.dtype} {self.levels.shape}")

    @property
    def depth(self) -> int:
        """The number of levels."""
        return self.levels.shape[0]

    @property
    def size(self) -> int:
        """The codes of a level."""
        return self.levels.shape[1]

    @property
    def width(self) -> int:
        """The dimensions of a vector."""
        return self.levels.shape[2]

    def to(self, device: str | torch.device) -> Self:
        """The same codebook on a device."""
        return type(self)(self.levels.to(device), self.distance, self.residual)

    def distances(self, level: int, inputs: Tensor) -> Tensor:
        """How far each input is from each code of a level.

        Args:
            level: from 0.
            inputs: ``[n, d]``, float32 or float64.

        Returns:
            ``[n, C]`` in the type of ``inputs``; from or to a vector of zeros the cosine distance is 1.
        """
        return distances(inputs, self.levels[level].to(inputs.dtype), self.distance)

    def left_over(self, inputs: Tensor, codes: Tensor) -> Tensor:
        """What goes on to the next level.

        Args:
            inputs: ``[n, d]``, the inputs of a level.
            codes: ``[n, d]``, the code vectors chosen there.

        Returns:
            ``[n, d]``.
        """
        return left_over(inputs, codes, self.residual)

    @torch.no_grad()
    def encode(self, points: Tensor, batch: int = BATCH) -> tuple[Tensor, Tensor]:
        """The codes of vectors: at each level the nearest, of equally near ones the first.

        Distances are taken in double precision, so that a vector's codes do not hang on what it is encoded with.

        Args:
            points: ``[n, d]``.
            batch: how many at a time.

        Returns:
            Codes int64 ``[n, N]`` and the inputs of the last level, float32 ``[n, d]``.
        """
        self._check_width(points)
        codes = torch.empty(len(points), self.depth, dtype=torch.int64, device=self.levels.device)
        last = torch.empty(len(points), self.width, device=self.levels.device)
        for start in range(0, len(points), batch):
            inputs = points[start : start + batch].to(self.levels.device, torch.float64)
            for level in range(self.depth):
                last[start : start + batch] = inputs
                chosen = self.distances(level, inputs).argmin(dim=1)
                codes[start : start + batch, level] = chosen
                inputs = self.left_over(inputs, self.levels[level, chosen].double())
        return codes, last

    @torch.no_grad()
    def residuals(self, points: Tensor, codes: Tensor) -> Tensor:
        """What each level looks at, given the codes.

        Args:
            points: ``[n, d]``.
            codes: int64 ``[n, N]``, or fewer levels.

        Returns:
            float32 ``[n, N, d]``: the inputs of each level in ``codes``; at level 0 the points themselves.
        """
        self._check_width(points)
        inputs = points.to(self.levels.device, torch.float64)
        seen = []
        for level in range(codes.shape[1]):
            seen.append(inputs.float())
            inputs = self.left_over(inputs, self.levels[level, codes[:, level]].double())
        return torch.stack(seen, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """The vectors that codes stand for: the sum over the levels.

        Args:
            codes: int64 ``[n, N]``, or fewer levels.

        Returns:
            float32 ``[n, d]``.

        Raises:
            ValueError: the residual is ``abs``, under which codes do not sum to a vector.
        """
        if self.residual != "signed":
            raise ValueError("codes of absolute residuals do not sum to the vector they were made of")
        chosen = self.levels[torch.arange(codes.shape[1], device=codes.device), codes]
        return chosen.sum(dim=1)

    def _check_width(self, points: Tensor) -> None:
        if points.dim() != 2 or points.shape[1] != self.width:
            raise UserError(
                f"the codebook is for vectors of {self.width} dimensions, but was given {tuple(points.shape)[1:]}; it "
                "belongs to other embeddings"
            )

    def save(self, path: Path) -> None:
        """Write it as one safetensors file, whole or not at all; the folder exists."""
        tensors = {"levels": self.levels.detach().cpu().contiguous()}
        header: dict[str, str] = {"distance": self.distance, "residual": self.residual}
        write_whole(path, lambda part: save_file(tensors, str(part), metadata=header))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the file is missing, damaged or no codebook.
        """
        if not Path(path).is_file():
            raise UserError(f"codebook {path} does not exist")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                made = cls(file.get_tensor("levels"), header["distance"], header["residual"])  # type: ignore[arg-type]
        except (SafetensorError, OSError, KeyError, ValueError, UserError) as error:
            raise UserError(f"{path} is damaged or no codebook ({error})") from None
        check_points(made.levels.flatten(0, 1).numpy(), f"codes of {path}")
        return made


def distances(inputs: Tensor, codes: Tensor, distance: Distance) -> Tensor:
    """:meth:`ResidualCodebook.distances` for codes ``[C, d]`` at hand."""
    if distance == "cosine":
        return 1 - F.normalize(inputs, dim=1) @ F.normalize(codes, dim=1).T
    squares = torch.addmm(codes.square().sum(dim=1), inputs, codes.T, alpha=-2)
    return (squares + inputs.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def left_over(inputs: Tensor, codes: Tensor, residual: Residual) -> Tensor:
    """:meth:`ResidualCodebook.left_over` under a residual at hand."""
    rest = inputs - codes
    return rest.abs() if residual == "abs" else rest


def residual_kmeans(
    points: np.ndarray,
    sizes: Sequence[int],
    distance: Distance,
    residual: Residual,
    seed: int,
    iterations: int = 25,
) -> ResidualCodebook:
    """Codebooks whose codes are the cluster centres of what the level before left over.

    Args:
        points: float32 ``[n, d]``.
        sizes: the codes of each level, alike.
        distance: see :class:`ResidualCodebook`.
        residual: see :class:`ResidualCodebook`.
        seed: level n starts from ``seed + n``.
        iterations: most passes of k-means a level.

    Returns:
        The codebook.

    Raises:
        UserError: there are fewer points than codes, points are NaN or infinite, or levels are of different sizes.
    """
    if len(set(sizes)) != 1:
        raise UserError(f"the levels of a codebook have the same number of codes, but {list(sizes)} was asked for")
    check_count(len(points), sizes[0])
    inputs = np.ascontiguousarray(points, dtype=np.float32)
    levels = []
    for level, size in enumerate(sizes):
        centres, chosen = kmeans(inputs, size, seed=seed + level, iterations=iterations, distance=distance)
        levels.append(torch.from_numpy(centres))
        inputs = left_over(torch.from_numpy(inputs), levels[-1][torch.from_numpy(chosen)], residual).numpy()
    return ResidualCodebook(torch.stack(levels), distance, residual)
