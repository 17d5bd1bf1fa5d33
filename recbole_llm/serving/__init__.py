"""Recommendations for users of a trained run: live, or from a store that was built once."""
