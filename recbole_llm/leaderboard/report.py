"""A board as one HTML file: nothing is loaded from anywhere, and nothing in it needs a server.

The page's own sources stand in ``page/``; plotly's script comes out of the installed package when the file is written.
The browser itself is told to load nothing and to run no script but these (a Content-Security-Policy with their hashes),
so that a title or a name out of the data can neither call home nor run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from recbole_llm.disk import write_whole

_SCRIPTS = ("tools", "charts", "page")


def page(board: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        board: the plain data of ``leaderboard.json``.

    Returns:
        HTML of some 5 MB, nearly all of it plotly.
    """
    sources = resources.files("recbole_llm.leaderboard") / "page"
    scripts = {"plotly": get_plotlyjs()}
    scripts |= {name: (sources / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS}
    parts = {
        **scripts,
        "css": (sources / "page.css").read_text(encoding="utf-8"),
        "title": html.escape(board["title"]),
        "board": _embedded(board),
        "hashes": " ".join(_hash(script) for script in scripts.values()),
    }
    template = (sources / "page.html").read_text(encoding="utf-8")
    # In one pass: what is put in is not looked through again, so data may hold {{...}}.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def write_page(board: Mapping[str, Any], path: Path) -> None:
    """Write :func:`page` whole or not at all.

    Args:
        board: the plain data of ``leaderboard.json``.
        path: the HTML file; its folder is made if need be.
    """
    made = page(board).encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: part.write_bytes(made))


def _embedded(board: Mapping[str, Any]) -> str:
    """The board as JSON that no HTML parser can see the end of: ``<`` stands in strings only, as an escape."""
    return json.dumps(_known(board), allow_nan=False).replace("<", "\\u003c")


def _known(value: Any) -> Any:
    """Plain data with None for numbers that are none, as JSON knows neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {str(key): _known(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
