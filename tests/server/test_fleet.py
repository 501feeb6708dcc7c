"""A fleet as it is: devices that are dead, revoked or replaced, servers that start at once, and what passes by itself.

Mutants these tests reject: a pool that waits for the dead until the deadline; a cohort with a revoked number; an
absence that counts as a participation; a server that ends a night's outage as bad input.
"""

import errno
import fcntl
from collections import Counter
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from flwr.common.constant import TIMESTAMP_HEADER

import fedlr.server.pool
from fedlr.client.device import Device
from fedlr.client.node import Outage, step
from fedlr.errors import InputError, PassingError, ShutOutError
from fedlr.flower.node_key import create_node_key
from fedlr.rounds.cohorts import sample_among, sample_cohort
from fedlr.runs.commands import command
from fedlr.server.going_on import check_enrolled, may_be_drawn
from fedlr.server.link import LinkLost, losing_link, starting_alone
from fedlr.server.longer_waits import longer_each_time
from fedlr.server.pool import GridPool
from fedlr.server.roster import Roster
from fedlr.server.view.operator_pb2 import RunStatus
from fedlr.server.view.watching import status_line
from tests.client.test_node import connection
from tests.server.whole_federation import Federation, close_all, experiment, lines

DEPLOY = Path(__file__).parents[2] / "deploy" / "systemd"


class Clock:
    """A clock that only sleeping moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("grace_s", "waited_s"), [(5.0, 5.0), (None, 600.0)])
def test_a_dead_device_holds_a_round_for_the_grace_and_not_the_deadline(
    grace_s: float | None, waited_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(fedlr.server.pool, "time", clock)
    f = Federation(experiment("cohort_size=4", "deployment.min_updates=3", "num_rounds=1"), tmp_path)
    f.grid.answers[1] = lambda record: None
    run = f.start()
    enrolled, terms = run.served.start.adapter, run.served.terms
    pool = GridPool(
        f.grid, f.grid, terms=terms, enrolled=enrolled, deadline_s=600, grace_s=grace_s, quorum=3, poll_s=1.0
    )
    run.rounds(pool)
    close_all()
    assert clock.now == pytest.approx(waited_s, abs=2.0)
    assert lines(run.run_dir / "metrics.jsonl")[1]["num_trained"] == 3


def test_a_grace_starts_with_the_quorum_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(fedlr.server.pool, "time", clock)
    f = Federation(experiment("cohort_size=4", "deployment.min_updates=3", "deployment.max_attempts=1"), tmp_path)
    f.grid.answers |= {client: lambda record: None for client in (0, 1)}
    run = f.start()
    enrolled, terms = run.served.start.adapter, run.served.terms
    pool = GridPool(f.grid, f.grid, terms=terms, enrolled=enrolled, deadline_s=60, grace_s=1, quorum=3, poll_s=1.0)
    with pytest.raises(PassingError):
        run.rounds(pool)
    close_all()
    assert clock.now == pytest.approx(60, abs=2.0)


def test_a_revoked_number_is_not_asked_and_its_absence_costs_nobody_a_round(tmp_path: Path) -> None:
    f = Federation(experiment("cohort_size=4", "deployment.min_updates=1"), tmp_path)
    run, members = f.start(), [frozenset({0, 1, 3})]
    run.rounds(f.pool(run), lambda: members[0])
    close_all()
    assert {row["client_id"] for row in lines(run.run_dir / "clients.jsonl")} == {0, 1, 3}
    assert f.charges() == [3, 3, 0, 3]


def test_with_everybody_there_the_cohorts_are_those_of_a_simulation() -> None:
    for index in range(20):
        drawn = sample_cohort(seed=7, round_index=index, num_clients=9, cohort_size=4, max_participations=20)
        assert sample_among(range(9), seed=7, round_index=index, cohort_size=4) == drawn


def test_only_used_updates_count_as_participations() -> None:
    e = experiment("num_rounds=4", "cohort_size=2", "privacy.max_participations=2")
    assert may_be_drawn(e, range(9), Counter({0: 2, 1: 1})) == {1, 2, 3}
    with pytest.raises(InputError, match="got 0 of 1"):
        may_be_drawn(e, [0], {0: 2})


@pytest.mark.parametrize(("members", "revoked"), [([0, 1, 2], []), ([1, 2, 3], []), ([], [])])
def test_a_roster_that_lacks_numbers_is_one_error_at_once(members: list[int], revoked: list[int]) -> None:
    with pytest.raises(InputError, match=rf"num_clients=4 .*got {len(members)} enrolled; set num_clients="):
        check_enrolled(experiment(), members, revoked)


def test_a_roster_with_every_number_known_may_start() -> None:
    check_enrolled(experiment(), [0, 1, 2, 3, 7], [])
    check_enrolled(experiment(), [0, 1, 3], [2, 3])


def test_a_device_that_is_replaced_keeps_its_name_and_number(tmp_path: Path) -> None:
    keys = [create_node_key(tmp_path / str(index), comment="x").read_text() for index in range(4)]
    roster = Roster().with_client("a", keys[0], 11).with_client("b", keys[1], 22)
    for before in (roster, roster.without_client("a")):
        after = before.with_replacement("a", keys[2], 33)
        assert after.client_of_node == {33: 0, 22: 1} and after.named("a").client_id == 0
        assert [entry.node_id for entry in after.revoked] == [11] and after.next_client_id() == 2
        assert after.with_replacement("a", keys[3], 44).client_of_node == {44: 0, 22: 1}
    with pytest.raises(InputError, match="known: a, b"):
        roster.with_replacement("z", keys[2], 33)
    with pytest.raises(InputError, match="public_key once"):
        roster.with_replacement("a", keys[0], 33)


def test_a_second_server_does_not_take_tasks_while_one_starts(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    deployment = experiment(f"deployment.superexec_secret={secret}").deployment
    with starting_alone(deployment), secret.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with secret.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_superlink_that_forgot_the_run_is_a_link_lost_and_no_interrupt() -> None:
    """Flower sends the server SIGINT where its token is refused; a person's goes on as one."""
    request = httpx.Request("POST", "https://x")
    with pytest.raises(LinkLost, match="HTTP 401"), losing_link():
        try:
            httpx.Response(401, request=request).raise_for_status()
        except httpx.HTTPStatusError:
            raise KeyboardInterrupt  # noqa: B904 - as a signal does
    with pytest.raises(KeyboardInterrupt), losing_link():
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), losing_link():  # by a person, while a proxy's 503 is waited for
        try:
            httpx.Response(503, request=request).raise_for_status()
        except httpx.HTTPStatusError:
            raise KeyboardInterrupt  # noqa: B904 - as a signal does


CODES = [
    (InputError("bad"), 2),
    (PassingError("later"), 75),
    (ShutOutError("out"), 77),
    (OSError(errno.ENOSPC, "No space left on device"), 75),
    (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 75),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: type(value).__name__)
def test_every_end_is_one_line_and_its_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: list[str]) -> None:
        raise error

    assert command(fails)([]) == code
    heard = capsys.readouterr()
    assert len(heard.err.splitlines()) == 1 and not heard.out
    table = (Path(__file__).parents[2] / "docs" / "operator.md").read_text()
    assert f"\n| {code} |" in table


@pytest.mark.parametrize("error", [PassingError("later"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_that_ends_again_and_again_is_started_later_each_time(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    said: list[str] = []

    def start(ends: Exception | None, *, rounds: int = 0) -> None:
        with longer_each_time(tmp_path, say=said.append, sleep=waited.append):
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write("{}\n" * rounds)
            if ends is not None:
                raise ends

    def ended(*ends: tuple[Exception, int]) -> list[float]:
        waited.clear()
        for problem, rounds in ends:
            with pytest.raises(type(problem)):
                start(problem, rounds=rounds)
        return list(waited)

    monkeypatch.setenv("INVOCATION_ID", "systemd's")
    assert ended(*[(error, 0)] * 9) == [30, 90, 210, 450, 930, 1770, 1770, 1770]  # and nothing the first time
    assert len(said) == 8 and str(error) in said[0]
    assert ended((error, 2), (error, 0)) == [30]  # a round was done: as the first
    assert ended((InputError("bad"), 0), (error, 0)) == [90]  # bad input waits for nobody
    start(None)
    assert ended((error, 0)) == []
    (tmp_path / "ends_in_a_row").write_text("half a li")
    assert ended((error, 0)) == []
    monkeypatch.delenv("INVOCATION_ID")
    assert ended(*[(error, 0)] * 3) == []  # started by hand


def test_units_start_again_what_passes_and_nothing_else() -> None:
    server_unit, client_unit = ((DEPLOY / f"fedlr-{name}.service").read_text() for name in ("server@", "client"))
    assert "Restart=on-failure" in server_unit and "RestartPreventExitStatus=2\n" in server_unit
    assert "Restart=always" in client_unit and "RestartPreventExitStatus=77\n" in client_unit


@pytest.mark.parametrize(
    ("date", "is_out"), [("Mon, 30 Nov 2026 06:00:01 GMT", True), ("Mon, 30 Nov 2026 09:00:00 GMT", False)]
)
def test_a_device_that_was_revoked_while_connected_says_so_and_ends(date: str, is_out: bool) -> None:
    def refused() -> Any:
        request = httpx.Request("POST", "https://x", headers={TIMESTAMP_HEADER: "2026-11-30T06:00:00+00:00"})
        httpx.Response(401, request=request, headers={"date": date}).raise_for_status()

    said: list[str] = []
    if is_out:
        with pytest.raises(ShutOutError, match="revoked"):
            step(connection(refused), cast(Device, None), say=said.append, outage=Outage(said.append))
    else:
        assert (
            not step(connection(refused), cast(Device, None), say=said.append, outage=Outage(said.append))
            and len(said) == 1
        )


def test_a_run_that_has_not_begun_is_not_called_one_without_privacy() -> None:
    text = status_line(RunStatus(name="ward", num_rounds=3, last_line_unix_s=1.0))
    assert "no privacy" not in text and "before training" in text
