"""The case `spatial`: diffusers' decoders and norms, before and after `spade_fast.convert`."""

import dataclasses
import functools
import itertools

import torch
import torch.nn as nn

from .networks import converted_problem, flat, with_converted
from .problem import BACKWARD, FORWARD, name_of, plan_of


def spatial(settings):
    """Decoders of diffusers whose norms are conditioned by the latent, before and after
    `spade_fast.convert`: MoVQ's and CogVideoX's as published, but with fewer channels; and the last
    norm of each alone.
    """
    settings = dataclasses.replace(settings, batch=1)  # one image or video at a time

    @functools.lru_cache(1)  # shared by both modes
    def networks_of(make):
        torch.manual_seed(0)
        return with_converted(make())

    def build(settings, name, mode, make, latent):
        pair = networks_of(make)
        torch.manual_seed(0)
        latents = [torch.randn(1, *latent) for _ in range(settings.scenes)]
        return converted_problem(settings, name, mode, pair, latents, counts_kept=True)

    def build_norm(settings, name, mode, make, latent, shape):
        pair = networks_of(make)
        torch.manual_seed(0)
        x = torch.randn(1, *shape).requires_grad_(mode == BACKWARD)
        latents = [torch.randn(1, *latent) for _ in range(settings.scenes)]
        return converted_problem(
            settings,
            name,
            mode,
            pair,
            latents,
            (x,),
            lambda norm, z, x: flat(norm(x, z))[0],
            counts_kept=True,
        )

    side, width, narrow = (8, 32, 8) if settings.quick else (32, 32, 32)
    half = side // 2 if settings.quick else 12
    networks = [
        (f"MoVQ {8 * side}²", lambda: _Decoding(_movq(width)), (4, side, side)),
        (f"CogVideoX 9 × {8 * half}²", lambda: _Decoding(_cogvideox(narrow)), (16, 3, half, half)),
    ]
    norms = [
        (
            f"MoVQ's norm, {width} × {8 * side}²",
            lambda: _movq(width).decoder.conv_norm_out,
            (4, side, side),
            (width, 8 * side, 8 * side),
        ),
        (
            f"CogVideoX's norm, {narrow} × 9 × {8 * half}²",
            lambda: _cogvideox(narrow).decoder.norm_out,
            (16, 3, half, half),
            (narrow, 9, 8 * half, 8 * half),
        ),
    ]
    for build_one, problems in ((build, networks), (build_norm, norms)):
        for (name, *given), mode in itertools.product(problems, (FORWARD, BACKWARD)):
            yield plan_of(build_one, settings, name_of(settings, name), mode, *given)


class _Decoding(nn.Module):
    """An autoencoder of diffusers that decodes, without its encoder."""

    def __init__(self, autoencoder):
        super().__init__()
        for name in ("encoder", "quant_conv", "quantize"):
            if hasattr(autoencoder, name):
                setattr(autoencoder, name, None)
        self.autoencoder = autoencoder
        is_quantised = hasattr(autoencoder, "quantize")
        self.settings = {"force_not_quantize": True} if is_quantised else {}

    def forward(self, z):
        return self.autoencoder.decode(z, **self.settings, return_dict=False)[0]


def _movq(width):
    """MoVQ's autoencoder, whose published width is 128."""
    return _diffusers().VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        block_out_channels=(width, 2 * width, 2 * width, 4 * width),
        layers_per_block=2,
        latent_channels=4,
        num_vq_embeddings=8,
        norm_type="spatial",
    )


def _cogvideox(width):
    """CogVideoX's autoencoder, whose published width is 128, with as many channels in a group."""
    return _diffusers().AutoencoderKLCogVideoX(
        block_out_channels=(width, 2 * width, 2 * width, 4 * width),
        norm_num_groups=width // 4,
    )


def _diffusers():
    try:
        import diffusers
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the case spatial needs diffusers: pip install diffusers ({error})"
        ) from error
    return diffusers
