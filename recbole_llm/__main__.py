"""``python -m recbole_llm`` is the console script ``recbole-llm``."""

from recbole_llm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
