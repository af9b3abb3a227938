"""Watches the memory accesses of Triton's kernels while its interpreter runs them."""

import contextlib
from unittest import mock

import numpy
import torch
import triton.runtime.interpreter as interpreter

BUILDER = interpreter.InterpreterBuilder


class Watch(contextlib.ExitStack):
    """Inside, new tensors are filled with NaN or the largest number, and the faults of every launch
    are recorded: addresses outside the arguments, and addresses that one program stores to and
    another stores to or loads from, whatever their order.

    faults: the faults, in words. kernels: the names of the kernels that ran.
    """

    def __init__(self):
        super().__init__()
        self.faults, self.kernels = [], set()

    def __enter__(self):
        super().__enter__()
        before = torch.are_deterministic_algorithms_enabled()
        self.callback(torch.use_deterministic_algorithms, before)
        torch.use_deterministic_algorithms(True, warn_only=True)
        launch, load, store = (
            interpreter.GridExecutor.__call__,
            BUILDER.create_masked_load,
            BUILDER.create_masked_store,
        )

        def watched_launch(executor, *arguments, **named):
            self.kernel, self.loads, self.stores = executor.fn.__name__, [], []
            self.ranges = list(ranges([*arguments, *named.values()]))
            self.kernels.add(self.kernel)
            launch(executor, *arguments, **named)
            self.look_for_races()

        def watched_load(builder, pointers, mask, *rest):
            self.loads.append(self.addresses(builder, "loads", pointers, mask))
            return load(builder, pointers, mask, *rest)

        def watched_store(builder, pointers, value, mask, *rest):
            addresses = self.addresses(builder, "stores", pointers, mask)
            if len(numpy.unique(addresses["byte"])) != len(addresses):
                self.note("a program stores several numbers to one address")
            self.stores.append(addresses)
            return store(builder, pointers, value, mask, *rest)

        def no_atomics(builder, *arguments):
            raise NotImplementedError("atomics are not watched")

        for owner, name, function in (
            (interpreter.GridExecutor, "__call__", watched_launch),
            (BUILDER, "create_masked_load", watched_load),
            (BUILDER, "create_masked_store", watched_store),
            (BUILDER, "create_atomic_rmw", no_atomics),
            (BUILDER, "create_atomic_cas", no_atomics),
        ):
            self.enter_context(mock.patch.object(owner, name, function))
        return self

    def note(self, what):
        self.faults.append(f"{self.kernel}: {what}")

    def addresses(self, builder, verb, pointers, mask):
        """Byte addresses of the elements that the mask selects, and the program that accesses
        them.
        """
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        firsts, mask = numpy.broadcast_arrays(pointers.data, mask.data)
        firsts = firsts[mask.astype(bool)].astype(numpy.int64)
        inside = numpy.zeros(len(firsts), bool)
        for begin, end in self.ranges:
            inside |= (begin <= firsts) & (firsts + size <= end)
        if not inside.all():
            self.note(f"{verb} outside of its arguments, {(~inside).sum()} of {len(inside)}")
        found = numpy.empty(len(firsts) * size, [("byte", "i8"), ("program", "i8")])
        found["byte"] = (firsts[:, None] + numpy.arange(size)).ravel()
        found["program"] = numpy.ravel_multi_index(builder.grid_idx, builder.grid_dim)
        return found

    def look_for_races(self):
        loads, stores = (
            numpy.unique(numpy.concatenate(all)) if all else numpy.empty(0, [("byte", "i8")])
            for all in (self.loads, self.stores)
        )
        if not len(stores):
            return
        _, counts = numpy.unique(stores["byte"], return_counts=True)
        if (counts > 1).any():
            self.note(f"several programs store to one address, {(counts > 1).sum()} bytes")
        places = numpy.searchsorted(stores["byte"], loads["byte"]).clip(max=len(stores) - 1)
        loaded = stores["byte"][places] == loads["byte"]
        others = loaded & (stores["program"][places] != loads["program"])
        if others.any():
            self.note(f"programs load what others store, {others.sum()} bytes")


def ranges(arguments):
    """The first and last addresses of the tensors."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from ranges(argument)
        elif isinstance(argument, torch.Tensor) and argument.numel():
            sizes = zip(argument.shape, argument.stride())
            elements = 1 + sum((size - 1) * stride for size, stride in sizes)
            first = argument.data_ptr()
            yield first, first + elements * argument.element_size()
