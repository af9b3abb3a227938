"""A service: which weights it uses for an image, what it keeps, and that failures do no harm."""

import contextlib
import copy
import threading
import time
from concurrent.futures import CancelledError, wait

import pytest
import torch
from agree import assert_agree

import spade_fast
from spade_fast import (
    ConvEncoder,
    SemanticLayout,
    Service,
    SPADEGenerator,
    checkpoint,
    frozen,
    kernels,
    use_backend,
)
from spade_fast import layout as layouts
from spade_fast import service as serving
from spade_fast.nn import tables as tables_of_windows
from spade_fast.training import Config
from spade_fast.training.run import Run

CLASSES, SIZE = 5, 32


def generator_of(seed=0, **settings):
    torch.manual_seed(seed)
    wiring = {"crop_size": SIZE, "ngf": 2, "nhidden": 4, "z_dim": 3}
    return SPADEGenerator.official(CLASSES, **wiring | settings).eval()


def layout_of(seed=0, images=1, size=SIZE):
    random = torch.Generator().manual_seed(seed)
    small = torch.randint(CLASSES, (images, 4, 4), generator=random)
    labels = small.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
    return SemanticLayout.from_labels(labels, CLASSES)


def by_hand(generator, layout, z=None):
    """The image as README computes it."""
    generator = copy.deepcopy(generator).fold_spectral_norm()
    with torch.no_grad(), frozen(generator):
        return generator(layout, z)


@contextlib.contextmanager
def held(monkeypatch):
    """Inside, the network's calls wait. Yields two events: the first is set when the network is
    called, and setting the second lets it go on.
    """
    called, go_on, compute = threading.Event(), threading.Event(), serving.Loaded.compute

    def waiting(self, images):
        called.set()
        assert go_on.wait(10)
        return compute(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(serving.Loaded, "compute", waiting)
        try:
            yield called, go_on
        finally:
            go_on.set()


@pytest.fixture
def computed(monkeypatch):
    """A list that gets an entry for every table that is computed."""
    tables, compute = [], tables_of_windows.compute_table
    monkeypatch.setattr(
        tables_of_windows,
        "compute_table",
        lambda *arguments: tables.append(True) or compute(*arguments),
    )
    return tables


@pytest.mark.parametrize("use_vae", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_images_equal_those_of_a_direct_call(use_vae, dtype):
    generator = generator_of(use_vae=use_vae).to(dtype)
    z = torch.randn(4, 3, dtype=dtype) if use_vae else None
    with Service(generator) as service:
        for seed in (0, 1, 0):
            layout = layout_of(seed)
            expected = by_hand(generator, layout, None if z is None else z[:1])
            assert torch.equal(service.generate(layout, None if z is None else z[:1]), expected)
        layouts = layout_of(2, images=2)
        found = service.generate(layouts, z)
        for number in range(len(found)):
            own = None if z is None else z[number : number + 1]
            alone = by_hand(generator, layouts[number % 2], own)
            assert torch.equal(found[number : number + 1], alone)
    assert len(found) == (4 if use_vae else 2) and found.dtype == dtype


def test_z_from_the_encoder_and_random_z():
    generator, encoder = generator_of(use_vae=True), ConvEncoder(2, 3).eval()
    with torch.no_grad():
        z, _ = encoder(torch.rand(1, 3, SIZE, SIZE) * 2 - 1)
    z.requires_grad_()
    with Service(generator) as service:
        found = service.generate(layout_of(), z)
        assert torch.equal(found, by_hand(generator, layout_of(), z)) and not found.requires_grad
        drawn = [service.generate(layout_of()) for _ in range(2)]
    assert not torch.equal(*drawn)


def test_requests_in_inference_mode():
    generator, z = generator_of(use_vae=True), torch.randn(1, 3)
    expected = by_hand(generator, layout_of(), z)
    with Service(generator) as service:
        with torch.inference_mode():
            found = service.generate(layout_of(), z.clone())
            layout = layout_of(1)
        assert torch.equal(found, expected) and not found.is_inference()
        assert torch.equal(service.generate(layout, z), by_hand(generator, layout_of(1), z))


def test_weights_of_files_and_dicts(tmp_path):
    generator = generator_of()
    checkpoint.write(generator, tmp_path / "generator.pth")
    expected = by_hand(generator, layout_of())
    for weights in (tmp_path / "generator.pth", str(tmp_path / "generator.pth"), generator):
        with Service(weights) as service:
            assert torch.equal(service.generate(layout_of()), expected)
            assert service.generator_arguments["label_nc"] == CLASSES
    with Service(generator, dtype=torch.float64) as service:
        found = service.generate(layout_of())
    assert found.dtype == torch.float64
    assert_agree(found, expected)


def test_later_changes_of_the_weights_have_no_effect():
    generator = generator_of()
    expected = by_hand(generator, layout_of())
    with Service(generator) as service:
        generator.head_0.norm_0.mlp_gamma.weight.data.add_(1)
        generator.train()
        assert torch.equal(service.generate(layout_of()), expected)


def test_eight_threads_and_other_weights_in_the_middle():
    generators = [generator_of(seed, use_vae=True) for seed in range(2)]
    layouts, z = [layout_of(seed) for seed in range(3)], torch.randn(1, 3)
    old, new = ([by_hand(one, layout, z) for layout in layouts] for one in generators)
    assert not any(map(torch.equal, old, new))
    ends, reloaded, found, wrong = time.monotonic() + 2, threading.Event(), [], []

    def ask(thread):
        number, is_new = thread, False
        while not wrong and (time.monotonic() < ends or not is_new):
            place, after = number % 3, reloaded.is_set()
            image = service.generate(layouts[place], z)
            is_new = torch.equal(image, new[place])
            if not is_new and (after or not torch.equal(image, old[place])):
                wrong.append((thread, number))
            found.append(is_new)
            number += 1

    with Service(generators[0], threads=2, cache=300_000) as service:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        while not found and any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
        service.reload(generators[1])
        reloaded.set()
        for thread in threads:
            thread.join()
    assert not wrong and len(set(found)) == 2


def test_waiting_requests_use_the_weights_at_their_time(monkeypatch):
    generators = [generator_of(), generator_of(1, ngf=3)]
    old, new = (by_hand(one, layout_of()) for one in generators)
    with Service(generators[0]) as service:
        with held(monkeypatch) as (called, _go_on):
            waiting = [service.submit(layout_of()) for _ in range(3)]
            assert called.wait(10)
            service.reload(generators[1])
            waiting.append(service.submit(layout_of()))
        found = [future.result() for future in waiting]
    assert all(torch.equal(image, old) for image in found[:3]) and torch.equal(found[3], new)


def test_a_reload_that_fails_leaves_the_old_weights(tmp_path):
    generator = generator_of()
    (tmp_path / "text.pth").write_text("no weights")
    with Service(generator) as service:
        for weights, words in (
            (tmp_path / "text.pth", "is not a file of weights"),
            (tmp_path / "none.pth", "does not exist"),
            (ConvEncoder(2, 3), "weights is a ConvEncoder; it should be a SPADEGenerator"),
            (ConvEncoder(2, 3).state_dict(), "those of a ConvEncoder"),
        ):
            with pytest.raises((ValueError, TypeError, OSError), match=words):
                service.reload(weights)
        assert torch.equal(service.generate(layout_of()), by_hand(generator, layout_of()))


def test_the_same_content_uses_its_tables(computed):
    with Service(generator_of(use_vae=True)) as service:
        service.generate(layout_of())
        first = len(computed)
        assert first > 0 and service.bytes > 0
        for _ in range(3):
            service.generate(layout_of(), torch.randn(2, 3))
        assert len(computed) == first
        service.generate(layout_of(1))
        assert len(computed) == 2 * first
        service.reload(generator_of(1, use_vae=True))
        assert service.bytes == 0
        service.generate(layout_of())
        assert len(computed) == 3 * first


def test_the_cache_is_bounded_and_drops_the_oldest(computed):
    generator = generator_of()
    with Service(generator) as service:
        service.generate(layout_of(0))
        one, tables = service.bytes, len(computed)
    assert one > layout_of(0).nbytes
    with Service(generator, cache=int(3.5 * one)) as service:
        for seed in range(8):
            service.generate(layout_of(seed))
            assert 0 < service.bytes <= 3.5 * one
            service.generate(layout_of(0))  # so it is never the oldest
        assert len(computed) == (1 + 8) * tables
    with Service(generator, cache=0) as service:
        for _ in range(2):
            assert torch.equal(service.generate(layout_of()), by_hand(generator, layout_of()))
        assert service.bytes == 0


@pytest.mark.parametrize(
    "edit",
    [
        lambda layout: layout.codes.copy_(layout.codes.flip(2)),
        lambda layout: layout.codes.numpy().fill(1),  # PyTorch does not notice this
        lambda layout: layout.palette.data.mul_(2),
        lambda layout: setattr(layout, "codes", layout.codes.flip(1)),
    ],
    ids=["in place", "numpy", "data", "another"],
)
def test_a_layout_that_is_edited_in_place(edit, monkeypatch):
    generator, layout = generator_of(), layout_of()

    def fresh():
        return SemanticLayout(layout.codes.clone(), layout.palette.clone())

    with Service(generator) as service:
        for _ in range(2):
            with held(monkeypatch):
                expected = by_hand(generator, fresh())
                future = service.submit(layout)
                edit(layout)
            assert torch.equal(future.result(), expected)
        assert torch.equal(service.generate(layout), by_hand(generator, fresh()))


def test_a_layout_that_another_thread_edits_while_it_is_looked_up(monkeypatch):
    """Without a service. Its tables used to be kept for the layout that it had become."""
    spade, layout = spade_fast.SPADE(8, CLASSES, 8).eval(), layout_of()
    x, edits = torch.randn(1, 8, SIZE, SIZE), [lambda: layout.codes.copy_(layout.codes.flip(2))]
    dtype_of_convolution = tables_of_windows.dtype_of_convolution

    def edited(*arguments):
        if edits:
            edits.pop()()
        return dtype_of_convolution(*arguments)

    monkeypatch.setattr(tables_of_windows, "dtype_of_convolution", edited)
    with torch.no_grad(), frozen(spade):
        spade(x, layout)
        assert not edits
        found = spade(x, layout)
        expected = spade(x, SemanticLayout(layout.codes.clone(), layout.palette.clone()))
    assert torch.equal(found, expected)


def test_a_layout_that_another_thread_edits_while_it_is_numbered(monkeypatch):
    """Without a service. Windows from before the edit used to be kept, or a KeyError was raised."""
    layout, number, edits = layout_of(), layouts.number, [lambda: layout.codes.fill_(1)]

    def edited(*arguments):
        made = number(*arguments)
        if edits:
            edits.pop()()
            layout.windows((16, 16), 3)
        return made

    monkeypatch.setattr(layouts, "number", edited)
    layout.windows((SIZE, SIZE), 3)
    assert not edits
    assert (
        layout.windows((SIZE, SIZE), 3).count
        == SemanticLayout(layout.codes, layout.palette).windows((SIZE, SIZE), 3).count
    )


def test_images_of_one_size_are_computed_together(monkeypatch):
    generator, batches = generator_of(use_vae=True), []
    compute = serving.Loaded.compute
    monkeypatch.setattr(
        serving.Loaded,
        "compute",
        lambda self, images: batches.append(len(images)) or compute(self, images),
    )
    requests = [
        (layout_of(seed, size=size), torch.randn(1, 3))
        for seed, size in ((0, 32), (1, 32), (2, 64), (1, 32), (3, 32), (1, 32), (1, 32))
    ]
    with Service(generator, batch=4) as service:
        with held(monkeypatch) as (called, _):
            futures = [service.submit(*requests[0])]
            assert called.wait(10)
            futures += [service.submit(*request) for request in requests[1:]]
        found = [future.result() for future in futures]
    assert batches == [1, 4, 1, 1]
    for request, image in zip(requests, found):
        assert_agree(image, by_hand(generator, *request))


def test_an_error_in_one_request_does_not_stop_the_others(monkeypatch):
    generator = generator_of()
    expected = {seed: by_hand(generator, layout_of(seed)) for seed in range(4)}
    forward = SPADEGenerator.forward

    def failing(self, layout, z=None):
        if any(one.equal(layout_of(2)) for one in map(layout.__getitem__, range(len(layout)))):
            raise RuntimeError("not enough memory")
        return forward(self, layout, z)

    with Service(generator, batch=4) as service:
        monkeypatch.setattr(SPADEGenerator, "forward", failing)
        with held(monkeypatch) as (called, _):
            futures = [service.submit(layout_of(0))]
            assert called.wait(10)
            futures += [service.submit(layout_of(seed)) for seed in range(4)]
        with pytest.raises(RuntimeError, match="not enough memory"):
            futures.pop(3).result()
        for future, seed in zip(futures, (0, 0, 1, 3)):
            assert_agree(future.result(), expected[seed])


@pytest.mark.parametrize(
    "layout, z, words",
    [
        (torch.zeros(1, CLASSES, 8, 8), None, "layout is a Tensor; it should be a SemanticLayout"),
        (SemanticLayout.from_labels(torch.zeros(1, 8, 8).long(), 7), None, "has 7 channels"),
        (SemanticLayout.from_labels(torch.zeros(1, 8).long(), CLASSES), None, "has 1 spatial"),
        (layout_of(images=2), torch.zeros(3, 3), "z has a batch of 3; it should be a multiple"),
        (layout_of(), torch.zeros(1, 4), r"z is \[1, 4\]; it should be a tensor \[M, 3\]"),
        (layout_of(), torch.zeros(1, 3).long(), "z is torch.int64; it should be a floating-point"),
        (layout_of(), [0.0] * 3, "z is list; it should be a floating-point tensor or None"),
        (layout_of(images=2)[[]], None, "it should have one image or more"),
    ],
)
def test_a_wrong_request_is_refused_at_once(layout, z, words):
    with Service(generator_of(use_vae=True)) as service:
        with pytest.raises((ValueError, TypeError), match=words):
            service.submit(layout, z)
        assert service.generate(layout_of()).shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"threads": 0}, "threads is 0"),
        ({"batch": 1.5}, "batch is 1.5"),
        ({"waiting": "many"}, "waiting is 'many'"),
        ({"cache": "much"}, "cache is 'much'; it should be bytes, or text such as \"256MB\""),
        ({"cache": -1}, "cache is -1"),
        ({"dtype": torch.int64}, "dtype is torch.int64"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Service(generator_of(), **settings)


def test_sizes_with_units():
    sizes = ("256MB", "1 GiB", "1.5k", "7", 5, "2TB")
    found = [serving.bytes_of("cache", size) for size in sizes]
    assert found == [256_000_000, 2**30, 1500, 7, 5, 2 * 10**12]


def test_a_full_queue_is_an_error(monkeypatch):
    with Service(generator_of(use_vae=True), waiting=2) as service:
        with held(monkeypatch) as (called, _):
            futures = [service.submit(layout_of())]
            assert called.wait(10)
            futures += [service.submit(layout_of()) for _ in range(2)]
            with pytest.raises(serving.Busy, match="with 1 more there would be more than 2"):
                service.generate(layout_of())
        assert all(future.result().shape[0] == 1 for future in futures)
        assert len(service.generate(layout_of(), torch.randn(5, 3))) == 5


@pytest.mark.parametrize("cancel", [False, True])
def test_closed_while_requests_wait(monkeypatch, cancel):
    service = Service(generator_of(use_vae=True))
    with held(monkeypatch) as (called, _):
        first = service.submit(layout_of(), torch.randn(2, 3))
        assert called.wait(10)
        second = service.submit(layout_of())
        closing = threading.Thread(target=service.close, args=(cancel,))
        closing.start()
        while not service._closed:
            time.sleep(0.001)
        with pytest.raises(RuntimeError, match="the service is closed"):
            service.submit(layout_of())
    closing.join(10)
    assert not closing.is_alive() and len(first.result(0)) == 2
    if cancel:
        assert not wait([first, second], timeout=10).not_done
        with pytest.raises(CancelledError):
            second.result(0)
    else:
        assert len(second.result(0)) == 1


def test_a_request_that_is_cancelled(monkeypatch):
    with Service(generator_of()) as service:
        with held(monkeypatch) as (called, _):
            first, second = service.submit(layout_of()), service.submit(layout_of(1))
            assert called.wait(10) and not first.cancel() and second.cancel()
            third = service.submit(layout_of(2))
        assert not wait([first, second, third], timeout=60).not_done  # the cancelled one, too
        assert len(first.result()) == len(third.result()) == 1


def test_cancelled_requests_take_no_places(monkeypatch):
    with Service(generator_of(), waiting=2) as service:
        with held(monkeypatch) as (called, _):
            first = service.submit(layout_of())
            assert called.wait(10)
            others = [service.submit(layout_of()) for _ in range(2)]
            assert all(future.cancel() for future in others)
            last = service.submit(layout_of())
            assert not wait(others, timeout=10).not_done
        assert len(first.result()) == len(last.result()) == 1


def test_a_callback_that_would_close_its_own_thread_gets_an_error():
    found = []

    def close(future):
        with pytest.raises(RuntimeError, match="close is called in a callback of a Future"):
            service.close()
        found.append(True)

    with Service(generator_of()) as service:
        future = service.submit(layout_of())
        future.add_done_callback(close)
        future.result()
    assert found == [True]


def test_the_backend_at_construction_is_used(monkeypatch):
    """A thread of a pool starts without the scopes of the caller."""
    used, compute = [], serving.Loaded.compute

    def noting(self, images):
        used.append(kernels.select(torch.zeros(1, 1, 2, 2)).name)
        return compute(self, images)

    monkeypatch.setattr(serving.Loaded, "compute", noting)
    with use_backend("torch"), Service(generator_of()) as service:
        service.generate(layout_of())
    with Service(generator_of()) as service, use_backend("torch"):
        service.generate(layout_of())
    assert used == ["torch", kernels.select(torch.zeros(1, 1, 2, 2)).name]


def test_a_callback_that_would_wait_for_itself_gets_an_error():
    layout, found = layout_of(), []

    def ask_again(future):
        with pytest.raises(RuntimeError, match="use submit, which does not wait"):
            service.generate(layout)
        found.append(service.submit(layout))

    with Service(generator_of()) as service:
        first = service.submit(layout)
        first.add_done_callback(ask_again)
        image = first.result()
        while not found:
            time.sleep(0.01)
        assert found[0].result().equal(image)


def test_the_folder_of_a_run(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no config.yaml; it should be the folder of"):
        Service(tmp_path)
    run.begin(Config())
    with pytest.raises(FileNotFoundError, match="has no generator.safetensors yet"):
        Service(str(tmp_path))
    one, other = generator_of(), generator_of(1)
    checkpoint.write(one, run.path("generator.safetensors"))
    layout = layout_of()
    with Service(str(tmp_path)) as service:
        assert torch.equal(service.generate(layout), by_hand(one, layout))
        checkpoint.write(other, run.weights())
        service.reload(tmp_path)
        assert torch.equal(service.generate(layout), by_hand(other, layout))
