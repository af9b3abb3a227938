"""Batches in an order that depends on the seed alone, so that a run can go on at any of them."""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import Sampler as TorchSampler

from .dataset import Example, Folder, Stream, collate, random_of


class Sampler(TorchSampler):
    """Endless lists of (epoch, index), a batch each: in every epoch each index once, in an order by
    seed and epoch, but for those that fill no batch.

    Args:
        length: of the data set.
        batch: examples that this process takes of each batch, which has batch · processes.
        rank, processes: which of how many processes this one is. Together they take the batch that
            one process would take.
        start: the number of the batch to begin at, counted over all epochs.

    Errors: ValueError where the data set has less than one batch.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        *,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
        start: int = 0,
    ) -> None:
        check_share(batch, rank, processes, start)
        if length < batch * processes:
            raise ValueError(
                f"the data set has {length} examples, it should have one batch at least:"
                f" {batch} for each of {processes} processes"
            )
        self.length, self.batch, self.seed = length, batch, seed
        self.rank, self.processes, self.start = rank, processes, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        whole = self.batch * self.processes
        epoch, number = divmod(self.start, self.length // whole)
        while True:
            order = list(range(self.length))
            random_of(self.seed, epoch).shuffle(order)
            for step in range(number, self.length // whole):
                first = step * whole + self.rank * self.batch
                yield [(epoch, index) for index in order[first : first + self.batch]]
            epoch, number = epoch + 1, 0


class Share(IterableDataset):
    """Those examples of a stream that are this process' and worker's own: batch after batch of
    them, so that workers, which take turns, yield what one would.
    """

    def __init__(self, stream: Stream, batch: int, rank: int, processes: int, start: int) -> None:
        self.stream, self.batch = stream, batch
        self.rank, self.processes, self.start = rank, processes, start

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        workers, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        for number, given in self.stream.numbered():
            turn, rank = divmod(number // self.batch, self.processes)
            turn -= self.start
            if turn >= 0 and rank == self.rank and turn % workers == own:
                yield self.stream.example(number, given)


def loader(
    dataset: Folder | Stream,
    batch: int,
    *,
    sizes: Iterable[Sequence[int]] = (),
    kernel_size: int = 3,
    scales: int = 0,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    processes: int = 1,
    start: int = 0,
) -> DataLoader:
    """Yields Batches of a data set, without end if the data set has none. They are the same ones
    for any number of workers, and those of several processes together are those of one with the
    whole batch.

    Args:
        dataset: a Folder, in an order by seed and epoch, or a Stream, in its own.
        batch: examples in each Batch, of this process.
        sizes, kernel_size, scales: what `collate` numbers, in the workers.
        workers: processes that read and number ahead.
        seed: of the order.
        rank, processes: which of how many training processes this one is.
        start: the number of the batch to begin at; a Stream is read up to it.

    Errors: ValueError where the data set has less than one batch, or an argument is out of range.
    """
    together = functools.partial(
        collate, sizes=[tuple(size) for size in sizes], kernel_size=kernel_size, scales=scales
    )
    settings: dict[str, Any] = {
        "num_workers": workers,
        "collate_fn": together,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": workers > 0,
        "worker_init_fn": _leave_interrupts,
        # else the loader draws from the random numbers of training
        "generator": torch.Generator().manual_seed(seed),
    }
    share = {"rank": rank, "processes": processes, "start": start}
    if isinstance(dataset, Stream):
        check_share(batch, **share)
        own = Share(dataset, batch, **share)
        return DataLoader(own, batch_size=batch, drop_last=True, **settings)
    sampler = Sampler(len(dataset), batch, seed=seed, **share)
    return DataLoader(dataset, batch_sampler=sampler, **settings)


def _leave_interrupts(worker):
    """Ctrl+C goes to the workers, too, and often SIGTERM: these are for the process that trains,
    which may yet save. Its own SIGTERM ends a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # else who sent it is not known
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_as_its_parent_says, daemon=True).start()


def _end_as_its_parent_says():
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def check_share(batch: int, rank: int, processes: int, start: int) -> None:
    """Raises where a process can take no such share of the batches."""
    if batch < 1 or processes < 1 or not 0 <= rank < processes or start < 0:
        raise ValueError(
            f"batch is {batch}, rank {rank}, processes {processes}, start {start}: they should be 1"
            " or more, 0 to processes − 1, 1 or more, and 0 or more"
        )
