"""Hooks of MkDocs: notebooks as pages below tutorials/, commands of at most 80 columns, the version in the footer.

Pages link to ``examples/notebooks/NAME.ipynb``, where a notebook is in the repository, and the site shows its page.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "notebooks"
PACKAGE = ROOT / "src" / "cmap_defense" / "__init__.py"
COLUMNS = 80
NOTE = (
    "*This page is the Jupyter notebook `examples/notebooks/{0}`, with the "
    "outputs of one run: [download it]({0}).*"
)


def on_config(config: Any) -> Any:
    """Show the package's version in the footer of each page."""
    config.copyright = f"cmap-defense {version()}"
    return config


def version() -> str:
    """The version, read where the build of the distribution reads it."""
    text = PACKAGE.read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found is not None, f"no version in {PACKAGE}"
    return found[1]


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each notebook, its pictures, and itself."""
    from mkdocs.structure.files import (
        File,
    )  # here, so that the tests need no MkDocs

    for path in sorted(FOLDER.glob("*.ipynb")):
        text, pictures = page_of(path)
        pictures[path.name] = path.read_bytes()
        files.append(
            File.generated(config, f"tutorials/{path.stem}.md", content=text)
        )
        for name, content in pictures.items():
            files.append(
                File.generated(config, f"tutorials/{name}", content=content)
            )
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to notebooks to their pages, and break long commands."""
    markdown = re.sub(
        r"((?:\.\./)*)\.\./examples/notebooks/([\w-]+)\.ipynb",
        r"\1tutorials/\2.md",
        markdown,
    )
    block = re.compile(r"(?<=^```text\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
    return block.sub(lambda found: broken(found[0]), markdown)


def broken(block: str) -> str:
    """A block of text, with its commands in lines of at most 80 columns where their words allow it."""
    lines = re.sub(r" *\\\n *", " ", block).splitlines()
    commands = re.compile(
        r"\w+=\S+ |(cmap-defense|python3?|torchrun|pip|pytest) "
    )
    return "".join(
        f"{command(line) if commands.match(line) else line}\n" for line in lines
    )


def command(line: str) -> str:
    """A command over several lines; an option stays beside its value."""
    if len(line) <= COLUMNS or " # " in line:
        return line
    words = re.findall(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""", line)
    units: list[str] = []
    for word in words:
        last = units[-1] if units else ""
        if re.fullmatch(r"--?\w[\w-]*", last) and not word.startswith("-"):
            units[-1] = f"{last} {word}"
        else:
            units.append(word)
    lines = [units[0]]
    for unit in units[1:]:
        if len(lines[-1]) + len(unit) + 3 <= COLUMNS:
            lines[-1] += f" {unit}"
        else:
            lines.append(f"    {unit}")
    return " \\\n".join(lines)


def page_of(path: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = re.sub(r"\]\(([\w-]+)\.ipynb", r"](\1.md", source)
            parts.append(source.replace("](../../docs/", "](../"))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output of the code above]({name})")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            else:
                text = "".join(
                    output.get("text") or data["text/plain"]
                ).rstrip()
                parts.append(f"```text\n{text}\n```")
    parts.insert(1, NOTE.format(path.name))
    return "\n\n".join(parts) + "\n", pictures
