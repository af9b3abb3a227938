"""The messages with which functions refuse wrong arguments."""

import pytest


def refusal(function, *arguments, **settings):
    with pytest.raises((ValueError, TypeError)) as caught:
        function(*arguments, **settings)
    return str(caught.value)
