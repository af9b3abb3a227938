"""The arguments that a network was made with, which its weights do not say: the network remembers
them, and so does every state_dict of it.
"""

import copy

import torch.nn as nn

from .modules import BATCH_NORMS, NOT_MARKED, PLAIN

ENTRY = "spade_fast"  # in a state_dict's metadata, of the module whose arguments it has
# The names under which torch's wrappers have a module that they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# What makes no other network of a module: where it runs, and how it uses memory.
NOT_SETTINGS = {*NOT_MARKED, "arguments", "made_with", "process_group", "inplace", "recompute"}
NEITHER = object()  # is equal to no setting
BATCH_NORM_TYPES = (*BATCH_NORMS.values(), nn.SyncBatchNorm)  # which keep the same numbers


def remember(network: nn.Module, arguments: dict) -> None:
    """Makes `arguments`, plain values as JSON has them, an attribute of a network that has just
    been made, and puts them into the metadata of every state_dict that is made of it, alone or
    within other modules. One that is an attribute of the network, too, is there as it is then.
    Where something in the network is no longer as the arguments make it, "changed" says what.

    torch.save writes that metadata and `load_state_dict` passes over what it does not know in it.
    """
    vars(network).update(arguments=arguments, made_with=_settings(network))
    network.register_state_dict_post_hook(_describe)


def _describe(network, state_dict, prefix, local_metadata):
    kind = type(network)
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    local_metadata[ENTRY] = {
        "network": kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}",
        "arguments": {
            name: _as_json(getattr(network, name, value))
            for name, value in network.arguments.items()
        },
    }
    if ours and (changed := _changes(network)):
        local_metadata[ENTRY]["changed"] = changed


def _as_json(value):
    if isinstance(value, (list, tuple)):
        return [_as_json(part) for part in value]
    return copy.deepcopy(value)


def _changes(network):
    """What differs from the network that was made, in words; its arguments may."""
    own, changes = _settings(network), []
    for name, (kind, settings) in network.made_with.items():
        label = name or type(network).__name__
        if name not in own:
            changes.append(f"{label} is not there any more")
            continue
        kind_now, settings_now = own[name]
        if not issubclass(kind_now, kind) and not {kind, kind_now} <= {*BATCH_NORM_TYPES}:
            changes.append(f"{label} is a {kind_now.__name__}, it was made as a {kind.__name__}")
            continue
        changes += [
            f"{label}.{key} is {settings_now.get(key)!r}, it was made as {value!r}"
            for key, value in settings.items()
            if settings_now.get(key, NEITHER) != value and (name or key not in network.arguments)
        ]
    return changes + [f"{name} was added" for name in own if name not in network.made_with]


def _settings(network):
    """The class and the plain attributes of each module, by name, whatever wraps it."""
    found = {}
    for name, module in network.named_modules():
        if not any(wrapped in module._modules for wrapped in WRAPPED):
            steps = [step for step in name.split(".") if step not in WRAPPED]
            plain = {
                key: value
                for key, value in vars(module).items()
                if key not in NOT_SETTINGS and _is_plain(value)
            }
            tensors = sorted([*module._parameters, *module._buffers])
            found[".".join(steps)] = type(module), plain | {"tensors": tensors}
    return found


def _is_plain(value):
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in PLAIN
