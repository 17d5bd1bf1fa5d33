"""Searching the catalogue with a causal language model: items as token sequences, found along their trie."""
