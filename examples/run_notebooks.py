"""Run the notebooks from the top and keep their outputs.

    pip install 'cmap-defense[notebooks]'
    python examples/run_notebooks.py                  # all of them
    python examples/run_notebooks.py wrap certify    # those whose names contain one of these

What differs from run to run without a reason, such as times of execution and messages on standard error, is not kept.
"""

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"
LARGEST = 300_000
"""Bytes of a notebook, so that a clone of the repository stays small."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; all notebooks without")
    wanted = parser.parse_args().names
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, where other work shares the cores
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not wanted or any(name in path.stem for name in wanted):
            book = nbformat.read(path, as_version=4)
            with tempfile.TemporaryDirectory() as folder:
                NotebookClient(
                    book, timeout=None, coalesce_streams=True, resources={"metadata": {"path": folder}}
                ).execute()
            book.metadata["language_info"] = {"name": "python"}
            for cell in book.cells:
                cell.metadata = {}
                if "outputs" in cell:
                    cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
                for output in cell.get("outputs", []):
                    output.get("data", {}).pop("image/jpeg", None)  # the same picture as image/png
            text = nbformat.writes(book) + "\n"
            if len(text.encode()) > LARGEST:
                raise SystemExit(f"{path.name} would have {len(text):,} bytes: show fewer or smaller pictures.")
            path.write_text(text, encoding="utf-8")
            print(f"{path.name}: {len(text):,} bytes", flush=True)


if __name__ == "__main__":
    main()
