"""Settings that hold in one thread or asyncio task: which backend runs, whether windows or pixels
are computed, and which tables are kept.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

_lock = threading.Lock()


class Scope:
    """A setting that holds in this thread or asyncio task and in the tasks that it starts: with a
    subclass such as `use_backend`, inside `with use_backend(name):`, or after `use_backend(name)`
    alone until the surrounding `with` ends.

    Scopes may end in any order: the newest that has not ended decides. A thread starts without any;
    `contextvars.copy_context().run` passes on those of the thread that starts it.
    """

    anywhere: tuple = ()  # the settings that hold in at least one thread
    _open: ContextVar[tuple[Any, ...]]  # scopes of this kind, the oldest first
    _counts: Counter

    def __init_subclass__(cls) -> None:
        cls._open, cls._counts = ContextVar(cls.__name__, default=()), Counter()

    def __init__(self, setting: Any) -> None:
        self.setting, self._entered, self._ended, self._opened = setting, False, False, 0
        before = self._not_ended()
        if len(before) > 1 and not any(scope._entered for scope in before[-2:]):
            before.pop(-2).end()  # neither has a `with`: the later has replaced it for good
        self._open.set((*before, self))
        self._note(1)

    def __enter__(self) -> "Self":
        if self._ended or self not in self._open.get():  # again, or in another thread
            self._ended = False
            self._open.set((*self._not_ended(), self))
            self._note(1)
        self._entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        before = self._not_ended()
        if self in before:
            for later in before[before.index(self) + 1 :]:
                if not later._entered:
                    later.end()  # it was set inside this one, and ends with it
        self.end()

    def end(self) -> None:
        """Ends this scope in every task in which it holds, whatever was opened before or after."""
        if not self._ended:
            self._ended = True
            self._open.set(tuple(self._not_ended()))
            self._note(-self._opened)

    @classmethod
    def current(cls) -> "Self | None":
        """The scope that decides here and now."""
        return next(cls.all_here(), None)

    @classmethod
    def all_here(cls) -> "Iterator[Self]":
        """The scopes that hold here and now, the newest first."""
        return (scope for scope in reversed(cls._open.get()) if not scope._ended)

    @classmethod
    def setting_here(cls, default: Any = None) -> Any:
        """The setting that holds here and now. In a compiled graph it is the setting at
        compilation; a change of `anywhere` causes a recompilation.
        """
        if not cls.anywhere:
            return default
        if torch.compiler.is_compiling():
            return _constant_setting(cls, default)
        scope = cls.current()
        return default if scope is None else scope.setting

    def _not_ended(self) -> list:
        return [scope for scope in self._open.get() if not scope._ended]

    def _note(self, change: int) -> None:
        cls = type(self)
        with _lock:
            self._opened += change
            cls._counts[self.setting] += change
            cls._counts += Counter()  # drops counts of zero
            cls.anywhere = tuple(cls._counts)


def _constant_setting(cls: type[Scope], default: Any) -> Any:
    scope = cls.current()  # compilers cannot read a ContextVar
    return default if scope is None else scope.setting


# This is torch.compiler.assume_constant_result without its import, which takes a second.
setattr(_constant_setting, "_dynamo_marked_constant", True)
