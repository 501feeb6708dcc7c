"""The federation of an audit: that of the configuration, of which only a few rows pass the model."""

from dataclasses import replace

import numpy as np

from fedlr.errors import InputError
from fedlr.simulations.federation import Federation, past_frozen_layers
from fedlr.streams import OsRandomness, Purpose, stream
from fedlr.tasks.examples import Share


def auditor_generator(f: Federation) -> np.random.Generator:
    """Return the auditor's own randomness: the seed's, so that an audit can be repeated, or the operating system's."""
    return np.random.default_rng() if isinstance(f.randomness, OsRandomness) else stream(f.seed, Purpose.AUDIT)


def with_rows(f: Federation, num_rows: int, generator: np.random.Generator) -> Federation:
    """Return the federation with `num_rows` of its rows, or all where there are fewer, past its frozen layers.

    Rows are drawn without regard to what they hold, and stay with their clients.

    Raises:
        InputError: there are fewer than two rows.
    """
    owners = np.repeat(np.arange(len(f.clients)), [len(client) for client in f.clients])
    rows = np.concatenate([client.rows for client in f.clients])
    if len(rows) < 2:
        raise InputError(f"Expected at least 2 training rows to audit with, got {len(rows)}")
    chosen = np.sort(generator.permutation(len(rows))[:num_rows])
    owners, rows = owners[chosen], rows[chosen]
    places = np.argsort(rows)
    table = f.clients[0].table.subset(rows[places])
    clients = tuple(Share(table, np.flatnonzero(owners[places] == client)) for client in range(len(f.clients)))
    small = replace(f, clients=clients, test=f.test.subset(np.arange(min(1, len(f.test)))))
    return past_frozen_layers(small, say=lambda line: None)
