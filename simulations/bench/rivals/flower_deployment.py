"""Flower's own deployment on this machine, by its own commands: SuperLink, SuperNodes, `flwr run`; TLS, keys, SQLite.

As its documentation has it: the SuperLink starts the ServerApp, each SuperNode a process of the ClientApp for every
message. No proxy stands in between, and no base model is loaded, which a client that trains has to do for each message.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlr.flower.node_key import create_node_key
from fedlr.simulations.bench.outcome import BenchmarkFailed
from fedlr.simulations.bench.rivals import flower_fedavg
from fedlr.simulations.rehearsal import QUIET, SUPERLINK_FILES, Watched, fedlr, free_port, wait_for_port

BIN = Path(sys.executable).parent
LONGEST_S = 600.0
POLL_S = 0.2
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "lora-fedavg"
version = "1.0.0"
description = "FedAvg over the arrays of a LoRA adapter"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "lora_fedavg.app:server_app"
clientapp = "lora_fedavg.app:client_app"
[tool.flwr.app.config]
folder = ""
num-rounds = 1
num-clients = 1
"""


def fedavg(
    start: Mapping[str, Tensor], folder: Path, *, num_clients: int, num_rounds: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Run rounds of Flower's FedAvg over these arrays; return the seconds of each after the first, and the last mean.

    Raises:
        BenchmarkFailed: the run did not end.
    """
    folder.mkdir()
    save_file(dict(start), folder / "start.safetensors")
    fedlr("server", "certificate", "--host", "127.0.0.1", "--host", "localhost", "--out", str(folder / "keys"))
    address = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        superlink = launch(stack, folder, "superlink", superlink_command(address, folder))
        wait_for_port(address)
        connect(folder, address)
        for client in range(num_clients):
            public = create_node_key(folder / f"client-{client}.key")
            flwr(folder, "supernode", "register", str(public), "bench")
            launch(stack, folder, f"client-{client}", supernode_command(address, folder, client, num_clients))
        told = [f'folder="{folder}"', f"num-rounds={num_rounds}", f"num-clients={num_clients}"]
        flwr(folder, "run", str(bundle(folder)), "bench", "--run-config", " ".join(told))
        wait_for_end(superlink, folder / "ends.json")
    ends = json.loads((folder / "ends.json").read_text())
    return [after - before for before, after in zip(ends, ends[1:], strict=False)], load_file(
        folder / "end.safetensors"
    )


def launch(stack: ExitStack, folder: Path, name: str, command: list[str]) -> Watched:
    """Start one of Flower's processes, which finds its own programs; it is ended with the stack."""
    process = Watched(
        name, ["env", *(f"{key}={value}" for key, value in own(folder).items()), *command], log(folder, name)
    )
    process.start()
    stack.callback(process.stop)
    return process


def own(folder: Path) -> dict[str, str]:
    """Return the environment in which Flower finds its programs and a configuration that is nobody else's."""
    return {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}", "FLWR_HOME": str(folder / "flwr")}


def log(folder: Path, name: str) -> Path:
    """Return where a process writes what it says."""
    return folder / f"{name}.log"


def superlink_command(address: str, folder: Path) -> list[str]:
    """Return Flower's server, which starts the processes of ServerApps itself."""
    host, _, port = address.partition(":")
    certificates = [f"--ssl-{key}={folder / 'keys' / name}" for key, name in SUPERLINK_FILES.items()]
    database = ["--enable-supernode-auth", f"--database={folder / 'superlink.db'}"]
    return [str(BIN / "flower-superlink"), f"--host={host}", f"--port={port}", *certificates, *database]


def supernode_command(address: str, folder: Path, client: int, num_clients: int) -> list[str]:
    """Return Flower's client, which starts a process of the ClientApp for every message."""
    return [
        str(BIN / "flower-supernode"),
        f"--superlink={address}",
        f"--root-certificates={folder / 'keys' / 'ca.crt'}",
        f"--auth-supernode-private-key={folder / f'client-{client}.key'}",
        f"--port={free_port()}",
        f"--node-config=partition-id={client} num-partitions={num_clients}",
    ]


def connect(folder: Path, address: str) -> None:
    """Tell `flwr` where the SuperLink is."""
    config = folder / "flwr" / "config.toml"
    config.parent.mkdir(exist_ok=True)
    ca = folder / "keys" / "ca.crt"
    config.write_text(
        f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "{address}"\nroot-certificates = "{ca}"\n'
    )


def bundle(folder: Path) -> Path:
    """Write the app as a project that `flwr run` takes."""
    package = folder / "app" / "lora_fedavg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "app.py").write_text(Path(flower_fedavg.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "app" / "pyproject.toml").write_text(PROJECT)
    return folder / "app"


def flwr(folder: Path, *words: str) -> None:
    """Run one of Flower's commands to its end.

    Raises:
        BenchmarkFailed: it failed; the text is its own.
    """
    done = subprocess.run(
        [str(BIN / "flwr"), *words], env={**os.environ, **QUIET, **own(folder)}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise BenchmarkFailed(f"flwr {' '.join(words[:2])}: {(done.stderr or done.stdout).strip()[-500:]}")


def wait_for_end(superlink: Watched, ends: Path) -> None:
    """Wait for what the ServerApp leaves when it is done.

    Raises:
        BenchmarkFailed: it took too long, or failed; the text is the end of the SuperLink's log.
    """
    deadline = time.monotonic() + LONGEST_S
    while not ends.exists():
        said = superlink.log.read_text(encoding="utf-8", errors="replace")
        if superlink.code is not None or "Traceback" in said or time.monotonic() > deadline:
            raise BenchmarkFailed(f"Flower's FedAvg did not end: {said.strip()[-1500:]}")
        time.sleep(POLL_S)
