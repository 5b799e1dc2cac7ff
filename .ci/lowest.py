"""Print the lowest version of each dependency that pyproject.toml allows, one ``name==version`` per line.

Arguments: extras whose dependencies are printed too. Names in ``--without`` are left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip has it
    from pip._vendor import tomli as tomllib

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
DEPENDENCY = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[a-z,]+)\])?(?:>=(?P<version>[0-9.]+))?$")


def lowest(extras: list[str]) -> dict[str, str]:
    """The lowest version by name, of the package's own dependencies and of these extras'."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    waiting = list(project["dependencies"])
    for extra in extras:
        waiting += project["optional-dependencies"][extra]
    while waiting:
        text = waiting.pop(0)
        parts = DEPENDENCY.match(text)
        if parts is None:
            sys.exit(f"{text} in pyproject.toml is not of the form name>=version.")
        if parts["name"] == project["name"]:
            for extra in parts["extras"].split(","):
                waiting += project["optional-dependencies"][extra]
        elif parts["version"] is None:
            sys.exit(f"{text} in pyproject.toml has no lower bound.")
        else:
            found[parts["name"]] = parts["version"]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--without", nargs="*", default=[])
    options = parser.parse_args()
    for name, version in lowest(options.extras).items():
        if name not in options.without:
            print(f"{name}=={version}")
