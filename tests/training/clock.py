"""A clock for tests of time budgets."""

from collections.abc import Callable
from typing import Any


class Clock:
    """Seconds that pass when something is done, and not otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, taking so long."""

        def slow(*arguments: Any, **options: Any) -> Any:
            self.now += seconds
            return function(*arguments, **options)

        return slow
