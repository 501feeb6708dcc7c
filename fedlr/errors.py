"""The errors a user of fedlr is meant to read, and the exit code that each ends a command with."""


class InputError(ValueError):
    """A configuration, file or message that cannot be used: the text names the value and what to change."""

    exit_code = 2


class PassingError(InputError):
    """What passes by itself or with room made: whoever watches the process starts it again (EX_TEMPFAIL)."""

    exit_code = 75


class ShutOutError(InputError):
    """Somebody decided that this process may not go on: starting it again is no use (EX_NOPERM)."""

    exit_code = 77
