"""The painting page: its server's answers and refusals, and the page in a browser."""

import asyncio
import base64
import contextlib
import importlib
import io
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import require
from drawn_data import on_its_side
from PIL import Image
from typer.testing import CliRunner

import spade_fast.paint
from spade_fast import ConvEncoder, SemanticLayout, Service, checkpoint
from spade_fast.cli import app as command
from spade_fast.generation import moments_of
from spade_fast.nn import SPADEGenerator
from spade_fast.paint import (
    Class,
    Classes,
    app_of,
    classes_of,
    listening,
    read_classes,
    server,
    server_of,
)
from spade_fast.paint.demo import photograph, train_demo
from spade_fast.paint.scene import draw_scene, opening_scene
from spade_fast.service import Busy
from spade_fast.training import Config
from spade_fast.training.pictures import picture
from spade_fast.training.run import Run

pytestmark = pytest.mark.needs("fastapi", "httpx", "uvicorn")
OURS = "http://127.0.0.1:7860"
STAGES = [("head", 16, 1), ("up_0", 8, 2), ("up_1", 4, 2), ("up_2", 1, 2)]
SMALL = dict(z_dim=4, ngf=1, nhidden=4, stages=STAGES)  # images of 64 × 64 pixels
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


def post(*arguments, **options):
    import httpx

    return httpx.post(*arguments, **options)


def client_of(app, base_url=OURS):
    from fastapi.testclient import TestClient

    return TestClient(app, base_url=base_url)


@pytest.fixture
def client(service):
    return client_of(app_of(service, classes_for(has_edges=True)))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(1)
    return ConvEncoder(1, 4).eval()


@pytest.fixture
def client_with_styles(service, encoder):
    app = app_of(service, classes_for(has_edges=True), encoder=encoder)
    return client_of(app)


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


def image_file(pixels, kind="PNG", **settings):
    """An image file in memory."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def a_photograph(size=(40, 60)):
    return photograph(draw_scene(size, 3), 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_style_of_a_photograph(client_with_styles, service, encoder, kind):
    content, labels = image_file(a_photograph(), kind), drawn()
    answer = client_with_styles.post("/style", content=content)
    assert answer.status_code == 200
    mean, _ = moments_of(encoder, Image.open(io.BytesIO(content)).convert("RGB"), (64, 64))
    layout = SemanticLayout.from_labels(labels[None].astype(int), 3, labels[None].astype(int))
    wanted = picture(service.generate(layout, mean[None])[0])
    image = client_with_styles.post("/image", params=answer.json(), content=labels.tobytes())
    assert (np.asarray(Image.open(io.BytesIO(image.content))) == wanted).all()


def test_a_photograph_is_turned_upright_for_its_style(client_with_styles):
    upright = a_photograph()
    lying, exif = on_its_side(upright)
    z, same, other = (
        client_with_styles.post("/style", content=content).json()["z"]
        for content in (image_file(upright), image_file(lying, exif=exif), image_file(lying))
    )
    assert z == same != other


def test_a_wrong_photograph_gets_an_error_message(client_with_styles, client, monkeypatch):
    content = image_file(a_photograph())
    clear = np.zeros((4, 4, 4), np.uint8)
    for wrong, words in (
        (b"this is no image", "the photograph is not an image, or is incomplete: its format"),
        (b"", "the photograph is not an image"),
        (content[: len(content) // 2], "the photograph is not an image, or is incomplete"),
        (image_file(clear), "the photograph has transparent pixels"),
        (image_file(np.zeros((4, 4), np.uint16)), "a photograph should have 8 bits per channel"),
    ):
        answer = client_with_styles.post("/style", content=wrong)
        assert answer.status_code == 422 and words in answer.json()["detail"]
    monkeypatch.setattr(server, "MOST_PHOTOGRAPH_PIXELS", 40 * 60 - 1)
    answer = client_with_styles.post("/style", content=content)
    assert answer.status_code == 422 and "has 60 × 40 pixels; it should have 2399" in answer.text
    monkeypatch.undo()
    ours = {"host": "127.0.0.1:7860", "content-length": str(2**25 + 1)}
    assert raw_request(client_with_styles.app, ours, "/style") == 413
    assert client_with_styles.post("/style", content=content).status_code == 200
    assert client.post("/style", content=b"").status_code == 404  # without an encoder


def test_a_wrong_z_gets_an_error_message(client, encoder):
    def z_of(*numbers):
        return base64.urlsafe_b64encode(np.array(numbers, "<f4").tobytes()).decode()

    for arguments, words in (
        ({"z": "?"}, "z cannot be decoded"),
        ({"z": "ä"}, "z cannot be decoded"),
        ({"z": "AAA="}, "z cannot be decoded"),  # two bytes
        ({"z": ""}, "z has 0 numbers, 0 of them finite; it should be 4 finite float32 numbers"),
        ({"z": z_of(1, 2, 3)}, "z has 3 numbers, 3 of them finite"),
        ({"z": z_of(1, 2, 3, np.nan)}, "z has 4 numbers, 3 of them finite"),
        ({"z": z_of(1, 2, 3, 4), "seed": 1}, "seed and z are given, only one of them should be"),
    ):
        answer = client.post("/image", params=arguments, content=bytes(4096))
        assert answer.status_code == 422 and words in answer.json()["detail"]
    with Service(SPADEGenerator(3, **SMALL | {"z_dim": None}).eval()) as plain:
        alone = client_of(app_of(plain, classes_for()))
        for name in ("seed", "z"):
            answer = alone.post("/image", params={name: "1"}, content=bytes(4096))
            assert answer.status_code == 422 and f"{name} is given, and this" in answer.text
        assert alone.post("/image", content=bytes(4096)).status_code == 200
        with pytest.raises(ValueError, match="encoder makes z of length 4, .* takes none"):
            app_of(plain, classes_for(), encoder=encoder)


@pytest.mark.parametrize(
    "path, content, words",
    [
        ("/image", b"\0" * 4095 + b"\x09", "has a 9 in 1 pixels"),
        ("/image", b"\0" * 4095, "has 4095 bytes; it should have 64 × 64"),
        ("/image", b"", "has 0 bytes"),
        ("/image?seed=-1", b"\0" * 4096, "seed is '-1'; it should be a whole number, 0 to"),
        ("/image?seed=x", b"\0" * 4096, "seed is 'x'; it should be a whole number, 0 to"),
        ("/image?seed=" + "1" * 5000, b"\0" * 4096, "it should be a whole number, 0 to"),
    ],
)
def test_a_wrong_request_gets_an_error_message(client, path, content, words):
    answer = client.post(path, content=content)
    assert answer.status_code == 422 and words in answer.text
    assert client.post("/image", content=bytes(4096)).status_code == 200


def test_foreign_hosts_and_origins_are_refused(client):
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


def test_any_address_is_accepted_if_the_server_listens_at_all(service):
    app = app_of(service, classes_for(has_edges=True), "0.0.0.0", 80)
    client = client_of(app, "http://192.168.1.5")
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403


def raw_request(app, headers, path="/image"):
    """The status of a POST whose body must not be read."""

    async def receive():
        raise AssertionError("the body was read")

    sent = []

    async def send(message):
        sent.append(message)

    pairs = [(name.encode(), text.encode()) for name, text in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": pairs}
    asyncio.run(app(scope | {"query_string": b"", "raw_path": path.encode()}, receive, send))
    return sent[0]["status"]


def test_a_large_body_is_refused_without_reading_it(client):
    ours = {"host": "127.0.0.1:7860"}
    assert raw_request(client.app, ours | {"content-length": "100000000"}) == 413
    assert raw_request(client.app, ours | {"content-length": "9" * 5000}) == 413
    assert raw_request(client.app, ours | {"content-length": "-1"}) == 411
    assert raw_request(client.app, ours | {"transfer-encoding": "chunked"}) == 411


class Failing:
    """A service that answers each request with the given error."""

    def __init__(self, service, error):
        self.generator_arguments, self.image_size = service.generator_arguments, service.image_size
        self.error = error

    def submit(self, layout, z):
        future = Future()
        future.set_exception(self.error)
        return future


class Held(Service):
    """A service that starts no image until it is allowed to."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.may = threading.Event()

    def _compute_some(self):
        assert self.may.wait(10)
        super()._compute_some()


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_requests_beyond_the_queue_are_refused_and_the_others_answered():
    torch.manual_seed(0)
    with Held(SPADEGenerator(3, **SMALL).eval(), waiting=2) as held:
        with client_of(app_of(held, classes_for())) as client:
            with ThreadPoolExecutor(2) as pool:

                def ask(number):
                    return client.post("/image", content=bytes([number] * 4096))

                asked = pool.map(ask, range(2))
                until(lambda: len(held._jobs) == 2)
                answer = ask(2)
                assert answer.status_code == 503 and "2 images wait" in answer.json()["detail"]
                held.may.set()
                assert [one.status_code for one in asked] == [200, 200]
            assert ask(2).status_code == 200


def test_one_photograph_at_a_time(service, encoder, monkeypatch):
    began, may, computed = threading.Event(), threading.Event(), moments_of

    def held(*arguments):
        began.set()
        assert may.wait(10)
        return computed(*arguments)

    monkeypatch.setattr(server, "moments_of", held)
    content = image_file(a_photograph())
    app = app_of(service, classes_for(has_edges=True), encoder=encoder)
    with client_of(app) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/style", content=content)
        assert began.wait(10)
        answer = client.post("/style", content=content)
        assert answer.status_code == 503 and "another photograph" in answer.json()["detail"]
        assert client.post("/image", content=bytes(4096)).status_code == 200
        may.set()
        assert first.result().status_code == 200
        assert client.post("/style", content=content).status_code == 200


@pytest.mark.parametrize(
    "error, status",
    [(Busy("9 images wait"), 503), (RuntimeError("no memory"), 500), (MemoryError("none"), 500)],
)
def test_a_failing_image(service, error, status):
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
    assert (settings["height"], settings["width"], settings["zLength"]) == (64, 64, 4)
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
    names_of_ade = {one.number: one.name for one in ade.listed}
    assert [names_of_ade[number] for number in (0, 1, 3, 150)] == [
        "don't care",
        "wall",
        "sky",
        "flag",
    ]
    assert len(set(names_of_ade.values())) == 151
    for classes, sky in ((coco, 156), (ade, 3), (streets, 23)):
        colours = {one.number: one.colour for one in classes.listed}
        assert colours[sky] == (120, 190, 250) and len(set(colours.values())) == len(colours)
    assert (opening_scene(ade, (16, 16))[0] == 3).any()
    assert {one.number: one.name for one in streets.listed}[23] == "sky"
    scene = opening_scene(coco, (32, 48))
    assert scene.shape == (32, 48) and scene[0, 0] == 156 and set(scene.flat) <= set(names)
    assert opening_scene(classes_of(2), (16, 16)).max() == 1


def test_classes_of_a_run():
    """According to its settings, whatever the number of channels suggests."""
    common = {"labels": "l", "images": "i", "out": "o"}
    own = classes_of(36, settings=Config(num_classes=34, dont_care=7, instances="n", **common))
    assert (own.num_classes, own.dont_care, own.has_edges) == (34, 7, True)
    assert {one.number: one.name for one in own.listed}[7] == "don't care" and len(own.listed) == 34
    coco = classes_of(183, settings=Config(convention="coco_stuff", **common))
    assert (coco.num_classes, coco.dont_care, coco.has_edges) == (182, 255, False)
    assert coco.listed[0].name == "person"


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


def test_a_generator_that_cannot_be_painted_with(service):
    with pytest.raises(ValueError, match="classes have 3 channels.* the generator's 4"):
        app_of(service, classes_for())
    with Service(SPADEGenerator(3, output_nc=1, **SMALL).eval()) as grey:
        with pytest.raises(ValueError, match="1 channels in 2 dimensions"):
            app_of(grey, classes_for())


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def invoke(*arguments):
    return CliRunner().invoke(command, ["paint", *map(str, arguments), "--port", str(free_port())])


def test_the_commands_errors(tmp_path, monkeypatch):
    (tmp_path / "text.pth").write_text("no weights")
    classes, weights = tmp_path / "classes.txt", tmp_path / "weights.pth"
    classes.write_text("0 sky")
    for path in (weights, tmp_path / "generator.safetensors"):
        checkpoint.write(SPADEGenerator(3, **SMALL), path)
    for arguments, words in (
        (["--classes", classes], "classes is given without the weights"),
        (["--encoder", weights], "encoder is given without the weights"),
        ([tmp_path / "text.pth"], "text.pth"),
        ([tmp_path / "none.pth"], "none.pth"),
        ([weights, "--encoder", weights], "encoder is the weights of a SPADEGenerator"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2 and words in " ".join(result.output.split())
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for path in (weights, tmp_path):  # a file, and a run's folder
        result = invoke(path)
        assert result.exit_code == 2 and "pip install 'spade_fast[paint]'" in result.output


def test_a_runs_encoder_is_used(tmp_path, monkeypatch, encoder):
    run = Run(tmp_path)
    checkpoint.write(SPADEGenerator(3, **SMALL), run.path("generator.safetensors"))
    taken = []
    monkeypatch.setattr(spade_fast.paint, "serve", lambda *arguments: taken.append(arguments[4]))
    run.begin(Config(labels="l", images="i", out=str(tmp_path), num_classes=3, use_vae=True))
    assert invoke(tmp_path).exit_code == 0 and taken == [None]
    parts = {"networks": {"encoder": encoder.state_dict()}}
    run.save(3, {"trainer": parts, "best": None, "settings": {}})
    assert invoke(tmp_path).exit_code == 0
    assert all(map(torch.equal, taken[1].state_dict().values(), encoder.state_dict().values()))


def test_a_port_that_is_not_free(tmp_path):
    weights = tmp_path / "none.pth"
    weights.touch()
    with listening(port=0) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(command, ["paint", str(weights), "--port", str(port)])
    assert result.exit_code == 1 and result.exception.args == (1,)
    words = f"cannot listen at 127.0.0.1, port {port}: Address already in use."
    assert words in " ".join(result.output.split())
    with pytest.raises(OSError, match=r"listen at 192\.0\.2\.1, port 0: Cannot assign"):
        listening("192.0.2.1", 0)


def test_the_command_answers_at_its_address_even_on_a_full_disk(tmp_path, encoder):
    weights = SPADEGenerator(4, **SMALL)
    for name, network in (("weights.pth", weights), ("encoder.pth", encoder)):
        checkpoint.write(network, tmp_path / name)
    line = "from spade_fast.cli import app; app()"
    arguments = ["paint", "weights.pth", "--encoder", "encoder.pth", "--port", str(free_port())]
    with subprocess.Popen(
        [sys.executable, "-c", line, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            address = running.stdout.readline().split()[2]
            assert address == f"http://127.0.0.1:{arguments[-1]}/"
            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (0, 0))  # no file can grow
            answer = post(f"{address}style", content=image_file(a_photograph()))
            image = post(f"{address}image", params=answer.json(), content=bytes(4096))
            assert image.status_code == 200 and image.content.startswith(b"\x89PNG")
        finally:
            running.send_signal(signal.SIGINT)
            output, errors = running.communicate(timeout=20)
    assert (running.returncode, output, errors) == (0, "", "")


@contextlib.contextmanager
def full_disk():
    """Inside, no file of this process can grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_small_generator_is_trained_on_a_full_disk(tmp_path):
    pytest.importorskip("accelerate")
    # imported before, because it looks for a folder that it can write to
    importlib.import_module("torch._dynamo")
    with full_disk():
        with pytest.raises(OSError), open(tmp_path / "file", "w") as file:
            file.write("x")
            file.flush()
        assert isinstance(train_demo(size=64, steps=1), SPADEGenerator)


def test_the_small_generator_learns():
    generator = train_demo(size=64, steps=30)
    scene = draw_scene((64, 64), 1000)
    wanted = photograph(scene, 1000).astype(float)
    with torch.no_grad():
        made = picture(generator(SemanticLayout.from_labels(scene[None], 8))[0])
    # Nearer than the best picture that does not depend on the labels.
    assert abs(made - wanted).mean() < 0.8 * abs(wanted - wanted.mean((0, 1))).mean()


@contextlib.contextmanager
def served(service, **settings):
    """The address of a server in a thread."""
    door = listening(port=0)
    port = door.getsockname()[1]
    running = server_of(app_of(service, classes_for(has_edges=True), port=port, **settings))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [door]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture
def address(service, encoder):
    with served(service, encoder=encoder) as address:
        yield address


def test_a_body_that_never_arrives_blocks_nobody(address, caplog):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"POST /image HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 100000000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.replace("100000000", "4096").encode())
        assert post(f"{address}/image", content=bytes(4096)).status_code == 200
    # Whoever hangs up in the middle is no error of the server's.
    assert post(f"{address}/image", content=bytes(4096)).status_code == 200
    assert not caplog.records


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    require("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a tab whose hint was dismissed. An error on its page fails the test."""
    contexts, errors = [], []

    def open_page(address, **settings):
        contexts.append(
            browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | settings)
        )
        page = contexts[-1].new_page()
        page.on("console", lambda one: one.type == "error" and errors.append(one.text))
        page.on("pageerror", lambda one: errors.append(str(one)))
        page.goto(address)
        page.get_by_text("Got it").click()
        return page

    open_page.errors = errors
    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def map_of(page):
    """The pixels of the map, as the browser shows them."""
    return page.evaluate(
        "() => { const map = document.getElementById('map');"
        " return [...map.getContext('2d').getImageData(0, 0, map.width, map.height).data] }"
    )


def labels_of(page):
    """The map's labels, by its colours."""
    numbers = {one.colour: one.number for one in classes_for().listed}
    pixels = np.array(map_of(page)).reshape(-1, 4)[:, :3].tolist()
    return np.array([numbers[tuple(pixel)] for pixel in pixels], np.uint8).reshape(64, 64)


def image_of(page):
    """The newest image's bytes, once it is the image of the current map."""
    page.wait_for_selector("#result[aria-busy=false]")
    return page.evaluate(
        "async () => [...new Uint8Array(await (await fetch("
        "document.getElementById('image').src)).arrayBuffer())]"
    )


def answer_of(address, page, **query):
    """The server's answer to the page's labels."""
    answer = post(f"{address}/image", params=query, content=labels_of(page).tobytes())
    assert answer.status_code == 200
    return list(answer.content)


def at(page, x, y):
    """The position on the page of a position on the map, from 0 to 1."""
    box = page.locator("#map").bounding_box()
    return box["x"] + box["width"] * x, box["y"] + box["height"] * y


def draw_stroke(page, start, end, steps=4):
    page.mouse.move(*at(page, *start))
    page.mouse.down()
    page.mouse.move(*at(page, *end), steps=steps)
    page.mouse.up()


def choose(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def open_file(page, field, content, name):
    page.set_input_files(field, {"name": name, "mimeType": "image/png", "buffer": content})


def test_a_stroke_changes_the_image_and_undo_restores_it(open_page, address):
    page = open_page(address)
    map_before, image_before = map_of(page), image_of(page)
    assert image_before == answer_of(address, page)
    choose(page, "sea")
    draw_stroke(page, (0.2, 0.2), (0.7, 0.3))
    image_after, map_after = image_of(page), map_of(page)
    assert map_after != map_before and image_after != image_before
    assert image_after == answer_of(address, page)
    page.keyboard.press("Control+z")
    assert image_of(page) == image_before and map_of(page) == map_before
    page.keyboard.press("Control+Shift+z")
    assert image_of(page) == image_after and map_of(page) == map_after


def test_label_maps_are_opened_and_saved_unchanged(open_page, address):
    page = open_page(address)
    for seed, file in (
        (1, image_file),
        (2, lambda labels: image_file(labels.astype(np.uint16))),
        (3, paletted),
    ):
        labels = np.random.default_rng(seed).integers(0, 3, (64, 64), np.uint8)
        open_file(page, "#file", file(labels), "labels.png")
        until(lambda: (labels_of(page) == labels).all())
        with page.expect_download() as download:
            page.get_by_text("Save map").click()
        assert (np.asarray(Image.open(download.value.path())) == labels).all()
    small = image_file(np.arange(2, dtype=np.uint8)[:, None])  # will be resized
    open_file(page, "#file", small, "small.png")
    until(lambda: (labels_of(page) == np.arange(2).repeat(32)[:, None]).all())


def paletted(labels):
    image = Image.fromarray(labels, "P")
    image.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_wrong_label_map_gets_an_error_message(open_page, address):
    page, whole = open_page(address), image_file(drawn())
    before, image = map_of(page), image_of(page)
    damaged = bytearray(whole)
    damaged[60] ^= 1
    for number, (content, words) in enumerate(
        (
            (b"this is no image", "it is not a PNG"),
            (b"", "it is not a PNG"),
            (whole[:-20], "it is incomplete"),
            (bytes(damaged), "it is damaged"),
            (image_file(np.zeros((64, 64, 3), np.uint8)), "it has colours"),
            (
                image_file(np.full((64, 64), 700, np.uint16)),
                "it has a 700, which is not a class here",
            ),
            (image_file(np.full((64, 64), 3, np.uint8)), "it has a 3, which is not a class here"),
        )
    ):
        open_file(page, "#file", content, f"{number}.png")
        page.get_by_text(f"{number}.png was not opened: {words}").wait_for()
    assert map_of(page) == before and image_of(page) == image


def test_a_photographs_style_is_kept_until_another_is_drawn(open_page, address, service, tmp_path):
    page, content = open_page(address), image_file(a_photograph())
    z = post(f"{address}/style", content=content).json()["z"]
    first = image_of(page)
    open_file(page, "#photograph", content, "beach.png")
    page.get_by_text("Style: beach.png").wait_for()
    assert image_of(page) == answer_of(address, page, z=z) != first
    choose(page, "sea")
    draw_stroke(page, (0.2, 0.2), (0.7, 0.3))
    assert image_of(page) == answer_of(address, page, z=z)
    open_file(page, "#photograph", b"no image", "text.png")
    page.get_by_text("text.png was not opened: the photograph is not an image").wait_for()
    assert "422" in open_page.errors.pop()
    with open(tmp_path / "large.png", "wb") as large:
        large.truncate(2**25 + 1)
    page.set_input_files("#photograph", tmp_path / "large.png")
    page.get_by_text("large.png was not opened: it is larger than 32 MiB").wait_for()
    page.reload()
    assert image_of(page) == answer_of(address, page, z=z)
    page.get_by_role("button", name="New style").click()
    assert image_of(page) != answer_of(address, page, z=z)
    assert not page.get_by_text("beach.png").is_visible()
    with served(service) as other:
        assert not open_page(other).locator("#open-style").is_visible()


def test_two_tabs_draw_faster_than_images_are_computed(open_page):
    """While a tab waits for an image, it requests only the newest of the maps drawn meanwhile."""
    torch.manual_seed(0)
    with Held(SPADEGenerator(4, **SMALL).eval(), waiting=4) as held, served(held) as address:
        held.may.set()
        tabs, requests, statuses = [open_page(address) for _ in range(2)], [], []
        for tab in tabs:
            image_of(tab)
            tab.on("request", lambda one: one.method == "POST" and requests.append(one))
            tab.on("response", lambda one: statuses.append(one.status))

        def draw(count):
            for number in range(count):
                for tab, name in zip(tabs, ("sea", "tree") if number % 2 else ("tree", "sky")):
                    choose(tab, name)
                    draw_stroke(tab, (0.1, number / count), (0.9, 1 - number / count))
                    assert len(held._jobs) <= 2

        def check():
            images = [image_of(tab) for tab in tabs]
            assert images == [answer_of(address, tab) for tab in tabs] and images[0] != images[1]

        draw(3)
        check()
        requests.clear()
        held.may.clear()
        draw(3)
        until(lambda: len(held._jobs) == 2)
        assert len(requests) == 2
        held.may.set()
        check()
        tabs[0].wait_for_timeout(50)
        assert len(requests) == 4 and set(statuses) == {200}


def test_a_reload_in_the_middle_of_a_request(open_page):
    torch.manual_seed(0)
    with Held(SPADEGenerator(4, **SMALL).eval()) as held, served(held) as address:
        held.may.set()
        page = open_page(address)
        image_of(page)
        choose(page, "sea")
        held.may.clear()
        draw_stroke(page, (0.2, 0.2), (0.7, 0.3))
        labels = labels_of(page)
        until(lambda: held._jobs)
        page.reload()
        held.may.set()
        assert image_of(page) == answer_of(address, page) and (labels_of(page) == labels).all()


def test_painting_with_keys(open_page, address):
    page = open_page(address)
    choose(page, "sea")
    before = labels_of(page)
    page.locator("#map").focus()
    page.keyboard.press("Space")
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Space")
    after = labels_of(page)
    assert (after[32, 32:60] == 1).all() and (after[:20] == before[:20]).all()
    page.keyboard.press("ArrowLeft")  # moves only the brush
    assert (labels_of(page) == after).all()
    for key, tool in (("e", "Eraser"), ("l", "Line"), ("f", "Fill"), ("p", "Pick"), ("b", "Brush")):
        page.keyboard.press(key)
        assert page.locator("[data-tool][aria-pressed=true]").inner_text() == tool
    assert image_of(page) == answer_of(address, page)


def test_painting_with_a_finger(open_page, address):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = open_page(address, **phone)
    page.get_by_role("button", name="sea", exact=True).tap()
    image_of(page)
    page.locator("#map").scroll_into_view_if_needed()
    finger, scrolled = page.context.new_cdp_session(page), page.evaluate("scrollY")

    def touch(kind, *places):
        points = [{"x": x, "y": y} for x, y in (at(page, *place) for place in places)]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    boxes = []
    for words in ("Short", "Image in 12345 ms, on the page after 12345 ms" * 2):
        page.evaluate("(words) => { document.getElementById('status').textContent = words }", words)
        boxes.append(page.locator("#map").bounding_box())
    assert boxes[0] == boxes[1]  # the map stays under the finger
    touch("touchStart", (0.5, 0.2))
    for step in range(1, 7):
        touch("touchMove", (0.5, 0.2 + step / 10))
    touch("touchEnd")
    assert (labels_of(page)[13:51, 32] == 1).all() and page.evaluate("scrollY") == scrolled
    assert image_of(page) == answer_of(address, page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
