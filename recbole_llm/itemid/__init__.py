"""Items as token sequences: codes, title tokens, raw ids; the trie over them."""
