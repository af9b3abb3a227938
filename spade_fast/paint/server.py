"""The server behind the page: label maps in, images out.

It refuses strangers. A page of another site that is open in the browser can send requests to
127.0.0.1, also under a name of its own that points there. Therefore every request must name this
server as its Host, and its Origin, if it has one, must be this server's.
"""

import asyncio
import base64
import contextlib
import importlib.resources
import io
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..data import Preparation, read_photograph
from ..generation import encoder_of, moments_of
from ..nn import ConvEncoder
from ..optional import needed
from ..service import Busy, Service
from ..training.pictures import picture
from .classes import HIGHEST, Classes
from .scene import opening_scene

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/png.js": ("png.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:;"
    " connect-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MOST_PIXELS = 2**22  # of an image: each stroke sends all of its labels
MOST_PHOTOGRAPH_BYTES, MOST_PHOTOGRAPH_PIXELS = 2**25, 2**26
HIGHEST_SEED = 2**32 - 1
ALL_ADDRESSES = ("0.0.0.0", "::")
RETRY_SECONDS = 1


def app_of(
    service: Service,
    classes: Classes,
    host: str = "127.0.0.1",
    port: int = 7860,
    encoder: str | os.PathLike | Mapping | ConvEncoder | None = None,
) -> "FastAPI":
    """The web application: the page, `GET /settings`, `GET /scene`, `POST /image?seed=…` or `?z=…`,
    and with an encoder `POST /style`.

    `/image` takes the labels row by row, as numbers of 1 byte or of 2 bytes (the lower byte first),
    and returns a PNG. The header Server-Timing has the milliseconds from the request's labels to
    the image ("image": waiting, numbering and the network) and those of writing the PNG ("png").
    For a generator that begins with z, either `seed` is the seed of z, or `z` is z itself, as text.
    `/style` takes the file of a photograph and returns the mean of its style as JSON, {"z": text}.
    An error is JSON, {"detail": words}.

    Args:
        service: a service of a generator of RGB images.
        classes: the meaning of the labels.
        host, port: the address of the application. Requests for other hosts are refused.
        encoder: an encoder of photographs, or its weights, as `checkpoint.load` takes them.

    Errors: ValueError if the generator does not make RGB images, has other channels than these
        classes, makes images that are too large, or has another length of z than the encoder;
        ModuleNotFoundError if FastAPI is missing.
    """
    fastapi = _module("fastapi")
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect

    _check(service, classes)
    height, width = service.image_size
    painter = _Painter(service, classes, encoder)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    most_bytes = {"/image": 2 * height * width, "/style": MOST_PHOTOGRAPH_BYTES}
    app.add_middleware(_Doorman, host=host, port=port, most_bytes=most_bytes)

    for path, (name, kind) in PAGE.items():
        content = importlib.resources.files(__package__).joinpath(name).read_bytes()
        answer = _always(fastapi.Response, content, kind)
        app.add_api_route(path, answer, methods=["GET"])

    @app.exception_handler(ClientDisconnect)
    async def nobody_waits(request, error):
        return fastapi.Response(status_code=400)  # its body did not arrive, and nobody reads this

    @app.get("/settings")
    async def settings():
        return painter.settings()

    @app.get("/scene")
    async def scene():
        labels = opening_scene(classes, (height, width)).astype("<u2")
        return fastapi.Response(labels.tobytes(), media_type="application/octet-stream")

    @contextlib.contextmanager
    def errors_in_words(result):
        try:
            yield
        except (ValueError, TypeError) as error:
            raise fastapi.HTTPException(422, str(error)) from None
        except Busy as busy:
            again = {"Retry-After": str(RETRY_SECONDS)}
            raise fastapi.HTTPException(503, str(busy), again) from None
        except (RuntimeError, MemoryError) as error:  # of the network, for lack of memory perhaps
            raise fastapi.HTTPException(500, f"no {result} was made: {error}") from None

    @app.post("/image")
    async def image(
        request: fastapi.Request,  # type: ignore[name-defined]  # it is imported above
        seed: str | None = None,
        z: str | None = None,
    ):
        body = await request.body()
        start = time.perf_counter()
        with errors_in_words("image"):
            future = await run_in_threadpool(painter.submit, body, seed, z)
            made = await asyncio.wrap_future(future)
        if not made.isfinite().all():
            raise fastapi.HTTPException(500, "the image has values that are not finite")
        done = time.perf_counter()
        content = await run_in_threadpool(_png, made[0])
        spent = {"image": done - start, "png": time.perf_counter() - done}
        timing = ", ".join(f"{name};dur={1e3 * seconds:.2f}" for name, seconds in spent.items())
        return fastapi.Response(content, 200, {"Server-Timing": timing}, "image/png")

    if painter.encoder is not None:
        encoding = asyncio.Lock()

        @app.post("/style")
        async def style(
            request: fastapi.Request,  # type: ignore[name-defined]  # it is imported above
        ):
            body = await request.body()
            with errors_in_words("style"):
                if encoding.locked():
                    raise Busy("another photograph is being encoded: ask again later")
                async with encoding:
                    return {"z": await run_in_threadpool(painter.style, body)}

    return app


def listening(host: str = "127.0.0.1", port: int = 7860) -> socket.socket:
    """A socket that listens at this address. From now on, callers wait for `serve` to answer.
    Errors: OSError in words if the port is taken, or if host is not an address of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise OSError(
            f"cannot listen at {host}, port {port}: {reason}. host should be an address of this"
            " machine, and port one that no other program uses"
        ) from None


def serve(
    service: Service,
    classes: Classes,
    door: socket.socket,
    host: str = "127.0.0.1",
    encoder: str | os.PathLike | Mapping | ConvEncoder | None = None,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Runs `app_of` at a listening socket until it is interrupted, and then closes the socket.

    ready: a function that is called with the page's address when the server is about to answer.

    Errors: as `app_of`; ModuleNotFoundError if uvicorn is missing.
    """
    port = door.getsockname()[1]
    server = server_of(app_of(service, classes, host, port, encoder))
    ready(f"http://{_in_url(host)}:{port}/")
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[door])


def server_of(app: "FastAPI") -> "uvicorn.Server":
    """A server whose `run(sockets=[door])` answers at listening sockets until its `should_exit` is
    set. Errors: ModuleNotFoundError if uvicorn is missing.
    """
    uvicorn = _module("uvicorn")
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))


class _Painter:
    """Turns the numbers of a request into an image, which the service computes, and a photograph
    into a style.
    """

    def __init__(self, service: Service, classes: Classes, encoder=None) -> None:
        self.service, self.classes = service, classes
        height, width = service.image_size
        self.size, self.z_dim = (height, width), service.generator_arguments["z_dim"]
        self.encoder = None if encoder is None else encoder_of(encoder, self.z_dim)
        self.preparation = Preparation(
            classes.num_classes,
            classes.dont_care,
            mode="fixed",
            crop_size=self.size[1],
            aspect_ratio=self.size[1] / self.size[0],
            label_shift=classes.label_shift,
        )

    def settings(self) -> dict:
        """The settings of the page."""
        return {
            "height": self.size[0],
            "width": self.size[1],
            "classes": [vars(one) for one in self.classes.listed],
            "background": self.classes.background,
            "zLength": self.z_dim,
            "hasEdges": self.classes.has_edges,
            "highestSeed": HIGHEST_SEED,
            "mostPhotographBytes": None if self.encoder is None else MOST_PHOTOGRAPH_BYTES,
        }

    def submit(self, body: bytes, seed: str | None, z: str | None):
        """A Future of the image. Errors: ValueError; Busy."""
        labels = self.labels(body)
        # Neighbours of one class are one instance, so edges are the borders between classes.
        instances = labels if self.classes.has_edges else None
        return self.service.submit(self.preparation.layout(labels, instances), self.z(seed, z))

    def labels(self, body: bytes) -> np.ndarray:
        height, width = self.size
        width_of_number, rest = divmod(len(body), height * width)
        if rest or width_of_number not in (1, 2):
            raise ValueError(
                f"labels has {len(body)} bytes; it should have {height} × {width} numbers of 1 or 2"
                " bytes each"
            )
        kind = "u1" if width_of_number == 1 else "<u2"
        return np.frombuffer(body, kind).reshape(self.size).astype(np.int64)

    def z(self, seed: str | None, z: str | None) -> torch.Tensor | None:
        given = {name: value for name, value in (("seed", seed), ("z", z)) if value is not None}
        if self.z_dim is None:
            if given:
                raise ValueError(f"{next(iter(given))} is given, and this generator takes no z")
            return None
        if len(given) > 1:
            raise ValueError("seed and z are given, only one of them should be")
        if z is not None:
            return _z_of(z, self.z_dim)
        random = torch.Generator().manual_seed(_seed_of("0" if seed is None else seed))
        return torch.randn(1, self.z_dim, generator=random)

    def style(self, content: bytes) -> str:
        """The mean z of a photograph's file, as text; the photograph is turned upright. Errors:
        ValueError.
        """
        assert self.encoder is not None
        photograph = read_photograph(
            "the photograph", content, MOST_PHOTOGRAPH_PIXELS, upright=True
        )
        mean, _ = moments_of(self.encoder, photograph, self.size)
        return _text_of(mean)


class _Doorman:
    """Middleware that refuses requests from elsewhere without reading their bodies, and adds the
    security headers to every answer.
    """

    def __init__(self, app, host, port, most_bytes):
        self.app, self.port, self.most_bytes = app, port, most_bytes
        self.names = {"127.0.0.1", "localhost", "[::1]", _in_url(host.lower())}
        self.takes_addresses = host in ALL_ADDRESSES

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # which closes a WebSocket

        async def send_bound(message):
            if message["type"] == "http.response.start":
                pairs = [(name.lower().encode(), text.encode()) for name, text in HEADERS.items()]
                message = message | {"headers": [*message["headers"], *pairs]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            return await self.app(scope, receive, send_bound)
        from starlette.responses import JSONResponse

        status, words = refusal
        # The body is not read, so the connection cannot be used again.
        answer = JSONResponse({"detail": words}, status, {"Connection": "close"})
        await answer(scope, receive, send_bound)

    def _refusal(self, scope):
        """The status and the message if a request is refused, else None."""
        headers: dict[str, list[str]] = {}
        for name, text in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), []).append(text.decode("latin-1"))
        hosts, origins = headers.get("host", []), headers.get("origin", [])
        if len(hosts) != 1 or not self._is_own(hosts[0].lower()):
            return 403, (
                f"Host is {_words(hosts)}; it should be localhost:{self.port} or that of --host:"
                " the page is for this machine"
            )
        if origins and [origin.lower() for origin in origins] != ["http://" + hosts[0].lower()]:
            return 403, (
                f"Origin is {_words(origins)}; it should be http://{hosts[0]}: other sites may not"
                " use this server"
            )
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        lengths = headers.get("content-length", [])
        if len(lengths) != 1 or not (lengths[0].isascii() and lengths[0].isdecimal()):
            return 411, "Content-Length is missing: it should be the number of the body's bytes"
        most = self.most_bytes.get(scope["path"], 0)
        if len(lengths[0]) > 12 or int(lengths[0]) > most:
            return 413, f"the body has {lengths[0][:20]} bytes; it should have {most} or fewer"
        return None

    def _is_own(self, host):
        name, colon, port = host.rpartition(":")
        if not colon or port.endswith("]"):  # http's port is left out
            name, port = host, "80"
        if port != str(self.port):
            return False
        # The owner of a name can make it point here, but nobody can redirect an address.
        return name in self.names or (self.takes_addresses and _is_address(name))


def _check(service, classes):
    arguments = service.generator_arguments
    if (arguments["spatial_dims"], arguments["output_nc"]) != (2, 3):
        raise ValueError(
            f"the generator makes {arguments['output_nc']} channels in"
            f" {arguments['spatial_dims']} dimensions; it should make 3 in 2 to be painted"
        )
    channels = classes.num_classes + (classes.dont_care is not None) + classes.has_edges
    if channels != arguments["label_nc"]:
        raise ValueError(
            f"classes have {channels} channels, including don't care and edges; they should have"
            f" the generator's {arguments['label_nc']}"
        )
    numbers = [one.number for one in classes.listed]
    if min(numbers) < 0 or max(numbers) > HIGHEST:
        raise ValueError(
            f"classes have numbers from {min(numbers)} to {max(numbers)}; they should be 0 to"
            f" {HIGHEST}"
        )
    height, width = service.image_size
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"the generator's images are {height} × {width}; they should have {MOST_PIXELS} pixels"
            " or fewer to be painted"
        )


def _text_of(z):
    """z [z_dim] as text for a URL: base64 of its float32 values, low bytes first."""
    return base64.urlsafe_b64encode(z.float().cpu().numpy().astype("<f4").tobytes()).decode()


def _seed_of(text: str) -> int:
    """Errors: ValueError unless the text is a whole number, 0 to HIGHEST_SEED."""
    try:
        seed = int(text)
    except ValueError:  # it may have more digits than Python reads, too
        seed = -1
    if not 0 <= seed <= HIGHEST_SEED:
        raise ValueError(f"seed is {text[:20]!r}; it should be a whole number, 0 to {HIGHEST_SEED}")
    return seed


def _z_of(text, length):
    """z [1, length] from such a text. Errors: ValueError."""
    wanted = f"it should be {length} finite float32 numbers in base64, as /style returns them"
    try:
        content = base64.b64decode(text, altchars=b"-_", validate=True)
        z = torch.from_numpy(np.frombuffer(content, "<f4").astype(np.float32))
    except ValueError as error:
        raise ValueError(f"z cannot be decoded: {error}; {wanted}") from None
    if len(z) != length or not z.isfinite().all():
        raise ValueError(f"z has {len(z)} numbers, {z.isfinite().sum()} of them finite; {wanted}")
    return z[None]


def _png(image):
    file = io.BytesIO()
    Image.fromarray(picture(image.float().cpu())).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _always(response, content, kind):
    async def answer():
        return response(content, media_type=kind)

    return answer


def _in_url(host):
    return f"[{host}]" if ":" in host else host


def _is_address(name):
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name.strip("[]")))
    return False


def _words(found):
    return ", ".join(map(repr, found)) or "missing"


def check_installed() -> None:
    """Checks that the packages for serving are installed. Errors: ModuleNotFoundError in words."""
    for name in ("fastapi", "uvicorn"):
        _module(name)


def _module(name):
    return needed(name, "painting", "'spade_fast[paint]'")
