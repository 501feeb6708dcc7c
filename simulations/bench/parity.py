"""The same 20 noised steps three ways: fused in a cohort, fused client by client, and with Opacus hooks.

Same draws, same noise; what differs is the order of sums. The figure is the largest relative L2 difference of a
client's adapter, over all clients. No clock.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.simulations.bench.contestants import Contestant
from fedlr.simulations.bench.federations import OPACUS, ours, overrides
from fedlr.simulations.bench.outcome import BenchmarkFailed, Measure, Outcome, joint_norm
from fedlr.simulations.bench.settings import Settings

NUM_STEPS = 20
TOGETHER, ALONE, OPACUS_HOOKS = "fused cohort", "fused, one client after the other", "Opacus hooks"


def run(settings: Settings) -> Outcome:
    """Train the same clients three ways and compare every client's adapter."""
    num_clients = settings.pick(tiny=3, quick=3, full=16)
    shared = overrides(settings, num_clients=num_clients, num_steps=NUM_STEPS, batch=4)
    clients = range(num_clients)
    found: dict[str, dict[int, dict[Slot, Tensor]]] = {}
    with Contestant(TOGETHER, settings.scratch, [*shared, *ours(settings)]) as fused:
        fused.train(0, clients, keep="together")
        found[TOGETHER] = fused.updates("together")
    with Contestant(ALONE, settings.scratch, [*shared, *ours(settings)]) as fused:
        for client in clients:
            fused.train(0, [client], keep="alone")
        found[ALONE] = fused.updates("alone")
    with Contestant(OPACUS_HOOKS, settings.scratch, [*shared, *OPACUS]) as opacus:
        opacus.train(0, clients, keep="opacus")
        found[OPACUS_HOOKS] = opacus.updates("opacus")
    measures = []
    for key, rival in (("parity", ALONE), ("parity-opacus", OPACUS_HOOKS)):
        values = differences(found[TOGETHER], found[rival], clients)
        measures.append(
            Measure(key, f"{TOGETHER} against {rival}, {NUM_STEPS} steps: largest relative difference", (max(values),))
        )
        settings.say(f"  against {rival}: {max(values):.2e}")
    raw = {rival: differences(found[TOGETHER], found[rival], clients) for rival in (ALONE, OPACUS_HOOKS)}
    setting = {"clients": num_clients, "steps": NUM_STEPS, "overrides": shared, "compared": "lora_B, which starts at 0"}
    return Outcome("parity", tuple(measures), (), setting, raw)


def differences(
    mine: Mapping[int, Mapping[Slot, Tensor]], theirs: Mapping[int, Mapping[Slot, Tensor]], clients: Sequence[int]
) -> list[float]:
    """Return |mine - theirs| / |theirs| of each client.

    Raises:
        BenchmarkFailed: a client is missing, or has not moved.
    """
    if not mine.keys() == theirs.keys() == set(clients):
        raise BenchmarkFailed(f"Expected updates of {len(clients)} clients, got {len(mine)} and {len(theirs)}")
    values = []
    for client in clients:
        size = joint_norm(theirs[client])
        if not size > 0:
            raise BenchmarkFailed(f"Expected client {client} to move its adapter, got zeros")
        moved = {slot: mine[client][slot].double() - theirs[client][slot].double() for slot in theirs[client]}
        values.append(joint_norm(moved) / size)
    return values
