"""Backbones by name."""

from __future__ import annotations

import pytest

from cmap_defense.backbones.registry import backbone_names, registry_entry
from cmap_defense.errors import CmapError, SettingsError, UnknownNameError


def test_names_are_sorted_and_each_has_an_entry_of_that_name():
    names = backbone_names()
    assert names == sorted(names)
    assert "fashion-mnist-ct" in names
    assert [registry_entry(name).name for name in names] == names


def test_folders_of_entries_are_called_like_them():
    for name in backbone_names():
        assert registry_entry(name).folder.name == name


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion_mnist_ct", "Fashion-MNIST-ct", "fashion-mnist-ctt"])
def test_unknown_name_lists_the_near_match(name: str):
    with pytest.raises(UnknownNameError, match="fashion-mnist-ct") as caught:
        registry_entry(name)
    assert repr(name) in str(caught.value)


def test_unknown_name_that_is_near_to_none_lists_all():
    with pytest.raises(UnknownNameError) as caught:
        registry_entry("qqq")
    assert all(repr(name) in str(caught.value) for name in backbone_names())


def test_unknown_name_is_a_lookup_error_of_this_package():
    with pytest.raises(LookupError, match="qqq") as caught:
        registry_entry("qqq")
    assert isinstance(caught.value, CmapError)


def test_unknown_name_says_what_else_a_backbone_may_be():
    with pytest.raises(UnknownNameError, match=r"Hub id.*folder"):
        registry_entry("qqq")


@pytest.mark.parametrize("name", ["", None, 3, b"fashion-mnist-ct"])
def test_name_that_is_not_text_is_refused(name: object):
    with pytest.raises(SettingsError):
        registry_entry(name)  # pyright: ignore[reportArgumentType]
