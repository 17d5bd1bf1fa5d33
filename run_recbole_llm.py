"""``python run_recbole_llm.py`` does what ``recbole-llm run`` does, in the way RecBole users know."""

import sys

from recbole_llm.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["run", *sys.argv[1:]]))
