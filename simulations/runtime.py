"""Where the clients of a run train: in this process, together or one after the other, or in several processes."""

from typing import Any, Protocol

from fedlr.rounds.pools.client_state import Kept
from fedlr.rounds.pools.fused import FusedPool
from fedlr.rounds.pools.local import Charges, LocalPool
from fedlr.rounds.round import ClientPool
from fedlr.simulations.federation import Federation


class SimulatedPool(ClientPool, Protocol):
    """A `ClientPool` of this machine."""

    seconds: dict[int, float]  # by client, of its latest round
    kept: Kept  # what the clients keep from round to round

    def close(self) -> None:
        """Stop what was started for the pool."""
        ...


def make_pool(federation: Federation, ledger: Charges | None) -> SimulatedPool:
    """Return a pool of the federation's clients, as `runtime` and `trainer.engine` say."""
    if federation.experiment.runtime.num_processes > 1:
        from fedlr.simulations.ray_pool import RayPool  # an optional package

        return RayPool(federation, ledger)
    return pool_here(federation, ledger)


def pool_here(federation: Federation, ledger: Charges | None) -> FusedPool | LocalPool:
    """Return a pool in this process."""
    e = federation.experiment
    common: dict[str, Any] = {
        "enrolled": federation.start.adapter,
        "training": federation.training,
        "mechanism": federation.mechanism,
        "ledger": ledger,
        "randomness": federation.randomness,
        "weights": federation.weights,
        "num_workers": e.runtime.num_workers,
        "side": federation.side,
    }
    if e.trainer.engine == "opacus":
        return LocalPool(federation.working, federation.clients, grad_sample_mode=e.trainer.grad_sample_mode, **common)
    return FusedPool(
        federation.working,
        federation.clients,
        memory_gb=e.runtime.memory_gb,
        check_parity=e.trainer.check_parity,
        **common,
    )
