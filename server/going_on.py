"""Whether a run may begin or go on as it is asked to: the same experiment, and devices enough for it."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedlr.config.schema import AUTO, Experiment
from fedlr.errors import InputError
from fedlr.runs.directory import recorded_tree

ALWAYS = {"adapter", "data", "method", "model", "name", "num_clients", "num_rounds", "privacy", "trainer"}  # of any run


def check_enrolled(experiment: Experiment, members: Collection[int], revoked: Collection[int]) -> None:
    """Compare num_clients with the roster, before anybody is asked.

    Raises:
        InputError: a number below num_clients belongs to no device and never did, or too few can ever answer.
    """
    e = experiment
    never = sorted(set(range(e.num_clients)) - {*members, *revoked})
    if never:
        raise InputError(
            f"Expected num_clients={e.num_clients} devices in {e.deployment.roster}, got {len(members)} enrolled; "
            f"set num_clients={e.num_clients - len(never)} and a cohort_size that fits, or enrol {len(never)} more"
        )
    may_be_drawn(e, members, {})


def may_be_drawn(experiment: Experiment, members: Collection[int], participations: Mapping[int, int]) -> frozenset[int]:
    """Return the enrolled clients with rounds left; only rounds whose update was used count, not absences.

    Raises:
        InputError: they are fewer than a round needs.
    """
    e, least = experiment, experiment.deployment.min_updates
    enrolled = {client for client in members if client < e.num_clients}
    left = frozenset(client for client in enrolled if participations.get(client, 0) < e.max_participations)
    if len(left) < least:
        raise InputError(
            f"Expected deployment.min_updates={least} enrolled devices with a round left of "
            f"privacy.max_participations={e.max_participations}, got {len(left)} of {len(enrolled)}; give a revoked "
            "number to a new device with fedlr server enrol --replace NAME, or lower deployment.min_updates"
        )
    return left


def _take_known(here: dict[str, Any], there: Mapping[str, Any]) -> None:
    """Take from a recorded configuration the numbers of what is auto here, which are compared once they are found, and
    leave out keys of sections that the program which wrote it did not have yet, where they are null."""
    for key, value in list(here.items()):
        if isinstance(value, dict) and isinstance(recorded := there.get(key), Mapping):
            _take_known(value, recorded)
        elif value == AUTO and isinstance(there.get(key), int | float):
            here[key] = there[key]
        elif value is None and key not in there:
            del here[key]


def check_same(experiment: Experiment, run_dir: Path) -> None:
    """Refuse to go on with another experiment than the directory holds.

    Raises:
        InputError: which names the first section that differs.
    """
    there = recorded_tree(run_dir / "config.yaml")
    here = json.loads(json.dumps(experiment.resolved()))
    _take_known(here, there)
    if absent := sorted(ALWAYS - there.keys()):
        raise InputError(f"Expected the whole configuration of a run in {run_dir}/config.yaml, got none of {absent[0]}")
    since = here.keys() - there.keys()  # keys that the program which began it did not have yet
    for key in sorted({*there, *here} - since - {"deployment", "runtime", "tracking"}):  # which change no result
        if _without_hints(there.get(key)) != _without_hints(
            _without_new(here.get(key), there.get(key), _defaults(key))
        ):
            raise InputError(
                f"Expected the configuration of {run_dir}/config.yaml to go on with its run, got another {key}: choose "
                "another directory, or the same configuration"
            )


def _defaults(section: str) -> dict[str, Any]:
    """Return what a section's keys are where a file has none of them: what every run did before there was the key."""
    kind = Experiment.model_fields[section].annotation if section in Experiment.model_fields else None
    fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
    return {key: field.default for key, field in fields.items() if not field.is_required()}


def _without_new(here: Any, there: Any, defaults: Mapping[str, Any]) -> Any:
    """Return a section without the keys that the program which began the run did not have yet, where they are unset or
    as every run was before."""
    if not isinstance(here, dict) or not isinstance(there, dict):
        return here
    return {key: value for key, value in here.items() if key in there or value not in (None, defaults.get(key))}


def _without_hints(section: Any) -> Any:
    """Return a section without the command that fetches what is missing, which changes no result."""
    return (
        {key: value for key, value in section.items() if key != "fetched_by"} if isinstance(section, dict) else section
    )
