"""The page on which one paints: what its server answers and refuses, and the page in a browser."""

import asyncio
import io
import shutil
import socket
import sys
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from spade_fast import SemanticLayout, Service, checkpoint
from spade_fast.cli import app as command
from spade_fast.nn import SPADEGenerator
from spade_fast.paint import Class, Classes, app_of, classes_of, read_classes
from spade_fast.paint.demo import photograph, train_demo
from spade_fast.paint.scene import draw_scene, opening_scene
from spade_fast.service import Busy
from spade_fast.training.pictures import picture

pytestmark = pytest.mark.needs("fastapi", "httpx", "uvicorn")
OURS = "http://127.0.0.1:7860"
STAGES = [("head", 16, 1), ("up_0", 8, 2), ("up_1", 4, 2), ("up_2", 1, 2)]
SMALL = dict(z_dim=4, ngf=1, nhidden=4, stages=STAGES)  # images of 64 × 64
NAMES = ("sky", "sea", "tree")


def classes_for(names=NAMES, **others):
    listed = [
        Class(number, name, (80 * number, 200, 40 * number)) for number, name in enumerate(names)
    ]
    return Classes(tuple(listed), len(names), **others)


@pytest.fixture(scope="module")
def service():
    torch.manual_seed(0)
    with Service(SPADEGenerator(4, **SMALL).eval()) as service:
        yield service


def client_of(app, base_url=OURS):
    from fastapi.testclient import TestClient

    return TestClient(app, base_url=base_url)


@pytest.fixture
def client(service):
    return client_of(app_of(service, classes_for(has_edges=True)))


def drawn(kind=np.uint8, count=3):
    return np.random.default_rng(1).integers(0, count, (8, 8), kind).repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize("kind", [np.uint8, "<u2"])
def test_the_image_is_the_generators(client, service, kind):
    labels = drawn()
    answer = client.post("/image?seed=5", content=labels.astype(kind).tobytes())
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert answer.headers["server-timing"].startswith("image;dur=")
    layout = SemanticLayout.from_labels(labels[None].astype(int), 3, labels[None].astype(int))
    z = torch.randn(1, 4, generator=torch.Generator().manual_seed(5))
    wanted = picture(service.generate(layout, z)[0])
    assert (np.asarray(Image.open(io.BytesIO(answer.content))) == wanted).all()
    assert client.post("/image?seed=6", content=labels.tobytes()).content != answer.content


@pytest.mark.parametrize(
    "path, content, words",
    [
        ("/image", b"\0" * 4095 + b"\x09", "has a 9 in 1 pixels"),
        ("/image", b"\0" * 4095, "has 4095 bytes, it should have 64 × 64"),
        ("/image", b"", "has 0 bytes"),
        ("/image?seed=-1", b"\0" * 4096, "seed is -1, it should be 0 to"),
        ("/image?seed=x", b"\0" * 4096, "valid integer"),
    ],
)
def test_what_is_wrong_is_said(client, path, content, words):
    answer = client.post(path, content=content)
    assert answer.status_code == 422 and words in answer.text
    assert client.post("/image", content=bytes(4096)).status_code == 200


def test_who_does_not_belong_is_refused(client):
    for host in ("evil.example", "evil.example:7860", "127.0.0.1:7861", "127.0.0.1", "[::1]", ""):
        answer = client.get("/", headers={"Host": host})
        assert answer.status_code == 403 and "Host is" in answer.json()["detail"], host
    for host in ("localhost:7860", "[::1]:7860", "LOCALHOST:7860"):
        assert client.get("/", headers={"Host": host}).status_code == 200, host
    for origin in (
        "http://evil.example",
        "null",
        "https://127.0.0.1:7860",
        "http://localhost:7860",
    ):
        answer = client.post("/image", content=bytes(4096), headers={"Origin": origin})
        assert answer.status_code == 403 and "Origin is" in answer.json()["detail"], origin
    assert client.post("/image", content=bytes(4096), headers={"Origin": OURS}).status_code == 200


def test_addresses_are_let_in_where_all_of_them_are_listened_at(service):
    app = app_of(service, classes_for(has_edges=True), "0.0.0.0", 80)
    client = client_of(app, "http://192.168.1.5")
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403


def request_by_hand(app, headers):
    """The status of a POST whose body nobody may read."""

    async def receive():
        raise AssertionError("the body was read")

    sent = []

    async def send(message):
        sent.append(message)

    pairs = [(name.encode(), text.encode()) for name, text in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/image", "headers": pairs}
    asyncio.run(app(scope | {"query_string": b"", "raw_path": b"/image"}, receive, send))
    return sent[0]["status"]


def test_a_large_body_is_refused_without_reading_it(client):
    ours = {"host": "127.0.0.1:7860"}
    assert request_by_hand(client.app, ours | {"content-length": "100000000"}) == 413
    assert request_by_hand(client.app, ours | {"content-length": "9" * 5000}) == 413
    assert request_by_hand(client.app, ours | {"content-length": "-1"}) == 411
    assert request_by_hand(client.app, ours | {"transfer-encoding": "chunked"}) == 411


class Failing:
    """A service that answers each request with an error of its own."""

    def __init__(self, service, error):
        self.generator_arguments, self.image_size = service.generator_arguments, service.image_size
        self.error = error

    def submit(self, layout, z):
        future = Future()
        future.set_exception(self.error)
        return future


@pytest.mark.parametrize(
    "error, status",
    [(Busy("9 images wait"), 503), (RuntimeError("no memory"), 500), (MemoryError("none"), 500)],
)
def test_an_image_that_is_not_made(service, error, status):
    app = app_of(Failing(service, error), classes_for(has_edges=True))
    answer = client_of(app).post("/image", content=bytes(4096))
    assert answer.status_code == status and str(error) in answer.json()["detail"]
    assert (answer.headers.get("retry-after") == "1") == (status == 503)


def test_the_page_loads_nothing_from_elsewhere(client):
    for path in ("/", "/page.css", "/page.js", "/png.js", "/icon.svg"):
        answer = client.get(path)
        assert answer.status_code == 200 and "default-src 'self'" in str(answer.headers)
        assert "//" not in answer.text.replace("// ", "").replace("http://www.w3.org/2000/svg", "")
    for path in ("/../pyproject.toml", "/%2e%2e/server.py", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 404


def test_settings_and_scene(client):
    settings = client.get("/settings").json()
    assert (settings["height"], settings["width"], settings["hasZ"]) == (64, 64, True)
    assert [one["name"] for one in settings["classes"]] == list(NAMES)
    scene = client.get("/scene").content
    assert client.post("/image", content=scene).status_code == 200


def test_classes_of_the_published_generators():
    coco, ade, streets = (classes_of(number) for number in (184, 151, 36))
    names = {one.number: one.name for one in coco.listed}
    assert (names[0], names[95], names[168], names[181]) == (
        "person",
        "building-other",
        "tree",
        "wood",
    )
    assert (len(names), names[255], coco.background, coco.has_edges) == (
        183,
        "don't care",
        255,
        True,
    )
    assert [one.number for one in ade.listed] == [*range(1, 151), 0] and ade.background == 0
    assert {one.number: one.name for one in streets.listed}[23] == "sky"
    scene = opening_scene(coco, (32, 48))
    assert scene.shape == (32, 48) and scene[0, 0] == 156 and set(scene.flat) <= set(names)
    assert opening_scene(classes_of(2), (16, 16)).max() == 1


def test_classes_of_a_file(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("# names\n0 night sky\n2 tower 3 1 2 3\n")
    assert read_classes(file) == [(0, "night sky", None), (2, "tower 3", (1, 2, 3))]
    found = classes_of(3, file).listed
    assert [one.name for one in found] == ["night sky", "class 1", "tower 3"]
    for text in ("sky\n", "0\n", "0 sky 1 2 999\n", "7 sky\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"classes\.txt"):
            classes_of(3, file)


def test_a_generator_that_cannot_be_painted(service):
    with pytest.raises(ValueError, match="classes have 3 channels.* the generator's 4"):
        app_of(service, classes_for())
    with Service(SPADEGenerator(3, output_nc=1, **SMALL).eval()) as grey:
        with pytest.raises(ValueError, match="1 channels in 2 dimensions"):
            app_of(grey, classes_for())


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "text.pth").write_text("no weights")
    classes = tmp_path / "classes.txt"
    classes.write_text("0 sky")
    for arguments, words in (
        (["--classes", str(classes)], "classes is given without weights"),
        ([str(tmp_path / "text.pth")], "text.pth"),
        ([str(tmp_path / "none.pth")], "none.pth"),
    ):
        result = CliRunner().invoke(command, ["paint", *arguments])
        assert result.exit_code == 2 and words in result.output
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for weights in (tmp_path / "weights.pth", tmp_path / "generator.safetensors"):
        checkpoint.write(SPADEGenerator(3, **SMALL), weights)
    for weights in (tmp_path / "weights.pth", tmp_path):  # a file, or a run's folder
        result = CliRunner().invoke(command, ["paint", str(weights)])
        assert result.exit_code == 2 and "pip install 'spade_fast[paint]'" in result.output


def test_the_small_generator_learns():
    generator = train_demo(size=64, steps=30)
    scene = draw_scene((64, 64), 1000)
    wanted = photograph(scene, 1000).astype(float)
    with torch.no_grad():
        made = picture(generator(SemanticLayout.from_labels(scene[None], 8))[0])
    # Nearer than the best picture that knows nothing of the labels.
    assert abs(made - wanted).mean() < 0.8 * abs(wanted - wanted.mean((0, 1))).mean()


@pytest.fixture
def address(service):
    """The address of a server in a thread."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = app_of(service, classes_for(has_edges=True), port=port)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_a_body_that_never_comes_holds_nobody_up(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"POST /image HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 100000000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def map_of(page):
    """The pixels of the map, as the browser shows them."""
    return page.evaluate(
        "() => { const map = document.getElementById('map');"
        " return [...map.getContext('2d').getImageData(0, 0, map.width, map.height).data] }"
    )


def image_of(page):
    """The newest image's bytes, when it is that of the map."""
    page.wait_for_selector("#result[aria-busy=false]")
    return page.evaluate(
        "async () => [...new Uint8Array(await (await fetch("
        "document.getElementById('image').src)).arrayBuffer())]"
    )


def draw_stroke(page, start, end):
    box = page.locator("#map").bounding_box()
    x, y = (
        [box[side] + box[length] * part for part in (start[i], end[i])]
        for i, (side, length) in enumerate((("x", "width"), ("y", "height")))
    )
    page.mouse.move(x[0], y[0])
    page.mouse.down()
    page.mouse.move(x[1], y[1], steps=4)
    page.mouse.up()


@pytest.mark.needs("playwright")
def test_the_page_in_a_browser(address, tmp_path):
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        page, other = context.new_page(), context.new_page()
        errors, requests = [], []
        page.on("console", lambda one: one.type == "error" and errors.append(one.text))
        page.on("pageerror", lambda one: errors.append(str(one)))
        page.on("request", lambda one: one.method == "POST" and requests.append(one))
        page.goto(address)
        other.goto(address)
        page.bring_to_front()
        page.get_by_text("Got it").click()

        map_before, image_before = map_of(page), image_of(page)
        page.get_by_role("button", name="sea", exact=True).click()
        draw_stroke(page, (0.2, 0.2), (0.7, 0.3))
        image_after, map_after = image_of(page), map_of(page)
        assert map_after != map_before and image_after != image_before
        page.keyboard.press("Control+z")
        assert image_of(page) == image_before and map_of(page) == map_before
        page.keyboard.press("Control+Shift+z")
        assert image_of(page) == image_after and map_of(page) == map_after
        assert image_of(other) == image_before and map_of(other) == map_before  # a tab has its own

        labels = drawn(count=3)
        file = tmp_path / "labels.png"
        Image.fromarray(labels).save(file)
        page.set_input_files("#file", file)
        while map_of(page) == map_after:
            page.wait_for_timeout(20)
        with page.expect_download() as download:
            page.get_by_text("Save map").click()
        assert (np.asarray(Image.open(download.value.path())) == labels).all()
        text = tmp_path / "text.png"
        text.write_text("this is no image")
        page.set_input_files("#file", text)
        page.get_by_text("text.png was not opened: it is no PNG").wait_for()

        requests.clear()
        for number in range(50):
            draw_stroke(page, (0.1, number / 50), (0.9, 1 - number / 50))
        last = image_of(page)
        sent = len(requests)
        page.wait_for_timeout(200)
        assert 0 < sent <= 50 * 6 and len(requests) == sent  # none waits behind the last one
        map_last = map_of(page)
        page.reload()
        assert image_of(page) == last and map_of(page) == map_last
        assert not errors
        browser.close()
