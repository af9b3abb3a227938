"""The server behind the page: label maps in, images out.

It lets in nobody who does not belong. A page of another site that a browser has open can send
requests to 127.0.0.1, also under a name of its own that it has point there; so every request must
name this server as its Host, and where it has an Origin, that must be this server's.
"""

import asyncio
import contextlib
import importlib.resources
import io
import ipaddress
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..data import Preparation
from ..service import Busy, Service
from ..training.pictures import picture
from .classes import HIGHEST, Classes
from .scene import opening_scene

if TYPE_CHECKING:
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
MOST_PIXELS = 2**22  # of an image: its labels are sent whole, for every stroke
HIGHEST_SEED = 2**32 - 1
ALL_ADDRESSES = ("0.0.0.0", "::")
RETRY_SECONDS = 1


def app_of(
    service: Service, classes: Classes, host: str = "127.0.0.1", port: int = 7860
) -> "FastAPI":
    """The application: the page, `GET /settings`, `GET /scene` and `POST /image?seed=…`.

    `/image` takes labels as numbers of 1 byte, or of 2 bytes, the lower first, row by row, and
    returns a PNG; its header Server-Timing has the milliseconds from the request's labels to the
    image ("image": waiting, numbering and the network) and those of the PNG ("png"). `seed` decides
    z of a generator that begins with noise. An error is JSON, {"detail": words}.

    Args:
        service: of a generator of RGB images.
        classes: what the labels mean.
        host, port: where the application will be reached: requests for other hosts are refused.

    Errors: ValueError where the generator makes no RGB images, has other channels than these
        classes, or makes images that are too large; ModuleNotFoundError where FastAPI is missing.
    """
    fastapi = _module("fastapi")
    from starlette.concurrency import run_in_threadpool

    _check(service, classes)
    height, width = service.image_size
    painter = _Painter(service, classes)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Doorman, host=host, port=port, most_bytes=2 * height * width)

    for path, (name, kind) in PAGE.items():
        content = importlib.resources.files(__package__).joinpath(name).read_bytes()
        answer = _always(fastapi.Response, content, kind)
        app.add_api_route(path, answer, methods=["GET"])

    @app.get("/settings")
    async def settings():
        return painter.settings()

    @app.get("/scene")
    async def scene():
        labels = opening_scene(classes, (height, width)).astype("<u2")
        return fastapi.Response(labels.tobytes(), media_type="application/octet-stream")

    @app.post("/image")
    async def image(request: fastapi.Request, seed: int | None = None):
        body = await request.body()
        start = time.perf_counter()
        try:
            future = await run_in_threadpool(painter.submit, body, seed)
            made = await asyncio.wrap_future(future)
        except (ValueError, TypeError) as error:
            raise fastapi.HTTPException(422, str(error)) from None
        except Busy as busy:
            again = {"Retry-After": str(RETRY_SECONDS)}
            raise fastapi.HTTPException(503, str(busy), again) from None
        except (RuntimeError, MemoryError) as error:  # of the network, such as for lack of memory
            raise fastapi.HTTPException(500, f"no image was made: {error}") from None
        if not made.isfinite().all():
            raise fastapi.HTTPException(500, "the image has values that are not finite")
        done = time.perf_counter()
        content = await run_in_threadpool(_png, made[0])
        spent = {"image": done - start, "png": time.perf_counter() - done}
        timing = ", ".join(f"{name};dur={1e3 * seconds:.2f}" for name, seconds in spent.items())
        return fastapi.Response(content, 200, {"Server-Timing": timing}, "image/png")

    return app


def serve(service: Service, classes: Classes, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Runs `app_of` until it is interrupted. Errors: as `app_of`; ModuleNotFoundError where uvicorn
    is missing.
    """
    uvicorn = _module("uvicorn")
    app = app_of(service, classes, host, port)
    uvicorn.run(app, host=host, port=port, log_level="warning", server_header=False)


class _Painter:
    """From the numbers of a request to an image that the service computes."""

    def __init__(self, service: Service, classes: Classes) -> None:
        self.service, self.classes = service, classes
        self.size, self.z_dim = service.image_size, service.generator_arguments["z_dim"]
        self.preparation = Preparation(
            classes.num_classes,
            classes.dont_care,
            mode="fixed",
            crop_size=self.size[1],
            aspect_ratio=self.size[1] / self.size[0],
            label_shift=classes.label_shift,
        )

    def settings(self) -> dict:
        """What the page is told."""
        return {
            "height": self.size[0],
            "width": self.size[1],
            "classes": [vars(one) for one in self.classes.listed],
            "background": self.classes.background,
            "hasZ": self.z_dim is not None,
            "hasEdges": self.classes.has_edges,
            "highestSeed": HIGHEST_SEED,
        }

    def submit(self, body: bytes, seed: int | None):
        """A Future of the image. Errors: ValueError; Busy."""
        labels = self.labels(body)
        # Neighbours of one class are one instance: edges are where the classes' regions end.
        instances = labels if self.classes.has_edges else None
        return self.service.submit(self.preparation.layout(labels, instances), self.z(seed))

    def labels(self, body: bytes) -> np.ndarray:
        height, width = self.size
        width_of_number, rest = divmod(len(body), height * width)
        if rest or width_of_number not in (1, 2):
            raise ValueError(
                f"labels has {len(body)} bytes, it should have {height} × {width} numbers of 1 or 2"
                " bytes"
            )
        kind = "u1" if width_of_number == 1 else "<u2"
        return np.frombuffer(body, kind).reshape(self.size).astype(np.int64)

    def z(self, seed: int | None) -> torch.Tensor | None:
        if self.z_dim is None:
            if seed is not None:
                raise ValueError("seed should not be given: this generator takes no z")
            return None
        seed = 0 if seed is None else seed
        if not 0 <= seed <= HIGHEST_SEED:
            raise ValueError(f"seed is {seed}, it should be 0 to {HIGHEST_SEED}")
        return torch.randn(1, self.z_dim, generator=torch.Generator().manual_seed(seed))


class _Doorman:
    """Middleware that answers a request that does not belong here without reading its body, and
    gives every answer the headers that bind a browser.
    """

    def __init__(self, app, host, port, most_bytes):
        self.app, self.port, self.most_bytes = app, port, most_bytes
        self.names = {"127.0.0.1", "localhost", "[::1]", _in_url(host.lower())}
        self.takes_addresses = host in ALL_ADDRESSES

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a WebSocket is closed thereby

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
        # What comes of the body after this is nobody's.
        answer = JSONResponse({"detail": words}, status, {"Connection": "close"})
        await answer(scope, receive, send_bound)

    def _refusal(self, scope):
        """Status and words for a request that is refused, else None."""
        headers: dict[str, list[str]] = {}
        for name, text in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), []).append(text.decode("latin-1"))
        hosts, origins = headers.get("host", []), headers.get("origin", [])
        if len(hosts) != 1 or not self._is_own(hosts[0].lower()):
            return 403, (
                f"Host is {_words(hosts)}, it should be localhost:{self.port} or what --host says:"
                " the page is for this machine"
            )
        if origins and [origin.lower() for origin in origins] != ["http://" + hosts[0].lower()]:
            return 403, (
                f"Origin is {_words(origins)}, it should be http://{hosts[0]}: other sites may not"
                " ask this server"
            )
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        lengths = headers.get("content-length", [])
        if len(lengths) != 1 or not (lengths[0].isascii() and lengths[0].isdecimal()):
            return 411, "Content-Length is missing: it should be the number of the labels' bytes"
        if len(lengths[0]) > 12 or int(lengths[0]) > self.most_bytes:
            return 413, (
                f"the body has {lengths[0][:20]} bytes, it should have {self.most_bytes} or fewer"
            )
        return None

    def _is_own(self, host):
        name, colon, port = host.rpartition(":")
        if not colon or port.endswith("]"):  # no port: that of http
            name, port = host, "80"
        if port != str(self.port):
            return False
        # A name can be made to point here by whoever owns it, an address cannot.
        return name in self.names or self.takes_addresses and _is_address(name)


def _check(service, classes):
    arguments = service.generator_arguments
    if (arguments["spatial_dims"], arguments["output_nc"]) != (2, 3):
        raise ValueError(
            f"the generator makes {arguments['output_nc']} channels in"
            f" {arguments['spatial_dims']} dimensions, they should be 3 in 2 to be painted"
        )
    channels = classes.num_classes + (classes.dont_care is not None) + classes.has_edges
    if channels != arguments["label_nc"]:
        raise ValueError(
            f"classes have {channels} channels, don't care and edges among them; they should be"
            f" the generator's {arguments['label_nc']}"
        )
    numbers = [one.number for one in classes.listed]
    if min(numbers) < 0 or max(numbers) > HIGHEST:
        raise ValueError(
            f"classes have numbers from {min(numbers)} to {max(numbers)}, they should be 0 to"
            f" {HIGHEST}"
        )
    height, width = service.image_size
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"the generator's images are {height} × {width}, they should have {MOST_PIXELS} pixels"
            " or fewer to be painted"
        )


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


def _module(name):
    """A module of the extra `paint`. Errors: ModuleNotFoundError in words."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(
            f"painting needs {name}: pip install 'spade_fast[paint]'", name=name
        ) from None
