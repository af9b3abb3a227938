"""What functions say of arguments that are wrong."""

import pytest


def refusal(function, *arguments, **settings):
    with pytest.raises((ValueError, TypeError)) as caught:
        function(*arguments, **settings)
    return str(caught.value)
