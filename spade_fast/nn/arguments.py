"""The arguments that a network was made with, which its weights do not say: the network remembers
them, and so does every state_dict of it.
"""

import copy

ENTRY = "spade_fast"  # in a state_dict's metadata, of the module whose arguments it has


def remember(network, arguments: dict):
    """Makes `arguments`, plain values as JSON has them, an attribute of the network, and puts them
    into the metadata of every state_dict that is made of it, alone or within other modules.

    torch.save writes that metadata and `load_state_dict` passes over what it does not know in it.
    """
    network.arguments = arguments
    network.register_state_dict_post_hook(_describe)


def _describe(network, state_dict, prefix, local_metadata):
    kind = type(network)
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    local_metadata[ENTRY] = {
        "network": kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}",
        "arguments": copy.deepcopy(network.arguments),
    }
