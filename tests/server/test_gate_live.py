"""Hostile replies through a real SuperLink and the proxy: each is refused by its name, and honest devices go on.

A device may also lie beneath Flower's records, in the objects that the SuperLink stores and passes on, or die in the
middle of an upload (`fedlr.server.reply_grid`).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import pytest

import fedlr.server.link
from fedlr.config.schema import DeploymentSection
from fedlr.flower.node_key import create_node_key
from fedlr.rounds.round import ServerState, run_round
from fedlr.server.enrol import SuperLink, register
from fedlr.server.link import flower_run
from fedlr.server.pool import GridPool
from fedlr.server.reply_grid import ReplyGrid
from tests.server.hostile_devices import HONEST, OBJECTS, SILENT
from tests.server.live_superlink import QUIET, Running, proxy, superlink
from tests.server.malformed import CANARY, CLASSES, HEAVY
from tests.server.small_federation import FEDIT, TERMS, Listening, Outcomes, adapter, reasons

Site = tuple[Running, Running]
LIGHT = [name for name in CLASSES if name not in HEAVY]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    limits = ("--requests-per-second", "2000", "--max-connections-per-peer", "100")  # all devices have one address
    with superlink(folder) as behind, proxy(folder, behind, *limits) as door:
        yield behind, door


@dataclass(frozen=True)
class Connected:
    """Which node is which client."""

    grid: ReplyGrid
    node_ids: Sequence[int]

    def online(self) -> Mapping[int, int]:
        here = set(self.grid.get_node_ids())
        return {client: node for client, node in enumerate(self.node_ids) if node in here}


@contextmanager
def federation(
    site: Site, folder: Path, plan: Sequence[Sequence[str]], monkeypatch: pytest.MonkeyPatch, *, deadline_s: float
) -> Iterator[GridPool]:
    """Start the devices, each with the classes it answers, and yield a pool over them."""
    behind, door = site
    ca = behind.log.parent / "ca.crt"
    (folder / "ca.crt").write_bytes(ca.read_bytes())
    keys = [create_node_key(folder / f"device-{number}.key") for number in range(len(plan))]
    lines = [
        key.read_text() for key in sorted(folder.glob("*.pub"), key=lambda p: int(p.name.split("-")[1].split(".")[0]))
    ]
    assert len(keys) == len(lines)
    node_ids = register(SuperLink(behind.address, ca), lines)
    (folder / "plan.json").write_text(json.dumps({"address": door.address, "devices": plan}))
    monkeypatch.setattr(fedlr.server.link, "HttpGrid", ReplyGrid, raising=False)
    deployment = DeploymentSection(
        superlink=behind.address,
        root_certificates=str(ca),
        superexec_secret=str(ca.with_name("secret")),
        roster="",
        min_updates=1,
        round_deadline_s=deadline_s,
        max_attempts=1,
        poll_s=0.1,
        rehearsal=True,
    )
    with (folder / "devices.log").open("wb") as log:
        command = [sys.executable, "-m", "tests.server.hostile_devices", str(folder)]
        devices = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | QUIET, cwd=Path(__file__).parents[2]
        )
    try:
        while b"connected" not in (folder / "devices.log").read_bytes():
            assert devices.poll() is None, (folder / "devices.log").read_text()
            time.sleep(0.05)
        with flower_run(deployment) as grid:
            assert isinstance(grid, ReplyGrid)
            grid.most_bytes = 1000
            pool = GridPool(
                grid,
                Connected(grid, node_ids),
                terms=TERMS,
                enrolled=adapter(),
                deadline_s=deadline_s,
                quorum=len(plan),
                poll_s=0.1,
                say=print,
            )
            yield pool
    finally:
        (folder / "stop").touch()
        try:
            devices.wait(20)
        finally:
            devices.kill()
            devices.wait()


def words(name: str) -> set[str]:
    """Return the reasons by which a class may be refused; what lies beneath records may look like no answer at all."""
    return {CLASSES[name][0]} if name in CLASSES else {"no_reply", "malformed"}


@pytest.mark.parametrize(
    ("num_hostile", "num_rounds"),
    [(8, 2), pytest.param(10, 20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
    ids=["16", "200"],
)
def test_hostile_replies_through_a_superlink_change_nothing_and_honest_ones_all_count(
    num_hostile: int,
    num_rounds: int,
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    kinds = islice(cycle([*OBJECTS, *LIGHT[:: 1 if num_rounds > 2 else 16]]), num_hostile * num_rounds)
    by_round = [list(islice(kinds, num_hostile)) for _ in range(num_rounds)]
    plan = [*zip(*by_round, strict=True), (HONEST,), (HONEST,)]
    honest, state, num_refused = [num_hostile, num_hostile + 1], ServerState(adapter()), 0
    with federation(site, tmp_path, plan, monkeypatch, deadline_s=120) as pool:
        for sent in by_round:
            heard = Listening(pool)
            after, diagnostics = run_round(state, range(len(plan)), pool=heard, method=FEDIT)
            assert list(diagnostics.trained) == honest, (diagnostics.dropouts, (tmp_path / "devices.log").read_text())
            refused = reasons(diagnostics)
            assert refused.keys() == set(range(num_hostile))
            assert all(refused[client] in words(name) for client, name in enumerate(sent)), list(
                zip(sent, refused.values(), strict=True)
            )
            updates = Outcomes([outcome for outcome in heard.outcomes if outcome.client_id in honest])
            alone, _ = run_round(state, honest, pool=updates, method=FEDIT)
            assert after.adapter.fingerprint() == alone.adapter.fingerprint() != state.adapter.fingerprint()
            state, num_refused = after, num_refused + len(refused)
    assert num_refused == num_hostile * num_rounds
    said = capfd.readouterr()
    logs = "".join(server.log.read_text(errors="replace") for server in site)  # of the SuperLink and the proxy
    assert CANARY not in said.out + said.err + caplog.text + logs


def test_a_device_that_dies_in_the_middle_of_its_upload_does_not_hold_up_the_round(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with federation(site, tmp_path, [[SILENT, HONEST], [HONEST]], monkeypatch, deadline_s=8) as pool:
        state, diagnostics = run_round(ServerState(adapter()), [0, 1], pool=pool, method=FEDIT)
        assert diagnostics.trained == (1,) and reasons(diagnostics) == {0: "deadline"}  # and no error after 180 s
        _, diagnostics = run_round(state, [0, 1], pool=pool, method=FEDIT)
        assert diagnostics.trained == (0, 1)
