"""Render a template and the shared style sheet into one self-contained HTML page."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any, Final

# control, direction and zero-width characters, which reorder or hide text or have no glyph; \n and \t are allowed
_INVISIBLE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def render_page(template: str, **values: Any) -> str:
    """Render `template`, a file in templates/, with `values`, which are escaped unless they are Markup.

    The template also gets the shared style sheet as `css`. A missing value raises `jinja2.UndefinedError`.
    """
    import jinja2
    from markupsafe import Markup

    folder = resources.files("lora_trainer.report").joinpath("templates")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    css = Markup(folder.joinpath("page.css").read_text(encoding="utf-8"))  # noqa: S704  our own file
    return environment.from_string(folder.joinpath(template).read_text(encoding="utf-8")).render(css=css, **values)


def display_text(text: str, at_most: int | None = None) -> str:
    """Prepare untrusted text for a page: truncate it to `at_most` characters and name invisible characters as `[U+202E]`.

    The template escapes the result. Zero-width joiners are kept because emoji sequences need them.
    """
    if at_most is not None and len(text) > at_most:
        text = f"{text[:at_most]}…"
    return _INVISIBLE.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)
