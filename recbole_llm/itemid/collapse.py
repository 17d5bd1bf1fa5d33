"""The watch over a codebook in training: are its codes still in use?"""

from __future__ import annotations

from collections.abc import Sequence

from recbole_llm.errors import TrainingStoppedError


def check_collapse(used: Sequence[int], size: int, items: int, least_usage: float, remedies: str) -> None:
    """Stop a training whose codes have fallen out of use.

    Args:
        used: codes that some item has, level by level.
        size: codes of each level.
        items: items that have codes; fewer than the codes cannot use all of them.
        least_usage: the share of codes that has to be in use at each level, from 0 (no watch) to 1.
        remedies: what to try, as it goes on after "try ".

    Raises:
        TrainingStoppedError: a level uses fewer; the line names the first such level and its share.
    """
    reachable = min(size, items)
    for level, count in enumerate(used, 1):
        if count < least_usage * reachable:
            raise TrainingStoppedError(
                f"the codebook has collapsed: at level {level} items use {count} of {reachable} codes "
                f"({count / reachable:.1%}, the least allowed is {least_usage:.1%}); try {remedies}"
            )
