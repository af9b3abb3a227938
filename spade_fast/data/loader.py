"""Batches in an order that depends on the seed alone, so that a run can resume at any batch."""

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

from ..arguments import whole_number
from .dataset import Example, Folder, Stream, collate, random_of


class Sampler(TorchSampler):
    """Endless lists of (epoch, index), one per batch. Every epoch has each index once, in an order
    that seed and epoch decide, except for those left over from the last whole batch.

    Args:
        length: of the data set.
        batch: examples of this process in each batch, which has batch · processes of them.
        rank, processes: this process's number, and how many there are. Together they take the same
            batches as one process would.
        start: the number of the batch to begin at, counted over all epochs.

    Errors: ValueError if the data set has less than one batch.
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
                f"the data set has {length} examples; it should have at least one batch:"
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
    """This process's and worker's share of a stream's examples. Workers take turns, so their shares
    are whole batches and together yield the same as one worker would.
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
    """Yields Batches of a data set: of a Folder without end, of a Stream while it lasts. The
    batches are the same for any number of workers, and those of several processes together are
    those of one process with the whole batch.

    Args:
        dataset: a Folder, in an order that seed and epoch decide, or a Stream, in its own.
        batch: examples in each Batch of this process.
        sizes, kernel_size, scales: as in `collate`, which runs in the workers.
        workers: processes that read examples and number windows ahead.
        seed: of the order.
        rank, processes: this training process's number, and how many there are.
        start: the number of the batch to begin at; a Stream is read up to it.

    Errors: ValueError if the data set has less than one batch, or an argument is out of range.
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
        # without it the loader would draw from training's random numbers
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
    """Makes a worker ignore signals that are meant for the training process, which may still need
    its workers before it saves: Ctrl+C, and often SIGTERM, go to the whole process group. A SIGTERM
    from the training process itself ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # without it the sender is not known
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_as_its_parent_says, daemon=True).start()


def _end_as_its_parent_says():
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def check_share(batch: int, rank: int, processes: int, start: int) -> None:
    """Errors: ValueError, TypeError unless a process can take this share of the batches."""
    whole_number("batch", batch, least=1)
    whole_number("start", start, least=0)
    if whole_number("rank", rank, least=0) >= whole_number("processes", processes, least=1):
        raise ValueError(f"rank is {rank}; it should be less than processes, {processes}")
