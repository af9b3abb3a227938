"""The arguments that a network was built with, kept in the network and in each of its state_dicts,
because weights alone do not determine them.
"""

import copy

import torch.nn as nn

from .modules import BATCH_NORMS, NOT_MARKED, PLAIN

ENTRY = "spade_fast"  # the key in a state_dict's metadata, among those of the module
# The names under which torch's wrappers hold the module that they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# Attributes that do not change the network: where it runs, and how it uses memory.
NOT_SETTINGS = {*NOT_MARKED, "arguments", "made_with", "process_group", "inplace", "recompute"}
NEITHER = object()  # equal to no setting
BATCH_NORM_TYPES = (*BATCH_NORMS.values(), nn.SyncBatchNorm)  # all with the same tensors


def remember(network: nn.Module, arguments: dict) -> None:
    """Stores `arguments`, plain values as in JSON, as an attribute of a network that has just been
    built, and writes them into the metadata of each of its state_dicts, alone or within other
    modules. If the network has an attribute with an argument's name, its present value is written.
    If something else in one of our networks no longer matches the arguments, "changed" says what.

    torch.save writes that metadata, and `load_state_dict` ignores what it does not know in it.
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
    """How the network differs from the one that was built, in words; arguments may differ."""
    own, changes = _settings(network), []
    for name, (kind, settings) in network.made_with.items():
        label = name or type(network).__name__
        if name not in own:
            changes.append(f"{label} was removed")
            continue
        kind_now, settings_now = own[name]
        if not issubclass(kind_now, kind) and not {kind, kind_now} <= {*BATCH_NORM_TYPES}:
            changes.append(f"{label} is a {kind_now.__name__}, it was built as a {kind.__name__}")
            continue
        changes += [
            f"{label}.{key} is {settings_now.get(key)!r}, it was built as {value!r}"
            for key, value in settings.items()
            if settings_now.get(key, NEITHER) != value and (name or key not in network.arguments)
        ]
    return changes + [f"{name} was added" for name in own if name not in network.made_with]


def _settings(network):
    """The class and the plain attributes of each module, by name, ignoring torch's wrappers."""
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
