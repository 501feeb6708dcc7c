"""`fedlr client doctor`: what this device is, whether it can train, and what it will refuse; one line a finding."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlr.client.bounds import Policy
from fedlr.client.device_checks import (
    data_text,
    device_text,
    disk_text,
    files_text,
    ledger_text,
    memory_text,
    model_text,
    round_text,
    terms_text,
)
from fedlr.client.findings import Finding, found
from fedlr.client.server_checks import server_findings
from fedlr.client.settings import Settings, load_settings
from fedlr.config.offline import go_offline
from fedlr.errors import InputError
from fedlr.flower.terms import Terms
from fedlr.runs.commands import USAGE_ERROR, Options, quiet_libraries


def doctor(arguments: Sequence[str]) -> int:
    """Say what this device is and what is wrong with it: fedlr client doctor client.yaml [--terms FILE] [--no-join]

    Each line is ok, or REFUSE with what to change; the exit code is 1 where one says REFUSE. Nothing is changed, and
    nothing about the data is sent. --terms takes the file that `fedlr server terms` wrote for the operator: are the
    experiment's terms accepted, are its base model and its tokenizer here, for how many of its rounds is there budget,
    and how much memory does a step on rows of the largest size take? The server is asked whether it knows this device's
    key by joining and leaving again: --no-join leaves that out, for a device whose client is running.
    """
    if {"-h", "--help"} & set(arguments):
        print(doctor.__doc__)
        return 0
    options = Options()
    options.add_argument("settings", type=Path)
    options.add_argument("--terms", type=Path)
    options.add_argument("--no-join", action="store_true")
    try:
        chosen = options.parse_args(list(arguments))
    except InputError as error:
        print(f"fedlr client doctor: {error}", file=sys.stderr)
        return USAGE_ERROR
    quiet_libraries()
    go_offline(True)
    try:
        settings = load_settings(chosen.settings)
        terms = None if chosen.terms is None else read_terms(chosen.terms)
    except InputError as error:
        print(Finding("settings", str(error), is_ok=False))
        return 1
    all_ok = True
    for finding in examine(settings, chosen.settings, terms=terms, join=not chosen.no_join):
        print(finding, flush=True)
        all_ok &= finding.is_ok
    for line in refusals(settings.policy):
        print(f"will refuse {line}")
    for line in dangers(settings.policy):
        print(f"WILL ACCEPT {line}")
    return 0 if all_ok else 1


def examine(settings: Settings, path: Path, *, terms: Terms | None = None, join: bool = True) -> Iterator[Finding]:
    """Look at everything that a device needs to train.

    Args:
        path: of the settings.
        terms: of an experiment, to say whether they are accepted and how many of its rounds the budget pays for.
        join: as `server_findings`.
    """
    yield found("files", files_text, settings, path)
    yield (memory := found("memory", memory_text, settings))
    yield found("device", device_text, settings)
    yield found("disk", disk_text, settings)
    if memory.is_ok:  # loading it anyway could end this process, and others
        yield found("model", model_text, settings)
    yield found("data", data_text, settings)
    yield found("ledger", ledger_text, settings, terms)
    yield from server_findings(settings, join=join)
    if terms is not None:
        yield (agreed := found("terms", terms_text, settings, terms, memory.is_ok))
        if agreed.is_ok and memory.is_ok:
            yield found("round", round_text, settings, terms)


def refusals(policy: Policy) -> Iterator[str]:
    """Say in words what the policy refuses."""
    p = policy
    yield f"tasks other than {', '.join(p.allowed_tasks)}"
    yield f"any base model but {', '.join(sha256[:12] for sha256 in p.allowed_models)}"
    yield f"more than {p.max_steps_per_round} steps a round, {p.max_rounds} rounds, {p.max_experiments} experiments"
    yield f"a sample rate above {p.max_sample_rate:g}, a clip bound above {p.max_grad_norm:g}"
    yield f"a noise multiplier outside {p.min_noise_multiplier:g} to {p.max_noise_multiplier:g}"
    yield f"a divisor outside {p.min_divisor:g} to {p.max_divisor:g}"
    yield f"texts and conversations over {p.max_length} tokens, {p.max_token_budget} tokens at a time"
    yield f"adapters other than {', '.join(p.allowed_adapters)}, of a rank over {p.max_rank}"
    yield f"messages over {p.max_trained_values} values of the adapter, {p.max_side_values} of what was folded away"
    yield f"optimizers other than {', '.join(name.rpartition('.')[2] for name in p.allowed_optimizers)}"
    yield f"rules other than {', '.join(name.rpartition('.')[2] for name in p.allowed_rules)}"
    if not p.allow_seeded_randomness:
        yield "noise that a seed can draw again"
    if not p.allow_no_privacy:
        yield "training without noise"


def dangers(policy: Policy) -> Iterator[str]:
    """Say in words what the policy accepts although it ends privacy."""
    if policy.allow_seeded_randomness:
        yield "noise that a seed can draw again, and so subtract (policy.allow_seeded_randomness)"
    if policy.allow_no_privacy:
        yield "training without noise, so what leaves may reveal the data (policy.allow_no_privacy)"


def read_terms(path: Path) -> Terms:
    """Read the terms of an experiment from a file."""
    try:
        return Terms.read(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Expected the terms of an experiment in {path}, got {error}") from None
