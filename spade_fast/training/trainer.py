"""The training loop, in the user's hands: `for step in trainer.fit(batches)`."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.optim.lr_scheduler import LambdaLR

from ..data import Batch
from ..nn import SPADEGenerator
from ..optional import needed
from ..settings import Config
from .average import average
from .networks import check_norms, label_channels, make_networks
from .noise import Noise
from .randomness import random_states, set_random_states
from .step import Losses, Networks, discriminator_losses, generate, generator_losses


class Step(NamedTuple):
    """The results of a training step."""

    number: int  # counted from 1
    losses: Losses  # weighted scalars by name, on the device, of this process's images
    generated: torch.Tensor  # [N, 3, H, W], the last images that the step generated
    batch: Batch  # the batch that they were generated from


class Trainer:
    """Networks, optimizers and the state of a run, on the devices that Accelerate finds.

    Args:
        config: the settings; those of the run's folder and of reading the data are ignored.
        networks: the networks to train, called as Networks describes; None builds them from the
            settings.
        optimizers: one for generator and encoder, and one for the discriminator; None is Adam as
            the settings say.
        noise: returns standard normal numbers with the shape, dtype and device of its argument;
            None is `Noise` with the settings' seed.
        label_nc: the number of the condition's channels, if networks is None: by default classes,
            don't care, and instances' edges if `config.instances` is given.

    Attributes:
        networks: the networks that are trained.
        optimizers, schedules: for generator and encoder, and for the discriminator. Without
            `config.decay` there are no schedules, and learning rates stay as the user sets them.
        average: the running average of the generator, a torch.optim.swa_utils.AveragedModel.
        number: the number of steps taken.
        images: how many images each batch of this process should have.

    Raises:
        ValueError: the settings contradict the networks or the machine.
        ModuleNotFoundError: Accelerate is not installed.
    """

    def __init__(
        self,
        config: Config,
        networks: Networks | None = None,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer] | None = None,
        noise: Callable[[torch.Tensor], torch.Tensor] | None = None,
        label_nc: int | None = None,
    ) -> None:
        if config.steps is None:
            raise ValueError("steps is not given; it should be the number of steps of the run")
        self.config, self.steps, self.number = config, config.steps, 0
        self.accelerator = _accelerator(config.precision)
        self.images = self._images_of_a_batch()
        if networks is None:
            check_norms(config, self.images, self.accelerator.num_processes)
            label_nc = label_channels(config) if label_nc is None else label_nc
            networks = make_networks(config, label_nc)
        if config.recompute:
            if not isinstance(networks.generator, SPADEGenerator):
                raise ValueError(
                    f"generator is a {type(networks.generator).__name__}; it should be a"
                    " SPADEGenerator because recompute is on"
                )
            networks.generator.recompute = True
        self.networks = self._placed(networks)
        self.average = average(networks.generator, config.ema)
        optimizers = _optimizers(config, networks) if optimizers is None else optimizers
        self.schedules = [
            LambdaLR(optimizer, self._rate) for optimizer in optimizers if config.decay
        ]
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in optimizers]
        self.synchronised = Networks(  # processes exchange the gradients of these
            **{name: self._prepared(network) for name, network in networks.trained().items()}
        )
        if noise is None:
            noise = Noise(
                config.seed, self.accelerator.process_index, self.accelerator.num_processes
            )
        self.noise = noise

    def fit(self, batches: Iterable[Batch]) -> Iterator[Step]:
        """Takes the remaining steps, each when the iterator is advanced.

        batches: `config.accumulate` for each step, with `images` images each. If they run out, the
            loop ends early.
        """
        batches, wanted = iter(batches), self.config.accumulate
        while self.number < self.steps:
            parts = [
                batch.to(self.accelerator.device) for batch in itertools.islice(batches, wanted)
            ]
            if len(parts) < wanted:
                return
            yield self.step(parts)

    def step(self, parts: list[Batch]) -> Step:
        """One step of the discriminator, and one of the generator if it is its turn, with the mean
        gradients of all these batches.
        """
        updates_generator = self.number % self.config.discriminator_steps == 0
        if self.config.order == "published":
            losses = self._generator_step(parts) if updates_generator else {}
            fakes, judged = self._discriminator_step(parts)
        else:
            generated = self._generate(parts[0], updates_generator)
            fakes, judged = self._discriminator_step(parts, generated[0])
            losses = self._generator_step(parts, generated) if updates_generator else {}
        self.number += 1
        for schedule in self.schedules:
            schedule.step()
        return Step(self.number, losses | judged, fakes, parts[-1])

    def _generator_step(self, parts, generated=None):
        """A step of generator and encoder; `generated` is the result of `_generate` for the only
        part, if there is one already.
        """
        optimizer, found = self.optimizers[0], []
        optimizer.zero_grad()
        for number, batch in enumerate(parts):
            with self._sums_gradients(number, len(parts), "generator", "encoder"):
                fakes, losses = generated or self._generate(batch, True)
                with self.accelerator.autocast():
                    losses = losses | generator_losses(
                        self.networks, self.config, batch.layout, fakes, batch.images
                    )
                self._backward(losses, len(parts))
            found.append(losses)
        optimizer.step()
        self.average.update_parameters(self.networks.generator)
        return _mean(found)

    def _discriminator_step(self, parts, fakes=None):
        """The images that were judged last, and the losses; if `fakes` is None, images are new."""
        optimizer, found, given = self.optimizers[1], [], fakes
        optimizer.zero_grad()
        for number, batch in enumerate(parts):
            fakes = self._generate(batch, False)[0] if given is None else given.detach()
            with self._sums_gradients(number, len(parts), "discriminator"):
                with self.accelerator.autocast():
                    losses = discriminator_losses(
                        self.synchronised, self.config, batch.layout, fakes, batch.images
                    )
                self._backward(losses, len(parts))
            found.append(losses)
        optimizer.step()
        return fakes, _mean(found)

    def _generate(self, batch, with_gradients):
        networks = self.synchronised if with_gradients else self.networks
        with torch.set_grad_enabled(with_gradients), self.accelerator.autocast():
            fakes, losses = generate(networks, batch.layout, batch.images, self.noise)
        # The divergence is a sum over images, but processes and parts are averaged.
        weight = self.config.weight_kl * self.accelerator.num_processes * self.config.accumulate
        return fakes, {name: weight * loss for name, loss in losses.items()}

    def _backward(self, losses, parts):
        self.accelerator.backward(sum(losses.values()) / parts)

    @contextlib.contextmanager
    def _sums_gradients(self, number, parts, *names):
        """Inside, processes exchange gradients only if this is the last part."""
        with contextlib.ExitStack() as stack:
            if number < parts - 1:
                for name in names:
                    network = getattr(self.synchronised, name)
                    if network is not None:
                        stack.enter_context(self.accelerator.no_sync(network))
            yield

    def _rate(self, step):
        """The factor of the learning rates after this many steps: 1, then falling linearly to 0 at
        the end of the run.
        """
        falling = self.config.decay * self.steps
        return min(1.0, (self.steps - step) / falling) if falling else 1.0

    def _images_of_a_batch(self):
        processes, parts = self.accelerator.num_processes, self.config.accumulate
        images, rest = divmod(self.config.batch, processes * parts)
        if rest:
            raise ValueError(
                f"batch is {self.config.batch}; it should be a multiple of the processes times"
                f" accumulate, {processes} · {parts}"
            )
        return images

    def _placed(self, networks):
        device = self.accelerator.device
        for network in (*networks.trained().values(), networks.perceptual):
            if network is not None:
                network.to(device)
                if device.type == "cuda":  # else convolutions convert weights in each call
                    network.to(memory_format=torch.channels_last)
        for network in networks.trained().values():
            network.train()
        return networks

    def _prepared(self, network):
        own = {name: vars(network).get(name) for name in ("forward", "_original_forward")}
        with _accepted_on_a_cpu(network, self.accelerator.device):
            prepared = self.accelerator.prepare(network)
        # Removes the autocast that Accelerate wraps around forward: a step has its own, and a
        # network with a replaced forward would not count as called plainly.
        for name, value in own.items():
            vars(network).pop(name, None)
            if value is not None:
                setattr(network, name, value)
        return prepared

    def mean(self, losses: Losses) -> dict[str, float]:
        """A step's losses by name, averaged over processes; all processes have to call this."""
        if not losses:
            return {}
        values = torch.stack([loss.detach() for loss in losses.values()])
        values = self.accelerator.reduce(values, "mean").tolist()
        return dict(zip(losses, values))

    def seed(self) -> None:
        """Seeds the random numbers of Python, NumPy and torch with the settings' seed, for networks
        and data sets that use them.
        """
        from accelerate.utils import set_seed

        set_seed(self.config.seed)

    def gathered(self, value: Any) -> list:
        """The values of all processes, returned in each of them."""
        from accelerate.utils import gather_object

        return gather_object([value])

    def state_dict(self) -> dict:
        """Everything that the next steps depend on, in types that torch.load accepts with
        weights_only. All processes have to call this.
        """
        scaler = self.accelerator.scaler
        return {
            "number": self.number,
            "networks": {
                name: network.state_dict() for name, network in self.networks.trained().items()
            },
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "scaler": None if scaler is None else scaler.state_dict(),
            "noise": self.noise.state_dict() if hasattr(self.noise, "state_dict") else None,
            "random": self.gathered(random_states()),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores a state, to continue from its step.

        Errors: ValueError if the state belongs to other networks. Some of it may then have been
            loaded.
        """
        networks = self.networks.trained()
        if set(networks) != set(state["networks"]):
            raise ValueError(
                f"the state has the networks {', '.join(state['networks'])}; it should have those"
                f" of this run, {', '.join(networks)}"
            )
        try:
            for name, network in networks.items():
                network.load_state_dict(state["networks"][name])
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()  # after the network's name
            raise ValueError(f"the state belongs to another {name} than this: {first}") from None
        self.average.load_state_dict(state["average"])
        for own, found in zip(self.optimizers, state["optimizers"], strict=True):
            own.load_state_dict(found)
        for own, found in zip(self.schedules, state["schedules"], strict=True):
            own.load_state_dict(found)
            for group, rate in zip(own.optimizer.param_groups, own.base_lrs):
                group["lr"] = rate * self._rate(state["number"])  # for this run's number of steps
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if state["noise"] is not None:
            noise: Any = self.noise  # of the type that the state was saved from
            noise.load_state_dict(state["noise"])
        rank = self.accelerator.process_index
        if rank < len(state["random"]):
            set_random_states(state["random"][rank])
        self.number = state["number"]


def _accelerator(precision):
    accelerate = needed("accelerate", "training", "'spade_fast[train]'")
    # Otherwise the precision of the process's first trainer would stay.
    accelerate.state.AcceleratorState._reset_state()
    # Buffers need no exchange: spectral vectors follow from the weights, and running statistics are
    # those of all images, except with batch norm, where each process has its own.
    handlers = [accelerate.DistributedDataParallelKwargs(broadcast_buffers=False)]
    accelerator = accelerate.Accelerator(
        mixed_precision=precision,
        kwargs_handlers=handlers,
        cpu=not torch.accelerator.is_available(),  # otherwise each process believes it is alone
    )
    if precision == "fp16" and accelerator.device.type == "cpu":  # it would train in float32
        raise ValueError(f"precision is {precision!r}; it should be bf16 or no on a CPU")
    return accelerator


@contextlib.contextmanager
def _accepted_on_a_cpu(network, device):
    """Inside, SyncBatchNorms on a CPU look like BatchNorms to DistributedDataParallel. It refuses
    them there because PyTorch's SyncBatchNorm has no CPU kernel; this package has one.
    """
    norms: list[nn.Module] = [
        module
        for module in network.modules()
        if device.type == "cpu" and type(module) is nn.SyncBatchNorm
    ]
    for norm in norms:
        norm.__class__ = nn.BatchNorm2d
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.SyncBatchNorm


def _optimizers(config, networks):
    """Adam with a learning rate for each side (Heusel et al. 2017)."""
    of_generator = list(networks.generator.parameters())
    if networks.encoder is not None:
        of_generator += networks.encoder.parameters()
    betas = (config.beta1, config.beta2)
    return (
        torch.optim.Adam(of_generator, config.lr_generator, betas, fused=True),
        torch.optim.Adam(
            networks.discriminator.parameters(), config.lr_discriminator, betas, fused=True
        ),
    )


def _mean(found):
    """The losses of a step, the means of its parts' losses."""
    if len(found) == 1:
        return {name: loss.detach() for name, loss in found[0].items()}
    return {name: sum(losses[name].detach() for losses in found) / len(found) for name in found[0]}
