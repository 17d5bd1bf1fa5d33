"""Items as token sequences: residual codebooks and other tokenizations, the trie over them, their quality."""
