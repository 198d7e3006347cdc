"""Pages that need no network: one template and one style sheet become one file."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any, Final

# what turns or hides the text around it, and what no font draws; \n and \t stay
_UNSEEN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def render_page(template: str, **values: Any) -> str:
    """The page that `template`, a file of templates/, makes of `values`, all of which are escaped unless they are Markup.

    `css` is the shared style sheet. Missing values raise.
    """
    import jinja2
    from markupsafe import Markup

    folder = resources.files("lora_trainer.report").joinpath("templates")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    css = Markup(folder.joinpath("page.css").read_text(encoding="utf-8"))  # noqa: S704  our own file
    return environment.from_string(folder.joinpath(template).read_text(encoding="utf-8")).render(css=css, **values)


def shown(text: str, at_most: int | None = None) -> str:
    """Text of others for a page: characters that are not seen are named, what is longer than `at_most` ends in an ellipsis.

    Escaping is the template's. Direction marks would turn the text around them; joiners stay, emoji are made of them.
    """
    if at_most is not None and len(text) > at_most:
        text = f"{text[:at_most]}…"
    return _UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)
