"""Switches: each holds in its own thread or task, and may end in any order."""

import asyncio
import contextvars
import threading

import pytest
import torch

from spade_fast import kernels, use_backend, window_mode
from spade_fast.nn.choice import current_mode

X = torch.ones(1, 1, 2, 2)
SWITCHES = {
    "backend": (use_backend, "torch", lambda: kernels.select(X).name),
    "windows": (window_mode, "never", current_mode),
}


@pytest.fixture(params=SWITCHES)
def switch(request):
    """A function that opens a scope, a function that reads the setting, and the settings before and
    inside.
    """
    kind, setting, read = SWITCHES[request.param]
    before = read()
    assert before != setting
    yield lambda: kind(setting), read, before, setting
    assert read() == before and not kind.anywhere


def test_a_switch_holds_with_and_without_with(switch):
    make, read, before, setting = switch
    with make():
        assert read() == setting
    assert read() == before
    scope = make()
    assert read() == setting
    with make():
        pass
    assert read() == setting
    scope.end()


def test_two_switches_may_end_in_any_order(switch):
    make, read, before, setting = switch
    first, second = make(), make()
    first.__enter__(), second.__enter__()
    first.__exit__()
    assert read() == setting
    second.__exit__()
    assert read() == before
    first.__exit__()


def test_without_with_the_later_one_replaces_the_earlier():
    for _ in range(100):
        scope = window_mode("never")
    assert len(window_mode._open.get()) <= 2
    other = window_mode("always")
    assert current_mode() == "always"
    other.end(), scope.end()
    assert current_mode() == "auto"


def test_threads_have_their_own_switches(switch):
    make, read, before, setting = switch
    found = {}

    def other(name):
        found[name] = read()
        with make():
            found[f"{name}, inside"] = read()

    with make():
        own = contextvars.copy_context()
        for thread in (
            threading.Thread(target=other, args=("alone",)),
            threading.Thread(target=lambda: own.run(other, "taken along")),
        ):
            thread.start(), thread.join()
    assert found == {
        "alone": before,
        "alone, inside": setting,
        "taken along": setting,
        "taken along, inside": setting,
    }


def test_tasks_have_their_own_switches(switch):
    make, read, before, setting = switch
    ends = []

    async def task(first, last):
        with make():
            await asyncio.sleep(first)
            assert read() == setting
        assert read() == before
        await asyncio.sleep(last)
        ends.append(read())

    async def both():
        await asyncio.gather(task(0, 0.03), task(0.02, 0))

    asyncio.run(both())
    assert ends == [before, before]


def test_a_task_that_outlives_the_scope_it_began_in(switch):
    make, read, before, _ = switch
    with make():
        inside = contextvars.copy_context()
    assert inside.run(read) == before


def test_one_switch_entered_twice(switch):
    make, read, before, setting = switch
    scope = make()
    for _ in range(2):
        with scope:
            assert read() == setting
        assert read() == before


def test_a_switch_created_here_and_entered_in_another_thread(switch):
    make, read, before, setting = switch
    scope, found = make(), []

    def other():
        with scope:
            found.append(read())

    thread = threading.Thread(target=other)
    thread.start(), thread.join()
    assert found == [setting] and read() == before  # it has ended everywhere
