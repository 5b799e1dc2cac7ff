"""A figure of matplotlib as an element of a page: SVG in the page's colours and font.

Colours are variables of the page's style sheet, so that one plot serves light and dark. matplotlib is the extra
``[report]``, imported when something is drawn, and its settings are put back.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from cmap_defense.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "colour_of", "drawn", "shortened"]

COLOURS = {
    "ink": ("#010101", "#1c2330"),
    "muted": ("#010102", "#566070"),
    "grid": ("#010103", "#dfe3e8"),
    "paper": ("#010104", "#ffffff"),
    "series-1": ("#010105", "#0067a5"),
    "series-2": ("#010106", "#b84700"),
    "series-3": ("#010107", "#00795c"),
}
"""Names of the page's colours: what stands for each in matplotlib, and what it is where the page does not say."""

FONT = "'DejaVu Sans', sans-serif"
"""As matplotlib writes it; the page's own takes its place."""


def colour_of(name: str) -> str:
    """What stands in matplotlib for a colour of the page."""
    return COLOURS[name][0]


def drawn(
    name: str, size: tuple[float, float], title: str | None, description: str | None, draw: Callable[[Figure], None]
) -> str:
    """A plot of that size in units, as an element of HTML; without a title it is no more than decoration.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f"The plots of a report are drawn with matplotlib, which cannot be imported ({error}): "
            "pip install 'cmap-defense[report]'."
        ) from error
    ours = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],
        "text.parse_math": False,
        "text.color": colour_of("ink"),
    }
    unknown = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings(), matplotlib.style.context(["default", ours]):
        warnings.filterwarnings("ignore", "Glyph ", UserWarning)  # names in any script: the browser has its own fonts
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        figure = Figure((size[0] / 72, size[1] / 72), dpi=72)
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=unknown)
    return _inline(text.getvalue(), name, title, description)


def _inline(text: str, name: str, title: str | None, description: str | None) -> str:
    """An SVG file as an element of a page: no namespaces, no ids but those referred to, the page's colours."""
    root = ElementTree.fromstring(text)
    used = set(re.findall(r"#(\w+)[\")]", text))
    sentinels = {sentinel: f"var(--{colour}, {else_})" for colour, (sentinel, else_) in COLOURS.items()}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for attribute in list(element.attrib):
            value = element.attrib.pop(attribute)
            plain = attribute.rpartition("}")[2]
            if plain == "style":
                value = re.sub("#0101[0-9a-f]{2}", lambda found: sentinels[found[0]], value)
                value = value.replace(FONT, f"var(--font, {FONT})")
            if plain != "id" or value in used:
                element.set(plain, " ".join(value.split()))
        if element.tag != "text" and not (element.text or "").strip():
            element.text = None
        element.tail = None
    for element in list(root):
        if element.tag == "defs" and element.find("style") is not None:
            root.remove(element)  # it would hold for the whole page
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    width, height = root.attrib["viewBox"].split()[2:]
    root.set("width", width)
    root.set("height", height)
    root.set("class", "plot")
    if title is None:
        root.set("aria-hidden", "true")
        return ElementTree.tostring(root, encoding="unicode")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for place, (part, words) in enumerate((("title", title), ("desc", description or ""))):
        element = ElementTree.Element(part, {"id": f"{name}-{'title' if part == 'title' else 'description'}"})
        element.text = shortened(words, 2000)
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def shortened(name: str, length: int) -> str:
    """A name in one line of printable characters, its end left out where it is too long."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    return shown if len(shown) <= length else shown[: length - 1] + "…"
