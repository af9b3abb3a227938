"""How the discriminator judges images in a generator's step."""

import torch
import torch.nn as nn

from ..layout import SemanticLayout
from ..nn import MultiscaleDiscriminator
from ..nn.discriminator import PatchDiscriminator
from ..nn.modules import CONVOLUTION_TYPES, INSTANCE_NORMS, MAKERS, hooks, is_called_plainly
from ..nn.normalised import NormalisedConvolution
from ..nn.spade import batch_of
from ..nn.twin import twin
from ..recording import is_recorded

# The modules whose result for an image depends on that image and the weights alone.
OF_EACH_IMAGE = (
    MultiscaleDiscriminator,
    PatchDiscriminator,
    NormalisedConvolution,
    nn.Sequential,
    nn.LeakyReLU,
    *CONVOLUTION_TYPES,
    *INSTANCE_NORMS.values(),
)


def judge(
    discriminator: nn.Module,
    fakes: torch.Tensor,
    reals: torch.Tensor,
    layout: SemanticLayout | torch.Tensor,
) -> tuple[list, list]:
    """The discriminator's results for fakes and for reals, as if both were one batch, in a step of
    the generator: gradients flow from the results to the fakes, and not to the reals.

    A discriminator that judges each image by itself, as this package's does, first judges the reals
    and keeps nothing for their backward, then the fakes, and its own parameters get no gradients.
    In train mode spectral norm does one power iteration, as for one batch. Any other discriminator,
    and one that is wrapped (DistributedDataParallel), has hooks or is being recorded, is called
    once, with fakes and reals in one batch, and its parameters get gradients, too.

    Args:
        discriminator: called as discriminator(images, layout), returns tensors with a row for each
            image, in lists or tuples.
        fakes, reals: images of the same shape, [M, channels, *spatial].
        layout: the condition of both, of N images; M is a multiple of N.

    Raises:
        TypeError, ValueError: fakes, reals or layout is not as described above; the message names
            it.
    """
    for name, images in {"fakes": fakes, "reals": reals}.items():
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"{name} is a {type(images).__name__}; it should be a tensor of images")
    if not isinstance(layout, (torch.Tensor, SemanticLayout)):
        raise TypeError(
            f"layout is a {type(layout).__name__}; it should be a SemanticLayout or a tensor"
        )
    if fakes.shape != reals.shape:
        raise ValueError(
            f"fakes has shape {list(fakes.shape)}; it should be that of reals, {list(reals.shape)}"
        )
    conditions = batch_of(layout)
    if conditions == 0 or len(fakes) % conditions:
        raise ValueError(
            f"fakes has {len(fakes)} images; it should have a multiple of layout's {conditions}"
        )
    compiled = torch.compiler.is_compiling()
    if compiled or is_recorded(fakes, reals) or not judges_each_image(discriminator):
        results = discriminator(torch.cat([fakes, reals]), layout)
        return _part(results, slice(len(fakes))), _detached(_part(results, slice(len(fakes), None)))
    with torch.no_grad():
        of_reals = discriminator(reals, layout)
    return _without_gradients(discriminator)(fakes, layout), of_reals


def judges_each_image(discriminator: nn.Module) -> bool:
    """Whether a discriminator is this package's, with its modules unchanged and no hooks on them.
    Then each image's results do not depend on the rest of its batch.
    """
    return type(discriminator) is MultiscaleDiscriminator and all(
        type(part) in OF_EACH_IMAGE
        and is_called_plainly(part)
        and all(isinstance(hook, MAKERS) for hook in hooks(part))
        and not getattr(part, "track_running_stats", False)
        for part in discriminator.modules()
    )


def _without_gradients(discriminator):
    """A twin of the discriminator, whose spectral vectors stay as they are and whose parameters get
    no gradients.
    """
    other = twin(discriminator).eval()
    for part in other.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = None if parameter is None else parameter.detach()
    return other


def _part(results, rows):
    """The given rows of every tensor."""
    if isinstance(results, torch.Tensor):
        return results[rows]
    return [_part(result, rows) for result in results]


def _detached(results):
    if isinstance(results, torch.Tensor):
        return results.detach()
    return [_detached(result) for result in results]
