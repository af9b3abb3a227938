"""The case `export`: networks in ONNX Runtime."""

import copy
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch

import spade_fast
from spade_fast import SemanticLayout, reference
from spade_fast.export.files import quiet

from .. import layouts
from .converted import FaceDecoder
from .monai import nets_and_schedulers
from .networks import COCO_NORM, flat, settle
from .problem import FORWARD, Problem, jitter, name_of, plan_of
from .scenes import label_maps, scene_size


def export(settings):
    """Networks in ONNX Runtime: as torch.onnx.export writes them, and as spade_fast.export does.
    They are the published generator from label maps, LivePortrait's decoder of features, and
    MONAI's generator of volumes.
    """
    if settings.device != "cpu" or settings.dtype != torch.float32:
        raise ValueError(
            f"the case export is for float32 on the CPU, not {settings.dtype} on {settings.device}"
        )
    settings = dataclasses.replace(settings, batch=1)  # one scene or volume at a time
    size, ngf = scene_size(settings), 8 if settings.quick else 64
    volume, channels = (32, (8, 16)) if settings.quick else (96, (16, 32, 64))

    def generator():
        network = reference.SPADEGenerator(184, ngf, crop_size=size, norm_G=COCO_NORM)
        ours = spade_fast.SPADEGenerator.official(184, ngf=ngf, crop_size=size, norm_G=COCO_NORM)
        scenes = []
        for maps in label_maps(settings, (size, size)):
            labels = [torch.from_numpy(one.astype(np.int64))[None] for one in maps]
            scenes.append(((layouts.condition(*maps),), labels))
        return network, ours, None, scenes, {"instances": True, "dont_care": 255}

    def decoder():
        network = FaceDecoder(*((16, 8, 8) if settings.quick else (512, 256, 64)))
        pixels = [8 if settings.quick else 64] * 2
        scenes = []
        for _ in range(settings.scenes):
            features = torch.randn(1, network.fc.in_channels, *pixels)
            scenes.append(((features,), [features]))
        return network, network, scenes[0][0], scenes, {}

    def volumes():
        nets, _ = nets_and_schedulers()
        network = nets.SPADENet(3, 1, 1, 8, [volume] * 3, list(channels), 16, False)
        labels = [layouts.draw_volume(number, volume)[None] for number in range(settings.scenes)]
        found = [SemanticLayout.from_labels(one, 8) for one in labels]
        scenes = [
            ((layout.to_segmap(),), [torch.as_tensor(one).long()])
            for layout, one in zip(found, labels)
        ]
        return network, network, (found[0],), scenes, {}

    problems = {
        f"COCO {size}²": generator,
        "LivePortrait's decoder": decoder,
        f"SPADENet {volume}³": volumes,
    }
    for name, make in problems.items():
        yield plan_of(export_problem, settings, name_of(settings, name), FORWARD, make)


def export_problem(settings, name, mode, make):
    """The problem of a network in ONNX Runtime. Our results there are within 1e-4 of eager's,
    relative to the largest value. ONNX Runtime rounds more than PyTorch in the instance norms of
    volumes, so what torch.onnx.export writes is a yardstick of the allowed error, too.

    make: returns the network; ours with the same weights; the example to export it with, or None;
    the scenes, each with the network's arguments and our exported network's inputs; and further
    arguments of `export`.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModuleNotFoundError(
            "the case export needs three packages: pip install onnx onnxscript onnxruntime"
            f" ({error})"
        ) from error
    torch.manual_seed(0)
    network, ours, example, scenes, arguments = make()
    settle(network).eval().requires_grad_(False)
    if ours is not network:
        ours.load_state_dict(network.state_dict())
    exact = copy.deepcopy(network).double()

    def session(path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def variant(write, inputs_of, is_ours=True):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "network.onnx")
            write(path)
            loaded = session(path)
        names, compared = [one.name for one in loaded.get_inputs()], set()

        def run():
            given = dict(zip(names, (one.numpy() for one in inputs_of()), strict=True))
            y = torch.from_numpy(loaded.run(None, given)[0])
            if is_ours and problem.scene not in compared:  # in the first call, which is not timed
                compared.add(problem.scene)
                expected = eager()["y"]
                apart = ((y - expected).abs().max() / expected.abs().max()).item()
                if not apart <= 1e-4:
                    raise ValueError(f"y is {apart:.1e} from eager's, it should be 1e-4 at most")
            return {"y": y}

        return run

    def plain(path):
        with quiet():
            torch.onnx.export(network, scenes[0][0], path, dynamo=True, verbose=False)

    def by_us(windows):
        return lambda path: spade_fast.export(ours, path, example, windows=windows, **arguments)

    def eager(network=network, change=lambda tensor: tensor):
        return {"y": flat(network(*map(change, scenes[problem.scene][0])))[0]}

    makers = {
        "eager": lambda: eager,
        "ONNX Runtime": lambda: variant(plain, lambda: scenes[problem.scene][0], False),
        "spade_fast, ONNX Runtime": lambda: variant(by_us(True), lambda: scenes[problem.scene][1]),
    }
    if scenes[0][1][0].dtype == torch.int64:
        makers["spade_fast, ONNX Runtime, pixels"] = lambda: variant(
            by_us(False), lambda: scenes[problem.scene][1]
        )

    def jittered(number):
        rival = problem.variants.get("ONNX Runtime")
        return eager(change=jitter) if number % 2 or rival is None else rival()

    problem = Problem(
        name,
        mode,
        settings.wanted(makers),
        lambda: eager(exact, torch.Tensor.double),
        jittered,
        scenes=scenes,
    )
    return problem
