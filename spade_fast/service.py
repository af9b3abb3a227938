"""One generator for many threads: requests wait in one queue, tables of γ and β are kept by the
content of a layout, and new weights replace the old ones between two images.

Serving with `frozen` leaves four problems to the caller. A thread of a pool is not inside the
`frozen` of another thread. Weights that are written in place while an image is computed affect only
part of it. So does a layout that is edited in the meantime. A change through `.data` goes unnoticed
until the end. Here, weights and layouts are private copies.
"""

import contextvars
import hashlib
import math
import os
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from . import checkpoint
from .arguments import whole_number
from .layout import SemanticLayout
from .nn import SPADEGenerator
from .nn.tables import Beside, Tables, keep_in

PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class Busy(RuntimeError):
    """Too many images wait already."""


class Service:
    """Images of one generator for any number of threads.

    Spectral norm is folded. γ and β of a layout are computed once and kept while there is room: a
    later layout with the same codes and palette uses the same tables. An image is the one that the
    generator itself returns, folded and `frozen`, for one layout and one z. With `batch` 1 it has
    the same bits, whatever other requests there are. With a larger `batch`, images of one size that
    wait at the same time are computed together, and PyTorch's convolutions of a batch may round
    differently from those of a single image.

    A scope in which the service is constructed, such as `use_backend`, applies to all its images,
    whichever thread requests them, until the scope ends.

    Args:
        weights: a path or a state_dict, as `checkpoint.load` takes it, the folder of a run of
            `spade-fast train`, or a SPADEGenerator. It is copied, so later changes to it do not
            affect the service.
        threads: the number of batches that are computed at the same time. Each also uses PyTorch's
            own threads; more than 1 helps if a single image does not keep those busy.
        cache: memory for the tables and windows of layouts: bytes, or text such as "256MB". The
            least recently used layout makes room for a new one.
        device, dtype: of the network. None: those of the weights; a file is loaded to the CPU.
        batch: the most images that are computed together.
        waiting: the most images that wait.

    Raises:
        ValueError, TypeError, OSError: an argument is not as described above, or `checkpoint.load`
            raises it.
    """

    def __init__(
        self,
        weights: str | os.PathLike | Mapping | SPADEGenerator,
        *,
        threads: int = 1,
        cache: str | int = "256MB",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch: int = 1,
        waiting: int = 64,
    ) -> None:
        threads = whole_number("threads", threads, least=1)
        self.batch = whole_number("batch", batch, least=1)
        self.waiting = whole_number("waiting", waiting, least=1)
        self._cache = bytes_of("cache", cache)
        self._wanted = device, dtype
        self._loaded = self._load(weights)
        self._jobs: deque[tuple[Request, int]] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self._context, self._here = contextvars.copy_context(), threading.local()
        self._pool = ThreadPoolExecutor(threads, "spade_fast.Service")

    def generate(self, layout: SemanticLayout, z: torch.Tensor | None = None) -> torch.Tensor:
        """The images [M, output_nc, *size], between −1 and 1, on the service's device.

        Args:
            layout: N layouts. It is copied, and may be edited as soon as `submit` returns.
            z: [M, z_dim] for a generator that begins with z, drawn or from an encoder. M is a
                multiple of N, and image i has layout i % N. None: standard normal, with M = N.

        Raises:
            ValueError, TypeError: an argument is not as described above; the message names it.
            Busy: the queue has no room for the images.
            RuntimeError: the service is closed; the network fails, for example for lack of memory;
                or a callback of a Future calls this and would wait for itself: it may `submit`.
        """
        self._refuse_in_callback("generate", ": use submit, which does not wait")
        return self.submit(layout, z).result()

    def submit(
        self, layout: SemanticLayout, z: torch.Tensor | None = None
    ) -> "Future[torch.Tensor]":
        """A Future of the images that `generate` returns. It may be cancelled while it waits. All
        its images are of the service's present weights. Raises: as `generate`.
        """
        loaded = self._loaded
        layouts, styles = loaded.checked(layout, z)
        request = Request(layouts, styles, loaded)
        with self._lock:
            if self._closed:
                raise RuntimeError("the service is closed and takes no more requests")
            if self._jobs and len(self._jobs) + len(request.layouts) > self.waiting:
                self._jobs = deque(job for job in self._jobs if not job[0].is_cancelled())
            if self._jobs and len(self._jobs) + len(request.layouts) > self.waiting:
                raise Busy(
                    f"{len(self._jobs)} images wait; with {len(request.layouts)} more there would"
                    f" be more than {self.waiting}, the most that may wait: ask again later"
                )
            self._jobs += [(request, number) for number in range(len(request.layouts))]
            for _ in request.layouts:
                self._pool.submit(self._context.copy().run, self._compute_some)
        return request.future

    def reload(self, weights: str | os.PathLike | Mapping | SPADEGenerator) -> None:
        """Replaces the weights, also by those of another generator. Requests made before this call
        still get images of the old weights, and requests made after it returns get images of the
        new ones; no image mixes the two. After an error, the old weights stay. Raises: as the
        constructor.
        """
        new = self._load(weights)
        with self._lock:
            old, self._loaded = self._loaded, new
        old.retire()

    @property
    def bytes(self) -> int:
        """The bytes that kept tables and windows take, never more than `cache`."""
        return self._loaded.bytes

    @property
    def generator_arguments(self) -> dict:
        """The arguments of the present generator, such as label_nc and z_dim."""
        return dict(self._loaded.generator.arguments)

    @property
    def image_size(self) -> tuple[int, ...]:
        """The size of the generator's images, such as (height, width)."""
        generator = self._loaded.generator
        return tuple(generator.last_scale * length for length in generator.sizes[-1])

    def close(self, cancel: bool = False) -> None:
        """Takes no more requests, and waits for those that were made.

        cancel: whether to cancel the requests that no thread has begun to compute.

        Errors: RuntimeError if a callback of a Future calls this and would wait for itself.
        """
        self._refuse_in_callback("close", "")
        with self._lock:
            self._closed = True
            waiting = [request for request, _ in self._jobs] if cancel else []
        for request in waiting:  # without the lock, because a callback may use the service
            request.future.cancel()
            request.is_cancelled()
        self._pool.shutdown()

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(cancel=exception[0] is not None)

    def _refuse_in_callback(self, called, instead):
        if getattr(self._here, "computes", False):
            raise RuntimeError(
                f"{called} is called in a callback of a Future, by the thread that computes images,"
                f" which would wait for itself{instead}"
            )

    def _load(self, weights):
        return Loaded(generator_of(weights, *self._wanted), self._cache)

    def _compute_some(self):
        """Computes the image that has waited longest, together with others of its kind."""
        self._here.computes = True
        jobs = self._next_jobs()
        if not jobs:
            return
        loaded = jobs[0][0].loaded
        try:
            images = loaded.compute([request.image(number) for request, number in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0][0].fail(error)
                return
            for job in jobs:  # a single one may have caused the error
                self._compute_alone(*job)
            return
        for (request, number), image in zip(jobs, images.split(1)):
            request.take(number, image)

    def _compute_alone(self, request, number):
        try:
            request.take(number, request.loaded.compute([request.image(number)]))
        except Exception as error:
            request.fail(error)

    def _next_jobs(self):
        """Takes up to `batch` jobs of one kind from the queue, including the first. Requests that
        were cancelled or have failed are dropped.
        """
        taken: list[tuple[Request, int]] = []
        left: list[tuple[Request, int]] = []
        with self._lock:
            while self._jobs and len(taken) < self.batch:
                request, _ = job = self._jobs.popleft()
                if taken and request.kind != taken[0][0].kind:
                    left.append(job)
                elif request.begins():
                    taken.append(job)
            self._jobs.extendleft(reversed(left))
        return taken


class Request:
    """The images that one call requests: a layout and a z (or None) for each, and the generator."""

    def __init__(self, layouts: list[SemanticLayout], z: list, loaded: "Loaded") -> None:
        self.layouts, self.z, self.loaded = layouts, z, loaded
        self.future: Future[torch.Tensor] = Future()
        self.kind = loaded, layouts[0].codes.shape[1:], layouts[0].palette.dtype
        self._images: list[torch.Tensor | None] = [None] * len(layouts)
        self._lock = threading.Lock()
        self._began: bool | None = None  # False if it was cancelled before

    def image(self, number: int) -> tuple:
        return self.layouts[number], self.z[number]

    def begins(self) -> bool:
        """Whether its images are still wanted. If so, it can no longer be cancelled. If it was,
        whoever waits for it among others learns it here.
        """
        with self._lock:
            if self._began is None:
                self._began = self.future.set_running_or_notify_cancel()
            return self._began and not self.future.done()

    def is_cancelled(self) -> bool:
        return self.future.cancelled() and not self.begins()

    def take(self, number: int, image: torch.Tensor) -> None:
        with self._lock:
            self._images[number] = image
            made = [one for one in self._images if one is not None]
        if len(made) == len(self._images):
            self.future.set_result(torch.cat(made))

    def fail(self, error: Exception) -> None:
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)


class Loaded:
    """A private generator, and the layouts and tables that are kept for it."""

    def __init__(self, generator: SPADEGenerator, cache: int) -> None:
        self.generator, self.cache = generator, cache
        self.tables = Tables(cache)
        # By content: the layout and its size in bytes, the most recently used last.
        self._layouts: OrderedDict[bytes, tuple[SemanticLayout, int]] = OrderedDict()
        self._held = 0  # bytes of the layouts
        self._lock = threading.RLock()
        weight = next(generator.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    @property
    def bytes(self) -> int:
        with self._lock:
            return self._held + self.tables.bytes

    def checked(self, layout: SemanticLayout, z: torch.Tensor | None) -> tuple[list, list]:
        """A private layout for each image, and a z or None. Errors: ValueError, TypeError."""
        if not isinstance(layout, SemanticLayout):
            raise TypeError(
                f"layout is a {type(layout).__name__}; it should be a SemanticLayout, such as"
                " SemanticLayout.from_labels(labels, num_classes)"
            )
        if not len(layout) or not layout.codes.numel():
            raise ValueError(f"layout is {layout}; it should have one image or more, with pixels")
        if z is not None:
            if not isinstance(z, torch.Tensor) or not z.is_floating_point():
                kind = z.dtype if isinstance(z, torch.Tensor) else type(z).__name__
                raise TypeError(f"z is {kind}; it should be a floating-point tensor or None")
            z = z.detach().to(self.device, self.dtype, copy=True)
        z = self.generator._checked(layout, z)
        copy = SemanticLayout(copied(layout.codes), copied(layout.palette))
        alone = [copy[number] for number in range(len(copy))] if len(copy) > 1 else [copy]
        alone = [self._known(one) for one in alone]
        if z is None:
            return alone, [None] * len(alone)
        return alone * (len(z) // len(alone)), list(z.split(1))

    def compute(self, images: list[tuple]) -> torch.Tensor:
        """The images [M, …] of layouts of one size, each with a z or None."""
        layouts = [layout for layout, _ in images]
        styles = [style for _, style in images if style is not None]
        z = torch.cat(styles) if styles else None
        if z is not None and len(set(map(id, layouts))) == 1:
            layouts = layouts[:1]  # samples of one layout
        together = layouts[0]
        tables: Tables | Beside = self.tables
        if len(layouts) > 1:
            together, tables = SemanticLayout.stack(layouts), Beside(self.tables, layouts)
        with torch.no_grad(), keep_in(tables, self.generator.modules()):
            made = self.generator(together, z)
        self._make_room()
        return made

    def retire(self) -> None:
        """Drops all layouts and tables, because these weights have been replaced."""
        self.cache = 0
        self._make_room()
        self.tables.clear()

    def _known(self, layout):
        """An earlier layout with the same content, or else this one, prepared."""
        content = content_of(layout)
        with self._lock:
            if content in self._layouts:
                self._layouts.move_to_end(content)
                return self._layouts[content][0]
        layout = layout.to(self.device).prepare(self.generator.sizes, self.generator.kernel_size)
        with self._lock:
            known, size = self._layouts.setdefault(content, (layout, layout.nbytes))
            self._held += size if known is layout else 0
            self._make_room()
        return known

    def _make_room(self):
        with self._lock:
            while self._layouts and self._held + self.tables.bytes > self.cache:
                # A layout's tables go with it.
                self._held -= self._layouts.popitem(last=False)[1][1]
            self.tables.limit(self.cache - self._held)


def generator_of(
    weights: str | os.PathLike | Mapping | SPADEGenerator,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SPADEGenerator:
    """A generator with these weights for inference: in eval mode, with spectral norm folded. It
    shares no memory with them. Errors: ValueError, TypeError, or those of `checkpoint.load`;
    FileNotFoundError if a folder is not that of a run, or the run has no weights yet.
    """
    if isinstance(weights, (str, os.PathLike)) and os.path.isdir(weights):
        from .training.run import Run  # a service of a file needs no training

        weights = Run(weights).weights()
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"dtype is {dtype!r}; it should be a floating-point dtype such as torch.float32"
        )
    if isinstance(weights, torch.nn.Module) and not isinstance(weights, SPADEGenerator):
        raise TypeError(f"weights is a {type(weights).__name__}; it should be a SPADEGenerator")
    state = weights.state_dict() if isinstance(weights, SPADEGenerator) else weights
    generator = checkpoint.load(state)
    if not isinstance(generator, SPADEGenerator):
        raise ValueError(
            f"weights are those of a {type(generator).__name__}; they should be a generator's"
        )
    if isinstance(weights, SPADEGenerator):
        like = next(weights.parameters())
        if like.dtype != next(generator.parameters()).dtype:
            generator.to(like.dtype).load_state_dict(weights.state_dict())
        device, dtype = device or like.device, dtype or like.dtype
    generator.to(device=device, dtype=dtype)
    if generator.conv_img.weight.is_cuda and generator.conv_img.weight.dim() == 4:
        # PyTorch's type hints do not allow memory_format alone.
        generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return generator.requires_grad_(False).fold_spectral_norm()


def copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def content_of(layout: SemanticLayout) -> bytes:
    """A hash of the codes and the palette of a layout on the CPU."""
    content = hashlib.blake2b(digest_size=32)
    for tensor in (layout.codes, layout.palette):
        content.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        content.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return content.digest()


def bytes_of(name: str, size: str | int) -> int:
    """The bytes of a number of bytes, or of text such as "256MB" (of 10⁶ bytes each) or "1GiB" (of
    2³⁰). Errors: ValueError if it is neither.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = None
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", size.lower())
    if found is None:
        raise ValueError(f'{name} is {size!r}; it should be bytes, or text such as "256MB"')
    number, prefix, binary = found.groups()
    return math.floor(float(number) * (1024 if binary else 1000) ** PREFIXES[prefix])
