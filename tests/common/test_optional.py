"""Optional dependencies: a module, or an error that names the extra."""

import json

import pytest

from cmap_defense.common.optional import optional_import
from cmap_defense.errors import MissingExtraError


def test_what_is_there_is_imported() -> None:
    assert optional_import("json", "report", "The report") is json


def test_what_is_not_there_is_named_with_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"The report: .* nowhere, .*install 'cmap-defense\[report\]'"):
        optional_import("nowhere.inside", "report", "The report")
