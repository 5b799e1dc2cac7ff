"""Hooks are ordered, belong to one object and leave when their handle says so."""

from __future__ import annotations

import copy
import pickle

import pytest

from cmap_defense.classifier.hooks import LatentHooks


def first(state: object) -> None:
    """A hook that can be pickled."""


def second(state: object) -> None:
    """Another."""


def test_hooks_come_in_the_order_of_their_registration():
    hooks = LatentHooks()
    for hook in (second, first, second):
        hooks.register(hook)
    assert [hook.function for hook in hooks] == [second, first, second]
    assert len(hooks) == 3


def test_handle_removes_its_own_hook_alone():
    hooks = LatentHooks()
    hooks.register(first)
    handle = hooks.register(second)
    hooks.register(first)
    handle.remove()
    assert [hook.function for hook in hooks] == [first, first]


def test_handle_of_a_hook_registered_twice_removes_one_of_them():
    hooks = LatentHooks()
    handle = hooks.register(first)
    hooks.register(first)
    handle.remove()
    assert [hook.function for hook in hooks] == [first]


def test_removing_twice_does_nothing_more():
    hooks = LatentHooks()
    handle = hooks.register(first)
    handle.remove()
    hooks.register(second)
    handle.remove()
    assert [hook.function for hook in hooks] == [second]


def test_order_is_kept_after_a_removal():
    hooks = LatentHooks()
    handle = hooks.register(first)
    hooks.register(second)
    handle.remove()
    hooks.register(first)
    assert [hook.function for hook in hooks] == [second, first]


def test_handle_is_a_context_manager():
    hooks = LatentHooks()
    with hooks.register(first) as handle:
        assert [hook.function for hook in hooks] == [first]
        assert handle is not None
    assert [hook.function for hook in hooks] == []


def test_hook_is_removed_when_the_block_raises_and_the_exception_comes_out():
    hooks = LatentHooks()
    with pytest.raises(KeyError, match="mine"), hooks.register(first):
        raise KeyError("mine")
    assert [hook.function for hook in hooks] == []


def test_hooks_may_be_removed_while_they_run():
    hooks = LatentHooks()
    handle = hooks.register(first)
    hooks.register(second)
    seen = []
    for hook in hooks:
        handle.remove()
        seen.append(hook.function)
    assert seen == [first, second]
    assert [hook.function for hook in hooks] == [second]


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda hooks: pickle.loads(pickle.dumps(hooks))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_start_empty_and_leave_the_original_alone(duplicate):
    hooks = LatentHooks()
    hooks.register(first)
    twin = duplicate(hooks)
    assert len(twin) == 0
    twin.register(second)
    assert [hook.function for hook in hooks] == [first]
    assert [hook.function for hook in twin] == [second]


def test_hooks_that_cannot_be_pickled_do_not_hinder_a_pickle():
    hooks = LatentHooks()
    hooks.register(lambda state: None)
    assert len(pickle.loads(pickle.dumps(hooks))) == 0


def test_deepcopy_of_an_owner_has_no_hooks():
    owner = {"hooks": LatentHooks(), "value": [1]}
    owner["hooks"].register(first)
    twin = copy.deepcopy(owner)
    assert len(twin["hooks"]) == 0
    assert twin["value"] == [1]
