"""The clients of an experiment as devices of this machine: a folder, rows, key, settings and ledger for each.

For rehearsals: the same rows, in the same order, that the simulation gives each client, so that the two can be compared
number by number. Rows are written to disk in the clear.
"""

import json
import os
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from fedlr.config.build import build, build_task
from fedlr.config.schema import Experiment
from fedlr.data.conversations import Conversations
from fedlr.data.images import LabelledImages
from fedlr.data.multilabel import MultiLabelText
from fedlr.data.partition import Partition
from fedlr.data.scored import ScoredText
from fedlr.data.table import LabelledText, Table
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
    partition: Partition = build(
        experiment.partition.section(), "partition", data=data, num_clients=experiment.num_clients, seed=seed
    )
    names = build_task(experiment, data.label_names).output_names(data)
    base: BaseModel = build(experiment.model.section(), "model", label_names=names, seed=seed)
    make_folder(folder)
    written = []
    for client_id, rows in enumerate(partition.indices):
        own = folder / f"client-{client_id}"
        make_folder(own, mode=0o700)
        reader = write_rows(data.subset(rows), own)
        create_node_key(own / "device.key", comment=f"client-{client_id}")
        make_folder(own / "state", mode=0o700)
        settings = settings_of(experiment, own, base, reader, address, root_certificates, spare=spare)
        written.append(folder / f"client-{client_id}.yaml")
        write_whole(written[-1], yaml.safe_dump(settings, sort_keys=False))
        create_ledger(settings)
    return written


def write_rows(share: Table, own: Path) -> dict[str, Any]:
    """Write a client's rows into its folder, in their order; return the section `data` that reads them.

    Raises:
        InputError: for a table of a kind that devices do not read.
    """
    path = own / "rows.jsonl"
    section: dict[str, Any] = {"path": os.path.abspath(path)}
    rows: list[dict[str, Any]]
    if isinstance(share, Conversations):
        plain, keys = share.is_plain, ("role", "content")
        turns = [[dict(zip(keys, turn, strict=True)) for turn in row] for row in share.turns]
        rows = [{"text": row[0]["content"]} if plain else {"messages": row} for row in turns]
        section |= {"_target_": "conversations", "format": "text" if plain else "messages"}
    elif isinstance(share, LabelledImages):
        make_folder(own / "pictures", mode=0o700)
        rows = []
        for number, (row, label) in enumerate(zip(share.rows, share.labels, strict=True)):
            name = f"pictures/{number:06d}.png"  # without loss: the same pixels
            Image.fromarray(share.pixels[row]).save(own / name)
            rows.append({"image": name, "label": share.label_names[label]})
        section |= {"_target_": "images", "image_size": list(share.image_size), "labels": list(share.label_names)}
    elif isinstance(share, ScoredText | MultiLabelText | LabelledText):
        told: list[dict[str, Any]]
        if isinstance(share, ScoredText):
            told = [{"score": float(score)} for score in share.scores]
            section |= {"_target_": "scored_table", "score_range": [float(end) for end in share.score_range]}
        elif isinstance(share, MultiLabelText):
            told = [{"labels": [share.output_names[k] for k in row.nonzero()[0]]} for row in share.has_label]
            more = {"label_separator": "\x1f"}  # in no name
            section |= {"_target_": "multilabel_table", "labels": list(share.output_names), **more}
        else:
            told = [{"label": share.label_names[label]} for label in share.labels]
            section |= {"_target_": "table", "labels": list(share.label_names)}
        rows = [{"text": text, **more} for text, more in zip(share.texts, told, strict=True)]
        if share.pairs is not None:
            rows = [{**row, "pair": pair} for row, pair in zip(rows, share.pairs, strict=True)]
            section["text_pair_column"] = "pair"
    else:
        raise InputError(f"Expected rows of a kind that devices read, got {type(share).__name__}")
    write_whole(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    return section


def settings_of(
    experiment: Experiment,
    own: Path,
    base: BaseModel,
    reader: dict[str, Any],
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
        "data": reader,
        "privacy": {
            "epsilon": e.privacy.epsilon * spare if e.privacy.epsilon is not None else None,
            "delta": e.privacy.delta,
            "accountant": e.privacy.accountant,
            "randomness": e.privacy.randomness,
        },
        "runtime": {"num_workers": 1, "cache_prefix": e.runtime.cache_prefix, "matmul": e.runtime.matmul},
        "policy": {
            "allowed_models": [base.body_sha256],
            "allowed_tasks": [e.task.target],
            "max_length": max(e.data.max_length, 512),
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
