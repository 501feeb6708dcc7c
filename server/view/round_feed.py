"""Rounds as the run directory grows: a line of metrics.jsonl joined with the lines of clients.jsonl of that round."""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedlr.server.view.operator_pb2 import AskedClient, Round
from fedlr.server.view.refusals import Unreadable
from fedlr.server.view.whole_lines import WholeLines

METRICS, CLIENTS, SUMMARY = "metrics.jsonl", "clients.jsonl", "summary.json"
SETTLE_S = 2.0


class RoundFeed:
    """Every round of a run from one on, each when both files have it.

    A resumed server may cut the files back and write a round again: it comes again if it is not the same. Clients are
    expected in the order of rounds; where a round was asked twice (abandoned, or killed), its last answers count.
    """

    def __init__(self, run_dir: Path, *, from_round: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir, self._from_round, self._clock = run_dir, from_round, clock
        self._metrics, self._clients = WholeLines(run_dir / METRICS), WholeLines(run_dir / CLIENTS)
        self._cohort: dict[int, Mapping[str, Any]] = {}
        self._waiting_since: float | None = None
        self._sent: dict[int, bytes] = {}

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._clients.close()
        self._cohort, self._waiting_since = {}, None

    def has_ended(self) -> bool:
        """Say whether the run is over. Ask before reading: after a yes, `read` until it is empty, and that is all."""
        return (self._run_dir / SUMMARY).exists()

    def read(self, limit: int, *, ended: bool = False) -> list[Round]:
        """Return the next rounds that are written down, `limit` at most; none if there is nothing new.

        Args:
            ended: nothing more will be written.

        Raises:
            Unreadable: for a line that is not what a server writes.
        """
        if self._metrics.has_changed() or self._clients.has_changed():
            self.close()
        return list(itertools.islice(self._rounds(ended=ended), limit))

    def _rounds(self, *, ended: bool) -> Iterator[Round]:
        while (line := self._metrics.peek()) is not None:
            row = _parsed(line, METRICS)
            number = _whole_number(row, "rounds_completed", METRICS)
            self._collect(number - 1)
            if not (ended or self._is_complete(row)):
                return
            event = _event(row, self._cohort)
            self._metrics.take()
            self._cohort, self._waiting_since = {}, None
            if self._is_news(event):
                yield event

    def _collect(self, round_index: int) -> None:
        """Keep the clients of one round, drop those of earlier ones, and stop before later ones."""
        while (line := self._clients.peek()) is not None:
            row = _parsed(line, CLIENTS)
            index = _whole_number(row, "round_index", CLIENTS)
            if index > round_index:
                return
            self._clients.take()
            if index == round_index:
                self._cohort[_whole_number(row, "client_id", CLIENTS)] = row

    def _is_complete(self, row: Mapping[str, Any]) -> bool:
        """Say whether all clients of a round are there.

        Either file may be written first. The counts include answers of clients that were not asked, which get no line
        of their own: so a later line, or some seconds, must do as well.
        """
        answers = sum(_whole_number(row, f"num_{status}", METRICS) for status in ("trained", "refused", "rejected"))
        if len(self._cohort) >= answers or self._clients.peek() is not None:
            return True
        now = self._clock()
        self._waiting_since = now if self._waiting_since is None else self._waiting_since
        return now - self._waiting_since >= SETTLE_S

    def _is_news(self, event: Round) -> bool:
        if event.rounds_completed < self._from_round:
            return False
        digest = sha256(event.SerializeToString(deterministic=True)).digest()
        is_new = self._sent.get(event.rounds_completed) != digest
        self._sent[event.rounds_completed] = digest
        return is_new


def _event(row: Mapping[str, Any], cohort: Mapping[int, Mapping[str, Any]]) -> Round:
    try:
        return Round(
            rounds_completed=row["rounds_completed"],
            accuracy=row["accuracy"],
            loss=row["loss"],  # null where outputs overflowed: not sent
            epsilon_max=row["epsilon_max"],
            epsilon_median=row["epsilon_median"],
            num_trained=row["num_trained"],
            num_refused=row["num_refused"],
            num_rejected=row["num_rejected"],
            cohort=[
                AskedClient(client_id=client, status=asked["status"], reason=asked["reason"], epsilon=asked["epsilon"])
                for client, asked in sorted(cohort.items())
            ],
        )
    except (KeyError, TypeError, ValueError):
        raise Unreadable(f"a line of {METRICS} or {CLIENTS} is from another version") from None


def _parsed(line: bytes, name: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Unreadable(f"a line of {name} is broken")
    return value


def _whole_number(row: Mapping[str, Any], key: str, name: str) -> int:
    value = row.get(key)
    if type(value) is not int:
        raise Unreadable(f"a line of {name} is from another version")
    return value
