"""Whether a difference between two rows holds from seed to seed, which a test over users does not ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from recbole_llm.leaderboard.statistics import ROUNDING


@dataclass(frozen=True)
class OverSeeds:
    """How one row differs from another in each of the seeds that both have.

    Attributes:
        by_seed: seed to the row's mean on test minus the other's.
        alike: seeds whose difference has the sign of the difference over all of them.
        p: two-sided, of the paired t-test over seeds, seeds - 1 degrees of freedom. ``None`` for fewer than two seeds,
            and where all differ by the same amount, as where neither row draws anything.
    """

    by_seed: dict[int, float]
    alike: int
    p: float | None

    def shown(self) -> dict[str, Any]:
        """As it stands in a leaderboard's plain data."""
        listed = [{"seed": seed, "difference": difference} for seed, difference in self.by_seed.items()]
        return {"by_seed": listed, "seeds_alike": self.alike, "seeds_both": len(listed), "seeds_p": self.p}


def over_seeds(row: Mapping[int, float], base: Mapping[int, float]) -> OverSeeds:
    """Set two rows against each other, seed by seed.

    Args:
        row, base: seed to the mean on test.
    """
    both = [seed for seed in row if seed in base]
    largest = max((abs(means[seed]) for means in (row, base) for seed in both), default=0.0)
    found = np.array([row[seed] - base[seed] for seed in both])
    found[np.abs(found) <= ROUNDING * largest] = 0.0
    by_seed = dict(zip(both, map(float, found), strict=True))
    alike = int(np.sum(np.sign(found) == np.sign(found.sum())))
    if len(found) < 2 or np.ptp(found) <= ROUNDING * largest:
        return OverSeeds(by_seed, alike, None)
    return OverSeeds(by_seed, alike, float(stats.ttest_1samp(found, 0.0).pvalue))
