"""Why the view does not answer: texts that a caller may read, so they hold no path and no content of a file."""


class Refusal(Exception):
    """A request that gets no answer."""


class NotThere(Refusal):
    """What was asked for does not exist, or not yet."""


class Unreadable(Refusal):
    """A file of the run is not what the server writes."""
