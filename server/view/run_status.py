"""What run a directory holds and how far it has come."""

import json
from pathlib import Path
from typing import Any

import yaml

from fedlr.server.view.operator_pb2 import RunStatus
from fedlr.server.view.refusals import Unreadable
from fedlr.server.view.round_feed import METRICS, SUMMARY
from fedlr.server.view.whole_lines import last_whole_line


def run_status(run_dir: Path) -> RunStatus:
    """Return the state of a run; what its files do not say yet is empty.

    Raises:
        Unreadable: if config.yaml or the last line of metrics.jsonl is not what a server writes.
    """
    config = _config(run_dir)
    last = last_round(run_dir)
    try:
        return RunStatus(
            name=config.get("name"),
            method=config.get("method", {}).get("name"),
            num_rounds=config.get("num_rounds"),
            rounds_completed=last.get("rounds_completed"),
            epsilon_max=last.get("epsilon_max"),
            last_line_unix_s=(run_dir / METRICS).stat().st_mtime if last else None,
            ended=(run_dir / SUMMARY).exists(),
        )
    except (AttributeError, TypeError, ValueError):
        raise Unreadable("config.yaml or metrics.jsonl is from another version") from None


def last_round(run_dir: Path) -> dict[str, Any]:
    """Return the last whole line of metrics.jsonl, {} before there is one.

    Raises:
        Unreadable: if it is no JSON object.
    """
    line = last_whole_line(run_dir / METRICS)
    try:
        row = {} if line is None else json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise Unreadable(f"the last line of {METRICS} is broken")
    return row


def _config(run_dir: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        raise Unreadable("config.yaml is no mapping")
    return config
