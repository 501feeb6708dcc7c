"""The same experiment in Flower's own simulation: the server's and the device's apps, on Ray actors of this machine.

Each client is a device with its folder, its ledger and its own model, as in a real federation; only the network is
Flower's in-memory one. Slower than `runtime=local` by far: it is for checking that the two agree, and for Flower users.
The apps are found by name, as Flower finds them in a project's manifest.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from secrets import randbits

from fedlr.config.parts import OWN_PARTS, own_parts_of
from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.files import make_folder, write_whole
from fedlr.runs.asked import write_asked
from fedlr.runs.commands import quiet_flower
from fedlr.runs.directory import IDENTITY, create_run_dir, new_identity, read_json, write_json, write_origin
from fedlr.runs.prepare import with_found_rates
from fedlr.simulations.devices import write_devices

SERVER_APP, CLIENT_APP = "fedlr.server.app:app", "fedlr.client.app:app"
NOWHERE = "127.0.0.1:1"  # no device of a simulation connects to anything


def simulate_with_flower(experiment: Experiment, *, say: Callable[[str], None]) -> Path:
    """Run an experiment in Flower's simulation and return its directory.

    Raises:
        InputError: for an experiment that cannot run.
    """
    from flwr.simulation import run_simulation  # an optional package behind it

    seed = randbits(32) if experiment.seed is None else experiment.seed
    asked, experiment = experiment, with_found_rates(experiment, seed=seed)
    run_dir = create_run_dir(experiment)
    write_asked(run_dir, asked)
    authority = run_dir / "devices" / "ca.crt"
    make_folder(authority.parent)
    write_whole(authority, "")
    write_devices(experiment, run_dir / "devices", seed=seed, address=NOWHERE, root_certificates=authority)
    write_origin(run_dir, experiment)
    write_json(run_dir / "partition.json", {"public": False})
    write_json(run_dir / IDENTITY, new_identity(seed))
    write_whole(run_dir / "experiment.json", experiment.model_dump_json(by_alias=True))
    os.environ |= {
        "FEDLR_EXPERIMENT": str(run_dir / "experiment.json"),
        "FEDLR_RUN_DIR": str(run_dir),
        "FEDLR_CLIENTS": str(run_dir / "devices"),
        OWN_PARTS: " ".join(own_parts_of(experiment.resolved())),
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    quiet_flower()
    say(f"Flower's simulation: {experiment.num_clients} nodes in {experiment.runtime.num_processes} Ray actors")
    run_simulation(
        resolve_name(SERVER_APP),
        resolve_name(CLIENT_APP),
        num_supernodes=experiment.num_clients,
        backend_config={
            "init_args": {
                "num_cpus": experiment.runtime.num_processes,
                "include_dashboard": False,
                "logging_level": logging.ERROR,
                "log_to_driver": False,
            },
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    if (run_dir / "summary.json").exists() and (problem := read_json(run_dir / "summary.json").get("problem")):
        raise InputError(f"{problem} (all that there is of the run is in {run_dir})")
    return run_dir
