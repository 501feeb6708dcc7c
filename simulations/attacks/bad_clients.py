"""Who is hostile: a public draw, keyed by the run's seed."""

from fedlr.errors import in_range
from fedlr.streams import Purpose, stream


def bad_clients(*, seed: int, num_clients: int, share: float) -> frozenset[int]:
    """Return the hostile clients: `share` of all, rounded; those of a smaller share are among those of a larger one.

    >>> sorted(bad_clients(seed=0, num_clients=10, share=0.2)) == sorted(bad_clients(seed=0, num_clients=10, share=0.2))
    True
    >>> bad_clients(seed=0, num_clients=10, share=0.1) < bad_clients(seed=0, num_clients=10, share=0.3)
    True
    """
    in_range(0, 1, share=share)
    order = stream(seed, Purpose.ATTACK).permutation(num_clients)
    return frozenset(order[: round(share * num_clients)].tolist())
