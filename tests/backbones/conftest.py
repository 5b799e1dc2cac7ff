"""A Hub on the loopback device, to which the real client talks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hubserver import HubServer, connect_client, serving
from tiny import files_of, own_names, tiny_folder, tiny_pipeline


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that the Hub's client uses, with empty caches in ``tmp_path / "home"``, and names of the test's own."""
    with serving() as server, own_names():
        connect_client(monkeypatch, server.address, tmp_path / "home")
        yield server


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """The files of two backbone folders, which differ in their weights."""
    place = tmp_path_factory.mktemp("models")
    return [files_of(tiny_folder(place / str(seed), seed)) for seed in (0, 1)]


@pytest.fixture(scope="session")
def pipeline_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a pipeline of the diffusers library."""
    return files_of(tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny"))
