"""Settings for all tests: repeatable property tests, a fixed number of threads, nothing fetched from anywhere."""

import os
import pwd
from typing import NoReturn

import pytest
import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, as of this one below

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")

torch.set_num_threads(1)  # two threads that wait for each other on a busy machine are slower than one


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests with a marker run only when -m selects them, so that nothing is ever reported as skipped."""
    if config.option.markexpr:
        return
    markers = ("slow", "gpu", "network", "browser")
    chosen = [item for item in items if not any(map(item.get_closest_marker, markers))]
    left = [item for item in items if item not in chosen]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = chosen


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """An account as in many containers: HOME is not set, and there is no entry in /etc/passwd."""

    def unknown(user: object) -> NoReturn:
        raise KeyError(user)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
