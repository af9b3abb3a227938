"""Tables that are kept while weights stay as they are."""

import copy
import threading

import pytest
import torch
from test_layout import patches

import spade_fast
from spade_fast import SPADE, SemanticLayout, SPADEResnetBlock
from spade_fast.nn import tables as tables_of_windows


@pytest.fixture
def computed(monkeypatch):
    """A list that grows by every table that is computed."""
    tables, compute = [], tables_of_windows.compute_table
    monkeypatch.setattr(
        tables_of_windows,
        "compute_table",
        lambda *arguments: tables.append(True) or compute(*arguments),
    )
    return tables


def layout_of(seed=0, size=32, classes=5):
    return SemanticLayout.from_labels(patches((1, size, size), classes, seed), classes)


def block():
    return SPADEResnetBlock(8, 4, "spadeinstance3x3", 5, nhidden=8).eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tables_are_computed_once_for_each_layout(computed, mode):
    model, layouts, x = (
        block(),
        [layout_of(seed) for seed in range(2)],
        torch.randn(3, 1, 8, 32, 32),
    )
    with mode():
        with spade_fast.window_mode("always"):
            expected = [model(own, layout) for own in x for layout in layouts]
        computed.clear()
        with spade_fast.frozen(model) as tables:
            found = [model(own, layout) for own in x for layout in layouts]
            assert len(computed) == 2 * 3  # layouts, SPADEs of the block
            assert tables.bytes == sum(
                4 * layout.windows((32, 32), 3).count * 2 * (8 + 8 + 4) for layout in layouts
            )
        assert tables.bytes == 0
        with spade_fast.window_mode("always"):
            model(x[0], layouts[0])
    assert len(computed) == 3 * 3 and all(map(torch.equal, found, expected))


def test_a_dense_condition_is_found_to_be_a_layout_first(computed):
    model, segmap = block(), layout_of().to_segmap()
    with torch.inference_mode(), spade_fast.frozen(model):
        for _ in range(3):
            model(torch.randn(1, 8, 32, 32), segmap.clone() if len(computed) == 0 else segmap)
    assert len(computed) == 2 * 3


def test_training_inside_computes_as_always(computed):
    model, layout, x = block(), layout_of(), torch.randn(1, 8, 32, 32)
    with spade_fast.frozen(model) as tables, spade_fast.window_mode("always"):
        for _ in range(2):
            model(x, layout).sum().backward()
        assert tables.bytes == 0
    assert len(computed) == 6 and model.norm_0.mlp_gamma.weight.grad is not None


def test_dtypes_and_sizes_are_kept_apart(computed):
    spade, layout = SPADE(8, 5, 8), layout_of()
    with torch.no_grad(), spade_fast.frozen(spade):
        for _ in range(2):
            first, small = (
                spade(torch.randn(1, 8, 32, 32), layout),
                spade(torch.randn(1, 8, 16, 16), layout),
            )
            with torch.autocast("cpu", torch.bfloat16):
                spade(torch.randn(1, 8, 32, 32), layout)
    assert len(computed) == 3 and first.shape[2:] == (32, 32) and small.shape[2:] == (16, 16)


def test_memory_is_bounded(computed):
    spade, layouts, x = (
        SPADE(8, 5, 8),
        [layout_of(seed) for seed in range(4)],
        torch.randn(1, 8, 32, 32),
    )
    sizes = [4 * layout.windows((32, 32), 3).count * 2 * 8 for layout in layouts]
    with torch.no_grad(), spade_fast.frozen(spade, max_bytes=sum(sizes) - 1) as tables:
        for layout in [
            *layouts,
            layouts[3],
            layouts[0],
        ]:  # the first makes room for the last, and the second for the first
            spade(x, layout)
        assert len(computed) == 5 and tables.bytes == sum(sizes) - sizes[1]
    computed.clear()
    with torch.no_grad(), spade_fast.frozen(spade, max_bytes=sizes[0] - 1) as tables:
        for _ in range(2):
            spade(x, layouts[0])
        assert len(computed) == 2 and tables.bytes == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda spade: spade.mlp_gamma.weight.add_(1),
        lambda spade: spade.mlp_gamma.weight.data.add_(1),
        lambda spade: spade.mlp_gamma.weight.detach().numpy().__imul__(2),
        lambda spade: spade.load_state_dict(SPADE(8, 5, 8).state_dict()),
        lambda spade: setattr(spade, "mlp_gamma", copy.deepcopy(spade.mlp_gamma)),
        lambda spade: spade.mlp_gamma.register_parameter("bias", None),
        lambda spade: spade.half(),
    ],
)
def test_a_change_of_weights_is_an_error(change):
    spade = SPADE(8, 5, 8)
    with (
        pytest.raises(RuntimeError, match="weights changed inside frozen.*mlp_gamma"),
        torch.no_grad(),
        spade_fast.frozen(spade),
    ):
        change(spade)


def test_an_error_inside_comes_out_as_it_is():
    spade = SPADE(8, 5, 8)
    with pytest.raises(KeyError), torch.no_grad(), spade_fast.frozen(spade):
        spade.mlp_gamma.weight.add_(1)
        raise KeyError
    with torch.no_grad():
        assert spade(torch.randn(1, 8, 32, 32), layout_of()).shape == (1, 8, 32, 32)


def test_a_copy_made_inside_is_not_frozen(computed):
    spade, layout, x = SPADE(64, 5, 8), layout_of(), torch.randn(1, 64, 32, 32)
    with torch.no_grad(), spade_fast.frozen(spade):
        spade(x, layout)
        other = copy.deepcopy(spade)
        other.mlp_beta.bias.add_(1)
        assert torch.allclose(other(x, layout), spade(x, layout) + 1, atol=1e-5)


def test_frozen_inside_frozen(computed):
    model, layout, x = block(), layout_of(), torch.randn(1, 8, 32, 32)
    with torch.no_grad(), spade_fast.frozen(model) as outer:
        model(x, layout)
        with spade_fast.frozen(model.norm_0) as inner:
            model(x, layout)
            assert inner.bytes > 0
        model(x, layout)
        assert outer.bytes > inner.bytes == 0
    assert len(computed) == 3 + 1


def test_threads_share_the_tables():
    spade, layouts, x = (
        SPADE(64, 5, 8),
        [layout_of(seed) for seed in range(4)],
        torch.randn(1, 64, 32, 32),
    )
    with torch.no_grad():
        expected = [spade(x, layout) for layout in layouts]
    wrong = []

    def sample():
        with torch.no_grad():
            for number in range(20):
                y = spade(x, layouts[number % 4])
                wrong.extend([number] * (not torch.allclose(y, expected[number % 4], atol=1e-5)))

    with spade_fast.frozen(spade, max_bytes=100_000):
        threads = [threading.Thread(target=sample) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_model_without_spades():
    with (
        pytest.raises(ValueError, match="model is a Linear without any SPADE"),
        spade_fast.frozen(torch.nn.Linear(2, 2)),
    ):
        pass
