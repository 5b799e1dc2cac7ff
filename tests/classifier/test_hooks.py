"""Hooks are ordered, belong to one object and leave when their handle says so."""

import copy
import pickle

import pytest

from cmap_defense.classifier.hooks import StepHooks


def first(state: object) -> None:
    """A hook that can be pickled."""


def second(state: object) -> None:
    """Another."""


def test_hooks_come_in_the_order_of_their_registration():
    hooks = StepHooks()
    for hook in (second, first, second):
        hooks.register(hook)
    assert [hook.function for hook in hooks] == [second, first, second]
    assert len(hooks) == 3


@pytest.mark.parametrize(
    ("before", "place", "later", "left"),
    [
        ([first, second, first], 1, [], [first, first]),
        ([first, first], 0, [], [first]),
        ([first], 0, [second], [second]),
        ([first, second], 0, [first], [second, first]),
    ],
)
def test_a_handle_removes_its_own_hook_alone_and_once(before: list, place: int, later: list, left: list):
    hooks = StepHooks()
    handle = [hooks.register(hook) for hook in before][place]
    handle.remove()
    for hook in later:
        hooks.register(hook)
    handle.remove()
    assert [hook.function for hook in hooks] == left


def test_a_handle_is_a_context_manager_that_lets_exceptions_out():
    hooks = StepHooks()
    with hooks.register(first) as handle:
        assert [hook.function for hook in hooks] == [first]
        assert handle is not None
    assert [hook.function for hook in hooks] == []
    with pytest.raises(KeyError, match="mine"), hooks.register(first):
        raise KeyError("mine")
    assert [hook.function for hook in hooks] == []


def test_hooks_may_be_removed_while_they_run():
    hooks = StepHooks()
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
    hooks = StepHooks()
    hooks.register(first)
    twin = duplicate(hooks)
    assert len(twin) == 0
    twin.register(second)
    assert [hook.function for hook in hooks] == [first]
    assert [hook.function for hook in twin] == [second]


def test_hooks_that_cannot_be_pickled_do_not_hinder_a_pickle():
    hooks = StepHooks()
    hooks.register(lambda state: None)
    assert len(pickle.loads(pickle.dumps(hooks))) == 0
