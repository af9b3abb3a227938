"""Arguments of the networks' constructors: invalid sizes are refused, and a network has the size
that was asked for.
"""

import numpy as np
import pytest
import torch

from spade_fast import ConvEncoder, MultiscaleDiscriminator, SPADEGenerator
from spade_fast.arguments import whole_number
from spade_fast.nn.config import dimensions
from spade_fast.nn.generator import official_arguments

official = SPADEGenerator.official
TINY = {"ngf": 2, "nhidden": 2}


@pytest.mark.parametrize("number", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers(number):
    assert whole_number("size", number) == 3 and type(whole_number("size", number)) is int
    assert dimensions(number) == 3


@pytest.mark.parametrize("number", [0, -1, True, np.True_, 3.0, np.float32(3), "3", None, [3], {}])
def test_values_that_are_not_whole_numbers(number):
    is_whole = type(number) is int
    error, words = (ValueError, "1 or more") if is_whole else (TypeError, "a whole number")
    for make in (
        lambda size: whole_number("size", size, least=1),
        lambda size: ConvEncoder(size),
        lambda size: ConvEncoder(1, 1, input_nc=size),
        lambda size: MultiscaleDiscriminator(3, n_layers=size),
        lambda size: MultiscaleDiscriminator(size),
        lambda size: SPADEGenerator(size),
        lambda size: SPADEGenerator(3, last_scale=size),
        lambda size: official(3, use_vae=True, z_dim=size),
        lambda size: official(3, nhidden=size),
    ):
        with pytest.raises(error, match=rf"\w+ is .*; it should be {words}"):
            make(number)
    words = "1, 2 or 3" if is_whole else words
    with pytest.raises(error, match=f"spatial_dims is .*; it should be {words}"):
        MultiscaleDiscriminator(3, spatial_dims=number)


def test_minimum_values():
    assert whole_number("size", 0, least=0) == 0 and whole_number("size", -1) == -1
    with pytest.raises(ValueError, match="size is -1; it should be 0 or more"):
        whole_number("size", -1, least=0)


@pytest.mark.parametrize("layers,doublings", [("normal", 5), ("more", 6), ("most", 7)])
@pytest.mark.parametrize("aspect_ratio", [1, 2.0, 0.5, 4 / 3, 1.5])
def test_an_official_generator_has_the_asked_size_or_names_possible_ones(
    layers, doublings, aspect_ratio
):
    """For sizes near the smallest possible ones."""
    made = []
    for width in range(1, 9):
        for crop_size in ((width << doublings) - 4, width << doublings, (width << doublings) + 1):
            settings = {"num_upsampling_layers": layers, "aspect_ratio": aspect_ratio}
            try:
                start = official_arguments(3, crop_size=crop_size, **settings)["start"]
            except ValueError as error:
                assert f"crop_size is {crop_size}, but with {doublings} doublings" in str(error)
                proposed = str(error).rpartition("should be ")[2].replace(",", "").split()
                for size in filter(str.isdigit, proposed):
                    start = official_arguments(3, crop_size=int(size), **settings)["start"]
                    assert start[1] << doublings == int(size)
                continue
            size = tuple(length << doublings for length in start)
            assert size == (round(crop_size / aspect_ratio), crop_size)
            made.append(crop_size)
    assert made and all(size % (1 << doublings) == 0 for size in made)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"crop_size": 100}, r"96 × 96 pixels would be made, not 100 × 100: .* be 96 or 128"),
        ({"crop_size": 96, "aspect_ratio": 2}, "64 × 96 pixels would be made, not 48 × 96"),
        ({"crop_size": 256, "aspect_ratio": 1.37}, "crop_size should be 1184"),
        ({"crop_size": 16, "aspect_ratio": 1.5}, "it should be 96 or more"),
        ({"crop_size": 0}, "crop_size is 0; it should be 1 or more"),
        ({"aspect_ratio": 0}, "aspect_ratio is 0; it should be a positive number"),
        ({"aspect_ratio": float("nan")}, "aspect_ratio is nan"),
        ({"aspect_ratio": "2"}, "aspect_ratio is '2'"),
        ({"num_upsampling_layers": ""}, "num_upsampling_layers is ''"),
        ({"num_upsampling_layers": ["more"]}, "num_upsampling_layers is \\['more'\\]"),
    ],
)
def test_impossible_official_sizes(settings, message):
    with pytest.raises(ValueError, match=message):
        official(184, **settings, **TINY)
    with pytest.raises(TypeError, match="crop_size is 256.0; it should be a whole number"):
        official(184, crop_size=256.0, **TINY)


@pytest.mark.parametrize("dataset", [True, 0, 3.0, None, ["coco"], "voc"])
def test_unknown_datasets(dataset):
    with pytest.raises(
        ValueError, match="dataset is .*; it should be coco, ade20k, cityscapes, or"
    ):
        official(dataset)


@pytest.mark.parametrize(
    "stages,message",
    [
        ([], "stages should be blocks"),
        (3, "stages should be blocks"),
        ([("a", 16)], "stages should be blocks"),
        ([("a", 16, 2), ("a", 8, 2)], "two parts have the name a"),
        ([("fc", 16, 2)], "two parts have the name fc"),
        ([("a.b", 16, 2)], "a block's name is 'a.b'"),
        *(
            ([(name, 16, 2)], f"a block's name is '{name}'; it should not be that of an attribute")
            for name in ("forward", "sizes", "training", "ngf", "kernel_size", "arguments")
        ),
        ([("a", 16, 0)], "the block a's scale is 0; it should be 1 or more"),
        ([("a", 1.25, 1)], "ngf is 2, the block a of 1.25 · ngf channels should have a whole"),
    ],
)
def test_stages_that_are_not_blocks(stages, message):
    with pytest.raises(ValueError, match=message):
        SPADEGenerator(3, 4, stages=stages, **TINY)


@pytest.mark.parametrize("start", ["44", 4.0, 0, True, (4, True), (4,), (), [4, 0], np.array(4)])
def test_a_start_that_is_not_a_size(start):
    with pytest.raises(ValueError, match="start is .*; it should be a positive whole number, or 2"):
        SPADEGenerator(3, 4, start=start, **TINY)


def test_discriminators_of_other_depths_are_the_published_ones():
    """Including the limit of 512 channels, as in the published `NLayerDiscriminator`."""
    with torch.device("meta"):
        network = MultiscaleDiscriminator(7, 1, 128, n_layers=5)
    shapes = [
        list(layer.weight_orig.shape[:2])
        for layer in network.modules()
        if hasattr(layer, "weight_orig")
    ]
    assert shapes == [[256, 128], [512, 256], [512, 512], [512, 512]]
    assert [len(list(network(torch.zeros(1, 7, 64, 64, device="meta"))[0]))] == [6]
