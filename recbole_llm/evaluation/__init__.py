"""Ranking the whole catalogue: one candidate policy, RecBole's metrics, one value a user."""
