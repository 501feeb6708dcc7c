"""The one error a user of fedlr is meant to read."""


class InputError(ValueError):
    """A configuration, file or message that cannot be used: the text names the value and what to change."""
