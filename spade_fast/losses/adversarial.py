"""Adversarial losses over the discriminator's scales.

Each kind is a function of x, the last layer's result at one place: the larger x is, the more the
discriminator takes that place for real. The loss is the function's mean over the places and images
of a scale, and then the mean over the scales, as in the published code: a large scale counts as
much as a small one. float16 and bfloat16 are summed in float32.
"""

import torch
import torch.nn.functional as F

from ..kernels.contract import sum_dtype
from .scales import Results, check_results


def hinge(x: torch.Tensor, real: bool) -> torch.Tensor:
    """max(0, 1 − x) of reals, max(0, 1 + x) of fakes (Lim and Ye 2017; Miyato et al. 2018)."""
    return F.relu(1 - x if real else 1 + x)


def least_squares(x: torch.Tensor, real: bool) -> torch.Tensor:
    """(x − 1)² of reals, x² of fakes (Mao et al. 2017)."""
    return (x - 1 if real else x).square()


def non_saturating(x: torch.Tensor, real: bool) -> torch.Tensor:
    """Binary cross-entropy of sigmoid(x): log(1 + exp(−x)) of reals, log(1 + exp(x)) of fakes
    (Goodfellow et al. 2014).
    """
    return F.softplus(-x if real else x)


def wasserstein(x: torch.Tensor, real: bool) -> torch.Tensor:
    """−x of reals, x of fakes (Arjovsky et al. 2017), without a penalty."""
    return -x if real else x


KINDS = {
    "hinge": hinge,
    "least_squares": least_squares,
    "non_saturating": non_saturating,
    "wasserstein": wasserstein,
}
OTHER_NAMES = {"ls": "least_squares", "original": "non_saturating", "w": "wasserstein"}


def check_kind(kind: str) -> str:
    """The name in KINDS of a kind, which may also be given by its name in the published options.
    Errors: ValueError.
    """
    name = OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else None
    if name not in KINDS:
        others = ", ".join(f"{other} for {own}" for other, own in OTHER_NAMES.items())
        raise ValueError(f"kind is {kind!r}; it should be one of {', '.join(KINDS)} ({others})")
    return name


def for_generator(results: Results, kind: str = "hinge") -> torch.Tensor:
    """The generator's loss, a scalar, which is small if the discriminator takes fakes for real: the
    kind's function of reals, applied to the fakes' results. For the hinge it is −x without a bound
    (Lim and Ye 2017), as for "wasserstein".

    Args:
        results: for each scale, a list of its layers' results for fakes. Only the last layer's is
            used: [N, 1, *size].
        kind: one of KINDS.

    Raises:
        ValueError, TypeError: an argument is not as described above; the message names it.
    """
    name = check_kind(kind)
    return _mean("results", results, wasserstein if name == "hinge" else KINDS[name], real=True)


def for_discriminator(
    fakes: Results, reals: Results, kind: str = "hinge"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The discriminator's two losses, scalars, for taking fakes for fake and reals for real. The
    discriminator minimises their sum.

    Arguments and errors are as for `for_generator`.
    """
    loss = KINDS[check_kind(kind)]
    return _mean("fakes", fakes, loss, real=False), _mean("reals", reals, loss, real=True)


def _mean(name, results, loss, real):
    """The mean over the scales of each scale's mean loss."""
    check_results(name, results)
    last = [scale[-1].to(sum_dtype(scale[-1].dtype)) for scale in results]
    return torch.stack([loss(x, real).mean() for x in last]).mean()
