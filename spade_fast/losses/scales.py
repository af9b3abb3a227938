"""The results of a MultiscaleDiscriminator: for each scale, a list of its layers' results."""

import torch

Results = list[list[torch.Tensor]]


def halves(results: Results) -> tuple[Results, Results]:
    """The results for fakes and for reals, if the batch was fakes followed by as many reals.

    Errors: TypeError or ValueError if `results` is not a list of lists of tensors, or a batch is
    odd.
    """
    check_results("results", results)
    for tensor in (tensor for scale in results for tensor in scale):
        if tensor.dim() == 0 or len(tensor) % 2:
            raise ValueError(
                f"results has a tensor {list(tensor.shape)}; it should be [2N, …]: N fakes, then N"
                " reals"
            )
    fakes, reals = (
        [[tensor.tensor_split(2)[half] for tensor in scale] for scale in results]
        for half in range(2)
    )
    return fakes, reals


def check_results(name: str, results: Results) -> None:
    """Raises TypeError or ValueError unless `results` has the form described above."""
    if not isinstance(results, (list, tuple)) or not all(
        isinstance(scale, (list, tuple))
        and scale
        and all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in scale)
        for scale in results
    ):
        raise TypeError(
            f"{name} is {_kinds(results)}; it should be a list for each scale with its layers'"
            " results, floating-point tensors"
        )
    if not results or any(x.numel() == 0 for scale in results for x in scale):
        raise ValueError(f"{name} has no elements; it should have at least a scale and an image")


def check_alike(fakes: Results, reals: Results) -> None:
    """Raises unless both have the same scales, layers and shapes."""
    shapes = {}
    for name, results in {"fakes": fakes, "reals": reals}.items():
        check_results(name, results)
        shapes[name] = [[list(x.shape) for x in scale] for scale in results]
    if shapes["fakes"] != shapes["reals"]:
        raise ValueError(
            f"fakes has shapes {shapes['fakes']}; it should have those of reals, {shapes['reals']}"
        )


def _kinds(value):
    """The types in a value and in its nested lists."""
    if isinstance(value, (list, tuple)):
        return f"a list of {', '.join(dict.fromkeys(map(_kinds, value))) or 'nothing'}"
    return str(getattr(value, "dtype", type(value).__name__))
