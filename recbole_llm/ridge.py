"""One ridge regression for items that are placed by what is known of others."""

from __future__ import annotations

import numpy as np


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray, penalty: float) -> np.ndarray:
    """Predict ``y`` of new rows by a ridge regression with an intercept.

    Args:
        x: float ``[n, H]``, brought to mean 0 and mean square 1 before.
        y: float ``[n, d]``.
        new: float ``[m, H]``, brought there by the same shift and scale.
        penalty: in units of the rows' mean square, times their number.

    Returns:
        ``[m, d]``.
    """
    from sklearn.linear_model import Ridge  # slow to import

    centre = x.mean(0)
    scale = np.sqrt(np.square(x - centre).mean()) or 1.0
    return Ridge(alpha=penalty * len(x)).fit((x - centre) / scale, y).predict((new - centre) / scale)
