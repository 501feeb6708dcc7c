"""The clients of an experiment as devices of this machine: a folder, rows, key, settings and ledger for each.

For rehearsals: the same rows, in the same order, that the simulation gives each client, so that the two can be compared
number by number. Rows are written to disk in the clear.
"""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from fedlr.config.build import build
from fedlr.config.schema import Experiment
from fedlr.data.partition import Partition
from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from fedlr.files import make_folder, write_whole
from fedlr.flower.node_key import create_node_key
from fedlr.models.network import BaseModel
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import PrivacyBudget
from fedlr.runs.tables import load_examples


def write_devices(
    experiment: Experiment, folder: Path, *, seed: int, address: str, root_certificates: Path, spare: float = 1.0
) -> list[Path]:
    """Write `client-K.yaml` and what it names for every client; return the settings files.

    Args:
        experiment: whose partition is dealt out.
        folder: new, or empty.
        seed: of the partition.
        address: HOST:PORT of the server.
        root_certificates: the authority of the server.
        spare: what a device may spend, as a multiple of the experiment's budget: rounds that are computed twice because
            something was killed are charged twice.

    Raises:
        InputError: the data are not public, or no partition fits.
    """
    if not experiment.data.public:
        raise InputError("Expected data.public=true to write clients' rows to this machine's disk, got false")
    data, _ = load_examples(experiment, seed=seed)
    if not isinstance(data, LabelledText):
        raise InputError(f"Expected task=text_classification for devices, got task={experiment.task.target}")
    partition: Partition = build(
        experiment.partition.section(), "partition", data=data, num_clients=experiment.num_clients, seed=seed
    )
    base: BaseModel = build(experiment.model.section(), "model", label_names=data.label_names, seed=seed)
    make_folder(folder)
    written = []
    for client_id, rows in enumerate(partition.indices):
        own = folder / f"client-{client_id}"
        make_folder(own, mode=0o700)
        share = data.subset(rows)
        lines = [
            json.dumps({"text": text, "label": data.label_names[label], **({} if pair is None else {"pair": pair})})
            for text, label, pair in zip(share.texts, share.labels, share.pairs or [None] * len(share), strict=True)
        ]
        write_whole(own / "rows.jsonl", "\n".join(lines) + "\n")
        create_node_key(own / "device.key", comment=f"client-{client_id}")
        make_folder(own / "state", mode=0o700)
        settings = settings_of(experiment, own, base, data.label_names, address, root_certificates, spare=spare)
        if share.pairs is not None:
            settings["data"]["text_pair_column"] = "pair"
        written.append(folder / f"client-{client_id}.yaml")
        write_whole(written[-1], yaml.safe_dump(settings, sort_keys=False))
        create_ledger(settings)
    return written


def settings_of(
    experiment: Experiment,
    own: Path,
    base: BaseModel,
    label_names: tuple[str, ...],
    address: str,
    root_certificates: Path,
    *,
    spare: float,
) -> dict[str, Any]:
    """Return what client.yaml of a rehearsal says: a policy that allows this experiment, on data of no one's."""
    e = experiment
    is_private, is_seeded = e.privacy.epsilon is not None, e.privacy.randomness == "seeded"
    return {
        "server": {
            "address": address,
            "root_certificates": os.path.abspath(root_certificates),
            "private_key": os.path.abspath(own / "device.key"),
        },
        "name": own.name,
        "state_dir": os.path.abspath(own / "state"),
        "dataset_id": f"{e.name} {own.name}",
        "model": e.model.section(),
        "data": {
            "_target_": "table",
            "path": os.path.abspath(own / "rows.jsonl"),
            "labels": list(label_names),
        },
        "privacy": {
            "epsilon": e.privacy.epsilon * spare if e.privacy.epsilon is not None else None,
            "delta": e.privacy.delta,
            "accountant": e.privacy.accountant,
            "randomness": e.privacy.randomness,
        },
        "runtime": {"num_workers": 1, "cache_prefix": e.runtime.cache_prefix},
        "policy": {
            "allowed_models": [base.body_sha256],
            "allow_seeded_randomness": is_seeded,
            "allow_no_privacy": not is_private,
            "min_noise_multiplier": 0.01,
            "max_sample_rate": 1.0,
            "allowed_adapters": [e.adapter.system],
        },
    }


def create_ledger(settings: dict[str, Any]) -> None:
    """Make a device's ledger, as `fedlr client init` does."""
    privacy = settings["privacy"]
    if privacy["epsilon"] is not None:
        PrivacyLedger.create(
            Path(settings["state_dir"]) / "ledger.jsonl",
            PrivacyBudget(privacy["epsilon"], privacy["delta"]),
            dataset_id=settings["dataset_id"],
            randomness=privacy["randomness"],
            accountant=privacy["accountant"],
        )
