"""`document`: one HTML page that loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files


def document(title: str, body: str, *, styles: Sequence[str] = ("page.css",), scripts: Sequence[str] = ("page.js",)) -> str:
    """HTML with the style sheets and scripts of this folder inlined; `body` is HTML already."""
    here = files("flowalign.report")
    style, script = ("".join(here.joinpath(name).read_text(encoding="utf-8") for name in names) for names in (styles, scripts))
    # The policy makes the page unable to load anything, and to run any script but its own.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def shortened(text: str, most: int = 240) -> str:
    """The text, cut at `most` characters: a page stays small whatever it is about."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def figure(value: float, digits: int = 3) -> str:
    """A number for people: so many significant digits, a true minus, — for NaN."""
    if value != value:
        return "—"
    shown = f"{value:.{digits}g}"
    if "e" in shown and 1e-4 <= abs(value) < 1e6:
        shown = f"{value:,.0f}"
    return shown.replace("-", "−")
