"""`convert` on the networks of diffusers whose norms are conditioned by the latent: MoVQ's VQModel
and CogVideoX's autoencoder.
"""

import copy
import gc
import io
import pickle

import pytest
import torch
from agree import assert_agree, assert_agree_beside

import spade_fast
from spade_fast.agreement import excess
from spade_fast.convert import Fast, FastSPADE, fuse
from spade_fast.convert.later import Later
from spade_fast.nn import voxels

pytestmark = pytest.mark.needs("diffusers")
LATENT = 4
EXACT = {"roundings": 2**18}  # 6e-11 of the largest element, in float64


def movq_norm(channels=32):
    from diffusers.models.attention_processor import SpatialNorm

    return SpatialNorm(channels, LATENT)


def cogvideox_norm(channels=8):
    from diffusers.models.autoencoders import autoencoder_kl_cogvideox

    return autoencoder_kl_cogvideox.CogVideoXSpatialNorm3D(channels, LATENT, 4)


@pytest.fixture(scope="module")
def movq():
    """A small VQModel in float64, and its converted copy."""
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        latent_channels=LATENT,
        num_vq_embeddings=8,
        norm_type="spatial",
    )
    return pair(model, 16)


@pytest.fixture(scope="module")
def cogvideox():
    """A small autoencoder of videos in float64, and its converted copy."""
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    model = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=4,
        temporal_compression_ratio=2,
        sample_height=16,
        sample_width=16,
    )
    return pair(model, 13)


def pair(model, norms):
    model.double()
    ours = copy.deepcopy(model)
    report = spade_fast.convert(ours)
    assert report.converted == len(report) == norms, report
    assert all("voxels of the condition" in entry.reason for entry in report)
    return model, ours


def copies(models, dtype=torch.float64):
    return [copy.deepcopy(model).to(dtype) for model in models]


class Calls:
    """Counts the calls of converted norms, and those that took the fast forward."""

    def __init__(self):
        self.all = self.fast = 0

    def clear(self):
        """The counts so far, which begin anew."""
        counts = self.all, self.fast
        self.all = self.fast = 0
        return counts


@pytest.fixture
def calls(monkeypatch):
    found, forward, fast = Calls(), Fast.forward, FastSPADE._fast

    def counted(self, *given, **named):
        found.all += 1
        return forward(self, *given, **named)

    def counted_fast(self, *given):
        found.fast += 1
        return fast(self, *given)

    monkeypatch.setattr(Fast, "forward", counted)
    monkeypatch.setattr(FastSPADE, "_fast", counted_fast)
    return found


def decode(model, z):
    settings = {"force_not_quantize": True} if type(model).__name__ == "VQModel" else {}
    return model.decode(z, **settings).sample


def outcome(model, z, run=decode):
    """The result, and the gradients of z and of all parameters that it has."""
    z = z.clone().requires_grad_()
    y = run(model, z)
    wanted = {"z": z, **dict(model.named_parameters())}
    dy = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    found = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    gradients = {name: grad for name, grad in zip(wanted, found) if grad is not None}
    return {"y": y.detach(), **gradients}


def latent(model, frames=3, batch=2, size=(4, 3)):
    is_movq = type(model).__name__ == "VQModel"
    frames = () if is_movq else (frames,)
    return torch.randn(batch, LATENT, *frames, *size, dtype=torch.float64)


@pytest.mark.parametrize("train", [False, True])
def test_movq_decodes_the_same(movq, train):
    own, ours = (model.train(train) for model in movq)
    z = latent(own)
    assert_agree_beside(outcome(ours, z), outcome(own, z), **EXACT)
    with torch.no_grad():
        assert_agree(decode(ours, z), decode(own, z), **EXACT)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_cogvideox_decodes_the_same(cogvideox, frames):
    """With four or five frames, the last two are decoded with the caches of the first ones."""
    own, ours = cogvideox
    z = latent(own, frames)
    assert_agree_beside(outcome(ours, z), outcome(own, z), **EXACT)
    with torch.no_grad():
        assert_agree(decode(ours, z), decode(own, z), **EXACT)


@pytest.mark.parametrize("frames", [1, 8, 9])
def test_cogvideox_encodes_the_same(cogvideox, frames):
    own, ours = cogvideox
    video = torch.randn(1, 3, frames, 8, 8, dtype=torch.float64)

    def run(model, video):
        return model.encode(video).latent_dist.parameters

    assert_agree_beside(outcome(ours, video, run), outcome(own, video, run), **EXACT)


def test_tiles_and_slices(cogvideox):
    for model in (models := copies(cogvideox)):
        model.enable_tiling(8, 8, 0.25, 0.25)
        model.enable_slicing()
    own, ours = models
    z = latent(own, 3, size=(6, 5))
    assert_agree_beside(outcome(ours, z), outcome(own, z), **EXACT)


def test_gradient_checkpointing(cogvideox):
    for model in (models := copies(cogvideox)):
        model.train().enable_gradient_checkpointing()
    own, ours = models
    z = latent(own, 4)
    assert_agree_beside(outcome(ours, z), outcome(own, z), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["movq", "cogvideox"])
def test_other_dtypes_round_no_more(name, dtype, request):
    models = request.getfixturevalue(name)
    (own, ours), z = copies(models, dtype), latent(models[0])
    with torch.no_grad():
        truth = decode(models[0], z)
        found, eager = decode(ours, z.to(dtype)), decode(own, z.to(dtype))
    assert excess(found, eager, truth) <= 1
    if dtype == torch.float32:
        eager = outcome(own, z.float())
        assert_agree_beside(outcome(ours, z.float()), eager, 2**12)


@pytest.mark.parametrize("name", ["movq", "cogvideox"])
def test_the_same_after_steps_and_after_reverting(name, request, calls):
    own, ours = copies(request.getfixturevalue(name))
    z, steps = latent(own), []
    for model in (own, ours):
        steps.append(torch.optim.SGD(model.decoder.parameters(), 1e-3))
    for _ in range(2):
        for model, step in zip((own, ours), steps):
            step.zero_grad()
            decode(model, z).square().mean().backward()
            step.step()
    assert_agree_beside(dict(ours.state_dict()), dict(own.state_dict()), **EXACT)
    calls.clear()
    expected = decode(own, z)
    assert_agree(decode(ours, z), expected, **EXACT)
    assert calls.all == calls.fast > 10
    own.load_state_dict(ours.state_dict())
    assert spade_fast.revert(ours) == calls.clear()[0]
    assert torch.equal(decode(ours, z), decode(own, z)) and calls.all == 0


def test_every_call_is_fast(movq, cogvideox, calls):
    for _, ours in (movq, cogvideox):
        z = latent(ours, 5)
        decode(ours, z)
        with torch.no_grad():
            decode(copy.deepcopy(ours).float(), z.float())
        every, fast = calls.clear()
        assert every == fast > 10


def frame_batches(decoders, z):
    """What decoders return that decode two frames each, one after another, with one cache."""
    cache, found = None, []
    for decoder, part in zip(decoders, z.split(2, dim=2)):
        y, cache = decoder(part, conv_cache=cache)
        found.append((y, cache))
    return found


def test_caches_are_what_they_were(cogvideox, calls):
    own, ours = (model.decoder for model in cogvideox)
    z = latent(cogvideox[0], 4)
    expected = frame_batches([own, own], z)
    assert_agree(frame_batches([ours, ours], z), expected, **EXACT)
    assert_agree(frame_batches([ours, own], z), expected, **EXACT)
    assert_agree(frame_batches([own, ours], z), expected, **EXACT)
    assert calls.all == calls.fast == 4 * 13


def test_caches_of_a_norm_have_the_values_and_gradients_of_its_own():
    torch.manual_seed(0)
    own = cogvideox_norm().double()
    ours = copy.deepcopy(own)
    spade_fast.convert(ours)
    f, found = torch.randn(2, 8, 5, 4, 4, dtype=torch.float64), []
    for norm in (own, ours):
        z = torch.linspace(-1, 1, 144, dtype=torch.float64).view(2, 4, 2, 3, 3).requires_grad_()
        _, cache = norm(f, z)
        assert list(cache) == ["conv_y", "conv_b"] and type(cache) is dict
        loss = (cache["conv_y"] * f[:, :4]).sum() + cache["conv_b"].square().sum()
        (gradient,) = torch.autograd.grad(loss, z)
        found.append((cache, gradient))
    assert_agree(found[1], found[0])
    kept = found[1][0]["conv_y"]
    assert kept.data_ptr() != found[1][0]["conv_b"].data_ptr()
    assert type(kept + 1) is torch.Tensor and kept.requires_grad


def test_a_cache_is_made_when_it_is_read():
    norm = cogvideox_norm()
    spade_fast.convert(norm)
    f, z = torch.randn(1, 8, 2, 4, 4), torch.randn(1, 4, 2, 2, 2)
    with torch.no_grad():
        _, cache = norm(f, z)
    kept, expected = cache["conv_y"], torch.nn.functional.interpolate(z, f.shape[2:])
    assert isinstance(kept, Later) and kept._make is not None
    z.zero_()  # the values are those at the time of the call
    assert torch.equal(kept, expected) and kept._make is None
    kept.add_(1)
    assert torch.equal(kept, expected + 1) and torch.equal(cache["conv_b"], expected)
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept)), kept.to(torch.float64)):
        assert type(twin) is torch.Tensor and torch.equal(twin.float(), expected + 1)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["conv_b"], expected)
    assert "tensor(" in repr(kept) and list(kept.shape) == [1, 4, 2, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "given,wanted",
    [
        ((3, 4, 5), (9, 8, 10)),
        ((3, 4, 5), (5, 7, 13)),
        ((2, 3, 3), (3, 9, 27)),
        ((2, 4, 3), (8, 4, 3)),
        ((1, 4, 3), (4, 8, 6)),
        ((1, 2, 2), (1, 6, 6)),
        ((3, 8, 8), (3, 8, 8)),
        ((5, 8, 8), (3, 4, 5)),
        ((4, 3, 3), (2, 9, 9)),
    ],
)
def test_all_sizes_of_latents_and_maps(given, wanted, dtype, calls):
    torch.manual_seed(0)
    own = cogvideox_norm().to(dtype)
    ours = copy.deepcopy(own)
    assert spade_fast.convert(ours).converted == 1
    calls.clear()
    f = torch.randn(2, 8, *wanted, dtype=dtype)
    z = torch.randn(2, 4, *given, dtype=dtype)

    def run(model, z):
        return model(f, zq=z)[0]

    assert_agree_beside(outcome(ours, z, run), outcome(own, z, run))
    assert calls.clear() == (1, 1)


@pytest.mark.parametrize("convolved", [False, True])
def test_the_norms_of_kvae(convolved, calls):
    """A 3×3 convolution of the enlarged latent does not commute with enlarging it."""
    from diffusers.models.autoencoders.autoencoder_kl_kvae import KVAEDecoderSpatialNorm2D

    torch.manual_seed(0)
    own = KVAEDecoderSpatialNorm2D(32, LATENT, convolved).double()
    ours = copy.deepcopy(own)
    (entry,) = spade_fast.convert(ours)
    assert entry.converted and entry.reason.startswith("pixels" if convolved else "voxels")
    calls.clear()
    f, z = torch.randn(2, 32, 8, 9).double(), torch.randn(2, LATENT, 4, 5).double()

    def run(model, z):
        return model(f, z)

    assert_agree_beside(outcome(ours, z, run), outcome(own, z, run))
    assert calls.clear() == (1, 1)


@pytest.mark.parametrize("convolved", [False, True])
def test_norms_that_read_and_write_a_dictionary(convolved, monkeypatch):
    """KVAE for videos: the second segment is resized otherwise than the first."""
    from diffusers.models.autoencoders.autoencoder_kl_kvae_video import KVAECachedSpatialNorm3D

    torch.manual_seed(0)
    own = KVAECachedSpatialNorm3D(32, LATENT, convolved).double()
    ours = copy.deepcopy(own)
    (entry,) = spade_fast.convert(ours)
    assert entry.converted and "with its modulation as one operation" in entry.reason
    fused, modulate = [], fuse.spade_modulate
    monkeypatch.setattr(fuse, "pays", lambda elements, is_slow: True)
    monkeypatch.setattr(
        fuse, "spade_modulate", lambda *given, **named: fused.append(1) or modulate(*given, **named)
    )
    f = torch.randn(2, 32, 10, 4, 4, dtype=torch.float64)

    def run(model, z):
        cache = {"norm": {}, "add_conv": {"padding": None}}
        segments = zip(f.split([5, 5], dim=2), z.split([3, 3], dim=2))
        return torch.cat([model(*segment, cache) for segment in segments], dim=2)

    z = torch.randn(2, LATENT, 6, 2, 2, dtype=torch.float64)
    assert_agree_beside(outcome(ours, z, run), outcome(own, z, run))
    assert len(fused) == 2


def test_a_norm_of_root_mean_squares_is_left_alone():
    from diffusers.models.autoencoders.autoencoder_kandinsky6_sr import Kandinsky6SRSpatialNorm3D

    norm = Kandinsky6SRSpatialNorm3D(8, LATENT)
    (entry,) = spade_fast.convert(norm)
    assert not entry.converted and "it has no norm of PyTorch's" in entry.reason
    assert type(norm) is Kandinsky6SRSpatialNorm3D


def test_one_latent_frame_for_an_odd_number_is_the_own_error():
    own, f, z = cogvideox_norm(), torch.randn(1, 8, 3, 4, 4), torch.randn(1, 4, 1, 2, 2)
    ours = copy.deepcopy(own)
    spade_fast.convert(ours)
    errors = []
    for norm in (own, ours):
        with pytest.raises(RuntimeError) as raised:
            norm(f, z)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["conv_y", "conv_y.conv", "norm_layer"])
def test_hooks_of_parts_see_their_calls(name):
    torch.manual_seed(0)
    own = cogvideox_norm()
    ours, seen = copy.deepcopy(own), []
    spade_fast.convert(ours)
    ours.get_submodule(name).register_forward_hook(lambda part, given, y: seen.append(part))
    f, z = torch.randn(1, 8, 2, 4, 4), torch.randn(1, LATENT, 2, 2, 2)
    assert_agree(ours(f, z), own(f, z))
    assert seen == [ours.get_submodule(name)]


def test_another_cache_goes_to_the_own_forward(calls):
    norm = cogvideox_norm()
    spade_fast.convert(norm)
    calls.clear()
    f, z = torch.randn(1, 8, 2, 4, 4), torch.randn(1, 4, 2, 2, 2)
    for cache in ({}, {"conv_y": torch.ones(1), "conv_b": torch.ones(1)}, {"conv_y": None}):
        norm(f, z, conv_cache=cache)
        assert calls.clear() == (1, list(cache) == ["conv_y", "conv_b"])


def test_lookups_are_shared_and_bounded(monkeypatch):
    norms = [movq_norm(), movq_norm()]
    for norm in norms:
        spade_fast.convert(norm)
    voxels._kept.clear()
    made, make = [], voxels._make
    monkeypatch.setattr(voxels, "_make", lambda *given: made.append(given) or make(*given))
    with torch.no_grad():
        for _, norm in zip(range(6), 3 * norms):
            norm(torch.randn(1, 32, 8, 8), torch.randn(1, LATENT, 4, 4))
        assert len(made) == 1
        for size in range(5, 30):
            norms[0](torch.randn(1, 32, size, size), torch.randn(1, LATENT, 4, 4))
        assert len(made) == 25 and len(voxels._kept) == voxels.MOST_KEPT
        monkeypatch.setattr(voxels, "MOST_BYTES", 4 * 31**2 + 4 * 29**2)
        norms[0](torch.randn(1, 32, 31, 31), torch.randn(1, LATENT, 4, 4))
    assert [sizes[1] for _, sizes, *_ in voxels._kept] == [(29, 29), (31, 31)]


def test_lookups_of_inference_mode_serve_training():
    norm = movq_norm()
    spade_fast.convert(norm)
    voxels._kept.clear()
    f, z = torch.randn(1, 32, 8, 8), torch.randn(1, LATENT, 4, 4)
    with torch.inference_mode():
        expected = norm(f, z)
    y = norm(f.requires_grad_(), z)
    y.sum().backward()
    assert_agree(y, expected)


def test_frozen(calls):
    norm = movq_norm()
    spade_fast.convert(norm)
    f, z = torch.randn(1, 32, 8, 8), torch.randn(1, LATENT, 4, 4)
    calls.clear()
    with torch.no_grad():
        expected = norm(f, z)
        with spade_fast.frozen(norm):
            assert torch.equal(norm(f, z), expected)
    assert calls.clear() == (2, 2)


def test_other_networks_of_diffusers_have_no_spade():
    import diffusers

    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    assert not spade_fast.convert(model)


def kept_bytes(run):
    """Bytes that a result's graph keeps, without the result."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        y = run()
    total = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    return total - y.nbytes


@pytest.mark.parametrize("inplace", [False, True])
def test_silu_and_convolution_keep_nothing(inplace):
    torch.manual_seed(0)
    own = torch.nn.ModuleDict({"norm": movq_norm(), "conv": torch.nn.Conv2d(32, 32, 3, padding=1)})
    own.double()
    ours = copy.deepcopy(own)
    spade_fast.convert(ours)
    silu = torch.nn.SiLU(inplace)
    f = torch.randn(1, 32, 32, 32, dtype=torch.float64)

    def run(model, z):
        return model["conv"](silu(model["norm"](f, z)))

    z = torch.randn(1, LATENT, 4, 4, dtype=torch.float64)
    assert_agree_beside(outcome(ours, z, run), outcome(own, z, run))
    kept = kept_bytes(lambda: run(ours, z))
    assert (kept < 0.1 * f.nbytes) != inplace  # f itself was there before


def test_second_derivatives_through_silu():
    torch.manual_seed(0)
    own = movq_norm().double()
    ours = copy.deepcopy(own)
    spade_fast.convert(ours)
    conv, found = torch.nn.Conv2d(32, 4, 3).double(), []
    f = torch.randn(1, 32, 6, 6, dtype=torch.float64, requires_grad=True)
    z = torch.randn(1, LATENT, 2, 2, dtype=torch.float64, requires_grad=True)
    for norm in (own, ours):
        y = conv(torch.nn.functional.silu(norm(f, z)))
        first = torch.autograd.grad(y.square().sum(), (f, z, conv.weight), create_graph=True)
        loss = sum(one.square().sum() for one in first)
        found.append((first, torch.autograd.grad(loss, (f, z, *norm.parameters()))))
    assert_agree_beside(found[1], found[0], **EXACT)


def test_what_is_written_to_is_not_computed_again():
    torch.manual_seed(0)
    own = movq_norm().double()
    ours = copy.deepcopy(own)
    spade_fast.convert(ours)
    conv, silu = torch.nn.Conv2d(32, 4, 3).double(), torch.nn.functional.silu
    f = torch.randn(1, 32, 6, 6, dtype=torch.float64)

    def run(norm, z):
        y = norm(f, z)
        y += 1
        hidden = silu(y)
        hidden *= 2
        return conv(torch.cat([hidden, hidden[:, :, :2]], dim=2))

    z = torch.randn(1, LATENT, 2, 2, dtype=torch.float64)
    assert_agree_beside(outcome(ours, z, run), outcome(own, z, run))
    f.requires_grad_()
    y = silu(ours(f * 1, z))
    moved = f * 1
    y = silu(ours(moved, z))
    moved.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["movq", "cogvideox"])
def test_compiled_without_graph_breaks(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    norm = {"movq": movq_norm, "cogvideox": cogvideox_norm}[name]().double()
    frames = (3,) if name == "cogvideox" else ()
    f = torch.randn(1, norm.norm_layer.num_channels, *frames, 8, 8, dtype=torch.float64)
    z = torch.randn(1, LATENT, *frames[:1], 4, 4, dtype=torch.float64)

    def run(model, z):
        return torch.utils._pytree.tree_leaves(model(f, z))[0]

    expected = outcome(norm, z, run)
    spade_fast.convert(norm)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    found = outcome(compiled, z, run)
    assert_agree_beside({name.removeprefix("_orig_mod."): found[name] for name in found}, expected)


def test_what_follows_a_norm_may_be_compiled_or_watched():
    torch._dynamo.reset()
    torch.manual_seed(0)
    own = movq_norm().double()
    ours = copy.deepcopy(own)
    spade_fast.convert(ours)
    following = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Conv2d(32, 4, 3)).double()
    compiled = torch.compile(following, backend="aot_eager")
    f = torch.randn(1, 32, 6, 6, dtype=torch.float64)
    z = torch.randn(1, LATENT, 2, 2, dtype=torch.float64)
    expected = outcome(own, z, lambda norm, z: following(norm(f, z)))
    assert_agree_beside(outcome(ours, z, lambda norm, z: compiled(norm(f, z))), expected)
    calls = []
    ours.register_full_backward_hook(lambda norm, *gradients: calls.append(norm))
    assert_agree_beside(outcome(ours, z, lambda norm, z: following(norm(f, z))), expected)
    assert calls == [ours]


def test_copies_and_pickles(cogvideox):
    _, ours = cogvideox
    norm = ours.decoder.norm_out
    f, z = torch.randn(1, 8, 3, 4, 4).double(), torch.randn(1, LATENT, 3, 2, 2).double()
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    for twin in (copy.deepcopy(norm), torch.load(file, weights_only=False)):
        assert isinstance(twin, Fast) and torch.equal(twin(f, z)[0], norm(f, z)[0])
