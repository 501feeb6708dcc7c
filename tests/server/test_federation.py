"""A federation over messages is the simulation: same numbers, and whatever ends in between comes back.

Mutants these tests reject: a device that trains again instead of sending what it released; a server that counts an
abandoned round, or goes on with lines of a round that was never committed; a pool that waits beyond its deadline, asks
below quorum, or takes an enrolled adapter for granted; seeded noise used for two different tasks.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedlr.client.device as device_module
from fedlr.adapters.state import ROLES, SIDE_A, SIDE_B
from fedlr.client.device import Device
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.flower.messages import Reply, Request
from fedlr.flower.records import RecordDict
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.reported import reported_statement
from fedlr.rounds.round import RoundRequest, scored
from fedlr.runs.directory import LEDGER
from fedlr.server.run import Run
from fedlr.server.view.adapter_files import find_adapter
from fedlr.server.view.refusals import NotThere
from fedlr.simulations.federation import assemble
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.signatures import is_reported, verify
from fedlr.simulations.simulate import run_rounds
from fedlr.training.threads import torch_threads
from tests.server.whole_federation import SMALL, Federation, close_all, difference, experiment, lines
from tests.simulations.small_runs import quiet


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    close_all()


class Killed(SystemExit):
    """Stands for SIGKILL: nothing that handles errors sees it."""


def simulated(folder: Path, *overrides: str) -> Any:
    """Return the last state of the same experiment in one process."""
    e = compose_experiment([*SMALL, *overrides])
    folder.mkdir()
    with torch_threads(1):
        f = assemble(e, seed=e.seed or 0)
        state, *_ = run_rounds(f, folder, ledger=create_ledger(f, folder / LEDGER), progress=quiet(e))
    return state


@contextmanager
def killed_at(owner: Any, name: str, *, call: int = 1, after: bool = False) -> Iterator[None]:
    """Kill whoever makes the call number `call` of a method, before or after it."""
    original, calls = getattr(owner, name), []

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        found = original(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return found

    setattr(owner, name, deadly)
    try:
        yield
    finally:
        setattr(owner, name, original)


AUTOMATIC = (
    "trainer.optimizer.lr=auto",
    "trainer.divisor=auto",
    "server_momentum=0.5",
    "average_last=2",
    "adapter.train_head=true",
)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("method=ffa_lora", "trainer.engine=opacus"),
        ("method=scaffold",),
        ("method=fedsa_lora",),
        ("method=renewal",),
        ("method=rolora", "privacy=none"),
        ("method=flexlora", "adapter.client_ranks=[2,4]"),
        ("method=hetlora", "adapter.client_memory_mb=[0.02,1]", "method.client.weight=0.5"),
        ("adapter.init_lora_weights=pissa", "method=ffa_lora"),
        # Layers whose product is averaged, by another system.
        pytest.param(("method=layer_mean", "adapter=dora", "trainer.engine=opacus"), marks=pytest.mark.slow),
        ("method=layer_mean", "adapter=tuner", "adapter.system=hra", "trainer.engine=opacus"),
        ("method=rank_growth",),
        # Ranks that change, by another rule.
        pytest.param(
            ("method=rank_energy", "method.finalise.keep=0.5", "method.finalise.period=1", "trainer.engine=opacus"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("method=dylora", "privacy=none"), marks=pytest.mark.slow),
        ("method=selective_layers",),
        AUTOMATIC,
    ],
    ids=lambda o: " ".join(o) or "fedsvd",
)
def test_devices_train_what_the_simulation_trains(overrides: tuple[str, ...], tmp_path: Path) -> None:
    done = Federation(experiment(*overrides), tmp_path).finish()
    expected = simulated(tmp_path / "simulated", *overrides)
    assert done.progress.state.round_index == expected.round_index
    assert difference(scored(done.progress.state), expected) <= 1e-6  # what is released
    ours, theirs = (lines(folder / "metrics.jsonl") for folder in (done.run_dir, tmp_path / "simulated"))
    for key in ("bytes_up", "bytes_down", "num_trained"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter.init_lora_weights=lora_ga",),
        ("adapter=lora_xs", "method=fedavg", "trainer.engine=opacus", "adapter.init_lora_weights=lora_sb"),
    ],
    ids=lambda o: o[-1].rpartition("=")[2],
)
def test_a_start_from_public_gradients_reaches_devices_without_the_table(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    table = tmp_path / "public.csv"
    table.write_text("text,label\n" + "film was fine,no\nthe plot is good,yes\n" * 9, encoding="utf-8")
    given = (*overrides, f"adapter.public={{path: {table}, labels: ['no', 'yes']}}")
    expected = simulated(tmp_path / "simulated", *given)
    f = Federation(experiment(*given), tmp_path)
    run = f.start()
    table.unlink()
    run.rounds(f.pool(run))
    assert sum(f.charges()) == 9, "three clients in each of three rounds"
    assert difference(run.progress.state, expected) <= 1e-6
    run.leave_behind()
    assert str(table) in json.loads((run.run_dir / "privacy.json").read_text(encoding="utf-8"))["start"]


def test_the_base_model_is_loaded_once_a_device_and_the_adapter_given_once(tmp_path: Path) -> None:
    f = Federation(experiment("cohort_size=4"), tmp_path)
    sizes: list[int] = []
    for client, answer in list(f.grid.answers.items()):

        def measured(record: RecordDict, answer: Any = answer, client: int = client) -> Any:
            if client == 0:
                sizes.append(sum(len(a.data) for part in record.array_records.values() for a in part.values()))
            return answer(record)

        f.grid.answers[client] = measured
    f.finish()
    assert [device.num_models_loaded for device in f.devices] == [1, 1, 1, 1]
    assert sizes[0] > sizes[1] == sizes[2]


def test_a_served_adapter_has_its_side_and_a_checkpoint_without_it_is_not_served(tmp_path: Path) -> None:
    run = Federation(experiment("method=flora", "num_rounds=1"), tmp_path).finish()
    found = find_adapter(run.run_dir, 1)
    assert {name.rpartition("|")[2] for name in load_file(found.path)} == {*ROLES, SIDE_A, SIDE_B}
    found.path.unlink()
    with pytest.raises(NotThere):
        find_adapter(run.run_dir, 1)


def test_a_run_leaves_behind_what_a_simulation_does(tmp_path: Path) -> None:
    run = Federation(experiment(), tmp_path).finish()
    run.leave_behind()
    found = {path.name for path in run.run_dir.iterdir()}
    assert {"adapter", "clients.jsonl", "config.yaml", "metrics.jsonl", "privacy.json", "report.html"} <= found
    assert {"summary.json", "versions.json", "checkpoints", "adapters", "identity.json"} <= found
    assert len(list((run.run_dir / "adapters").iterdir())) == 3


SERVER_DEATHS = {
    "before the first round": ("fedlr.server.run.Run", "_finished", 1, False),
    "with half a cohort asked": ("fedlr.server.pool.GridPool", "_push", 5, False),
    "with everybody asked": ("fedlr.server.pool.GridPool", "_take", 4, False),
    "with half a cohort heard": ("fedlr.server.pool.GridPool", "_take", 5, True),
    "after the aggregate": ("fedlr.server.run.Run", "_finished", 2, False),
    "after the lines, before the checkpoint": ("fedlr.server.run", "save_checkpoint", 3, False),
    "after the checkpoint": ("fedlr.server.run", "save_checkpoint", 3, True),
}


@pytest.mark.parametrize("death", SERVER_DEATHS, ids=lambda death: death)
def test_a_server_that_dies_goes_on_to_the_same_bits_and_spends_nothing_twice(death: str, tmp_path: Path) -> None:
    from pkgutil import resolve_name

    f = Federation(experiment(), tmp_path)
    expected = f.finish("uninterrupted")
    charges, g = (
        f.charges(),
        Federation(experiment(), tmp_path / "again" if (tmp_path / "again").mkdir() is None else tmp_path),
    )
    owner, name, call, after = SERVER_DEATHS[death]
    with killed_at(resolve_name(owner), name, call=call, after=after), pytest.raises(Killed):
        g.finish()
    done = g.finish()
    assert done.progress.state.adapter.fingerprint() == expected.progress.state.adapter.fingerprint()
    assert g.charges() == charges
    for name in ("metrics.jsonl", "clients.jsonl"):
        ours, theirs = (lines(run.run_dir / name) for run in (done, expected))
        assert [{**row, "seconds": 0} for row in ours] == [{**row, "seconds": 0} for row in theirs]


def test_a_server_that_found_its_rate_goes_on_with_the_numbers_it_wrote(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    expected = Federation(experiment(*AUTOMATIC), tmp_path).finish("uninterrupted")
    written = (expected.run_dir / "config.yaml").read_text(encoding="utf-8")
    assert "auto" not in written and expected.served.terms.trainer == expected.experiment.trainer
    again = Federation(experiment(*AUTOMATIC), tmp_path / "again")
    with killed_at(Run, "_finished", call=2), pytest.raises(Killed):
        again.finish()
    done = again.finish()
    states = [run.progress.state.adapter for run in (done, expected)]
    assert states[0].fingerprint() == states[1].fingerprint()
    for name in states[1].memory:  # the velocity, and the models that are averaged
        assert all(torch.equal(states[0].memory[name][slot], value) for slot, value in states[1].memory[name].items())
    with pytest.raises(InputError, match="another trainer"):
        Run(experiment(*AUTOMATIC, "trainer.optimizer.lr=0.5"), done.run_dir, say=lambda line: None)
    config = done.run_dir / "config.yaml"  # as if the public rows had become more since
    config.write_text(re.sub(r"(divisor: )[\d.]+", r"\g<1>99.0", written), encoding="utf-8")
    with pytest.raises(InputError, match="another trainer"):
        Run(experiment(*AUTOMATIC), done.run_dir, say=lambda line: None)


DEVICE_DEATHS = {
    "before the reservation": ("fedlr.privacy.ledger.PrivacyLedger", "reserve", False),
    "after the reservation": ("fedlr.privacy.ledger.PrivacyLedger", "reserve", True),
    "after training": ("fedlr.privacy.ledger.PrivacyLedger", "settle_all", False),
    "after the settlement": ("fedlr.privacy.ledger.PrivacyLedger", "settle_all", True),
    "after the update is on disk": ("fedlr.client.stored_replies.Replies", "write", True),
}


@pytest.mark.parametrize("death", DEVICE_DEATHS, ids=lambda death: death)
def test_a_device_that_dies_is_asked_again_and_sends_what_it_would_have_sent(death: str, tmp_path: Path) -> None:
    from pkgutil import resolve_name

    e = experiment("cohort_size=4", "deployment.min_updates=4")
    f = Federation(e, tmp_path)
    alive = f.devices[2].answer
    asked: list[RecordDict] = []

    def dies(record: RecordDict) -> RecordDict | None:
        asked.append(record)
        if len(asked) != 2:
            return alive(record)
        owner, name, after = DEVICE_DEATHS[death]
        with killed_at(resolve_name(owner), name, after=after), pytest.raises(Killed):
            alive(record)
        f.restart(2)
        return None

    f.grid.answers[2] = dies
    done = f.finish()
    assert len(asked) == 2, "the new process answers in its place"
    assert difference(done.progress.state, simulated(tmp_path / "simulated", "cohort_size=4")) <= 1e-6
    # Seeded noise: what is computed again is the same to the bit, and charged once.
    assert f.charges() == [3, 3, 3, 3]
    rows = lines(done.run_dir / "metrics.jsonl")
    assert [row["num_trained"] for row in rows] == [0, 4, 4, 4]
    assert any("abandoned" in line for line in f.said)


def test_with_fresh_noise_a_charge_without_a_release_stays_and_the_round_is_charged_again(tmp_path: Path) -> None:
    f = Federation(replace_randomness(experiment("cohort_size=4", "deployment.min_updates=4")), tmp_path, spare=2.0)
    alive = f.devices[1].answer

    def dies(record: RecordDict) -> None:
        with killed_at(device_module.Replies, "write"), pytest.raises(Killed):
            alive(record)

    f.grid.answers[1] = dies
    run = f.start()
    next(iter_rounds(run, f))
    f.restart(1)
    run.rounds(f.pool(run))
    assert f.charges() == [3, 4, 3, 3]


def iter_rounds(run: Run, f: Federation) -> Iterator[None]:
    """Give control back after the first attempt of a round."""
    original = run._abandoned

    class Pause(Exception):
        pass

    def pause(*args: Any) -> None:
        raise Pause

    run._abandoned = pause  # type: ignore[method-assign]
    with pytest.raises(Pause):
        run.rounds(f.pool(run))
    run._abandoned = original  # type: ignore[method-assign]
    yield


def replace_randomness(e: Any) -> Any:
    """Noise of the operating system; the seed stays, for the partition of the test alone."""
    return e.model_copy(update={"privacy": e.privacy.model_copy(update={"randomness": "os"})})


def test_a_released_update_is_sent_again_byte_for_byte_and_costs_nothing(tmp_path: Path) -> None:
    f = Federation(replace_randomness(experiment()), tmp_path)
    requests: list[RecordDict] = []
    answer = f.devices[0].answer
    f.grid.answers[0] = lambda record: (requests.append(record), answer(record))[1]
    f.finish()
    spent = f.charges()
    first = Reply.read(answer(requests[-1]))
    again = Reply.read(f.restart(0).answer(requests[-1]))
    assert f.charges() == spent
    assert first.facts == again.facts
    assert all(torch.equal(first.tensors[slot], again.tensors[slot]) for slot in first.tensors)


def test_an_older_copy_of_the_ledger_is_refused_at_the_start(tmp_path: Path) -> None:
    f = Federation(experiment("cohort_size=4"), tmp_path)
    ledger = f.devices[0]._settings.ledger_path
    fresh = ledger.read_bytes()
    f.finish()
    ledger.write_bytes(fresh)
    with pytest.raises(InputError, match="older copy"):
        f.restart(0)


def test_an_update_that_does_not_say_what_was_spent_is_not_used(tmp_path: Path) -> None:
    f = Federation(experiment("cohort_size=4"), tmp_path)
    answer, silent = f.devices[3].answer, {"epsilon": None, "delta": None, "ledger_head": None}
    changes = iter([{}, silent, {"delta": 1e-3}])

    def changed(record: RecordDict) -> RecordDict:
        reply = Reply.read(answer(record))
        return replace(reply, facts=reply.facts.model_copy(update=next(changes))).record()

    f.grid.answers[3] = changed
    done = f.finish()
    fates = [row["reason"] for row in lines(done.run_dir / "clients.jsonl") if row["client_id"] == 3]
    assert fates == [None, "no_statement", "no_statement"]
    done.leave_behind()
    stated = json.loads((done.run_dir / "privacy.json").read_text())
    assert stated["num_clients_that_reported"] == 4 and stated["reported_by_clients"] and not stated["for_release"]
    assert is_reported(done.run_dir) and len(verify(done.run_dir, None)) == 5, "four unsigned, no roster"


def test_of_nobody_nothing_is_stated() -> None:
    mechanism = Mechanism(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1, divisor=1.0)
    stated = reported_statement(1e-5, {}, {}, num_clients=3, randomness="os", mechanism=mechanism)
    assert not stated["differential_privacy"] and not stated["for_release"]
    assert "3 of 3 clients reported nothing" in stated["statement"]


def test_seeded_noise_never_hides_two_different_tasks(tmp_path: Path) -> None:
    f = Federation(experiment(), tmp_path)
    requests: list[RecordDict] = []
    answer = f.devices[0].answer
    f.grid.answers[0] = lambda record: (requests.append(record), answer(record))[1]
    f.finish()
    asked = Request.read(requests[-1])
    moved = {slot: tensor + 1e-3 for slot, tensor in asked.task.broadcast.items()}
    other = replace(asked, task=replace(asked.task, broadcast=moved))
    spent = f.charges()
    reply = Reply.read(answer(other.record()))
    assert (reply.facts.refused, dict(reply.tensors)) == ("other_task", {})
    assert f.charges() == spent


def test_a_device_that_lost_its_adapter_says_so_and_is_given_it_again(tmp_path: Path) -> None:
    f = Federation(experiment("cohort_size=4", "num_rounds=3"), tmp_path)
    answer, calls = f.devices[3].answer, []

    def forgetful(record: RecordDict) -> RecordDict | None:
        calls.append(record)
        if len(calls) == 2:
            for folder in f.devices[3]._settings.experiments_dir.iterdir():
                for file in (folder / "enrolled").iterdir():
                    file.unlink()
        return answer(record)

    f.grid.answers[3] = forgetful
    done = f.finish()
    fates = [row for row in lines(done.run_dir / "clients.jsonl") if row["client_id"] == 3]
    assert [(row["status"], row["reason"]) for row in fates] == [
        ("trained", None),
        ("refused", "not_enrolled"),
        ("trained", None),
    ]


def test_a_round_ends_at_its_deadline_without_the_client_that_is_silent(tmp_path: Path) -> None:
    f = Federation(experiment("cohort_size=4", "deployment.min_updates=3"), tmp_path)
    f.grid.answers[1] = lambda record: None
    done = f.finish()
    rows = lines(done.run_dir / "metrics.jsonl")
    assert [row["num_trained"] for row in rows[1:]] == [3, 3, 3]
    assert {row["reason"] for row in lines(done.run_dir / "clients.jsonl")} == {None, "deadline"}


def test_below_quorum_nothing_changes_and_the_round_goes_on_when_clients_return(tmp_path: Path) -> None:
    f = Federation(experiment("cohort_size=4", "deployment.min_updates=3"), tmp_path)
    away = {client: f.grid.answers[client] for client in (0, 1)}
    run = f.start()
    before = run.progress.state.adapter.fingerprint()
    f.grid.answers |= {client: lambda record: None for client in away}
    next(iter_rounds(run, f))
    assert (run.progress.state.round_index, run.progress.state.adapter.fingerprint()) == (0, before)
    f.grid.answers |= away
    run.rounds(f.pool(run))
    assert difference(run.progress.state, simulated(tmp_path / "simulated", "cohort_size=4")) <= 1e-6
    assert f.charges() == [3, 3, 3, 3], "whoever had answered sends the same again"


def test_a_server_that_never_has_enough_stops_with_its_checkpoint(tmp_path: Path) -> None:
    f = Federation(experiment("deployment.min_updates=3", "deployment.max_attempts=2"), tmp_path)
    f.grid.answers |= dict.fromkeys(f.grid.answers, lambda record: None)
    with pytest.raises(InputError, match="max_attempts=2"):
        f.finish()


def test_an_absent_client_is_offline_and_not_waited_for_longer_than_the_deadline(tmp_path: Path) -> None:
    f = Federation(experiment("cohort_size=4", "deployment.min_updates=3"), tmp_path)
    del f.grid.answers[2]
    done = f.finish()
    rows = [row for row in lines(done.run_dir / "clients.jsonl") if row["client_id"] == 2]
    assert {(row["reason"], row["num_steps"]) for row in rows} == {("offline", 0)}


def test_another_experiment_does_not_go_on_in_the_directory(tmp_path: Path) -> None:
    f = Federation(experiment(), tmp_path)
    f.start()
    other = Federation(
        experiment("trainer.num_steps=1"), tmp_path / "x" if (tmp_path / "x").mkdir() is None else tmp_path
    )
    with pytest.raises(InputError, match="another trainer"):
        Run(other.experiment, tmp_path / "run", say=lambda line: None)


def test_what_goes_wrong_on_a_device_is_one_word_to_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f = Federation(experiment("cohort_size=4"), tmp_path)

    def leaks(self: Device, *args: Any) -> None:
        raise RuntimeError("private value 12345")

    monkeypatch.setattr(Device, "_pool_of", leaks)
    with pytest.raises(InputError, match=r"\(device_error\)") as refused:
        f.finish()
    ours = [line for line in f.said if "abandoned" in line]  # the server's; the others are the devices'
    assert "12345" not in "".join([str(refused.value), *ours])
    assert any("12345" in line for line in f.said), "its owner's log has it"


def test_a_task_has_one_fingerprint_and_any_change_another(tmp_path: Path) -> None:
    run = Federation(experiment(), tmp_path).start()
    from fedlr.rounds.round import request_of

    task = request_of(run.progress.state, run.served.method)
    moved = {slot: tensor + 1 for slot, tensor in task.broadcast.items()}
    others: list[RoundRequest] = [
        replace(task, round_index=1),
        replace(task, broadcast=moved),
        replace(task, control=moved),
        replace(task, block=frozenset({"lora_A"})),
        replace(task, personal=frozenset({"lora_A"})),
    ]
    assert len({one.fingerprint() for one in [task, replace(task), *others]}) == 6


def test_the_same_request_under_other_terms_is_another_computation_and_is_charged(tmp_path: Path) -> None:
    f = Federation(experiment("cohort_size=4", "num_rounds=1"), tmp_path, spare=9.0)
    requests: list[RecordDict] = []
    answer = f.devices[0].answer
    f.grid.answers[0] = lambda record: (requests.append(record), answer(record))[1]
    f.finish()
    asked = Request.read(requests[0])
    trainer = asked.terms.trainer.model_copy(update={"num_steps": 1})
    others = {"experiment_id": "0" * 32}, {"experiment_id": "1" * 32, "trainer": trainer}
    for number, changes in enumerate(others):
        other = replace(asked, terms=asked.terms.model_copy(update=changes))
        assert Reply.read(answer(other.record())).facts.refused is None
        assert f.charges()[0] == 2 + number
