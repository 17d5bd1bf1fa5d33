"""Language models: loading Hugging Face ones, and the embedded one that needs no download."""
