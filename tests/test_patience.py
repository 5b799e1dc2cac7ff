"""No test depends on how fast the machine is: nothing has a time of its own, and nothing is measured by the clock."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent

CLOCKS = ("perf_counter", "monotonic", "time", "process_time")


def faults(source: str) -> list[str]:
    """Limits in seconds that a busy machine may break, and clocks that are read, but to wait until something hangs."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg == "timeout" and isinstance(value, ast.Constant) and value.value not in (None, 0):
                    found.append(f"line {node.lineno}: timeout={value.value}")
            if (
                isinstance(node.func, ast.Attribute)
                and node.func.attr in CLOCKS
                and ast.unparse(node).startswith("time.")
            ):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_limits_are_those_of_what_hangs_and_no_clock_is_read() -> None:
    paths = [path for path in TESTS.rglob("*.py") if "golden" not in path.parts]
    found = {path.relative_to(TESTS).as_posix(): faults(path.read_text(encoding="utf-8")) for path in paths}
    waiting = found.pop("backbones/remote/test_fetch.py")
    assert len(waiting) == 2, "that waits for what another process does, until it hangs"
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_those_faults_are_found() -> None:
    assert len(faults("run(command, timeout=300)\nbegun = time.perf_counter()\n")) == 2
    assert faults("run(command, timeout=HANGS)\nlock.acquire(timeout=0)\ntime.sleep(0.1)") == []
