"""A run that hides whole clients: charged before it is published, silent about who took part, resumed, refused by name.

Mutants killed: a round that is not charged; noise beside the aggregate and not in it; a cohort that is told of; an
empty cohort that is skipped; a cohort that is capped, of a fixed size, drawn again when empty, or drawn as one.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

import fedlr.rounds.round
from fedlr.adapters.state import ClientUpdate
from fedlr.config.unit_methods import REASONS
from fedlr.errors import InputError
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.charges import read_ledger
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.privacy.statement import recompute
from fedlr.rounds.client_unit import ClientUnit
from fedlr.rounds.cohorts import poisson_cohort
from fedlr.rounds.round import Dropout, RoundRequest, ServerState, run_round
from fedlr.runs.directory import CLIENTS, METRICS, SERVER_LEDGER, SUMMARY
from fedlr.simulations.client_unit import client_unit, cohort_draws
from fedlr.simulations.federation import Federation
from fedlr.simulations.ledgers import create_server_ledger
from fedlr.simulations.plan import make_plan
from fedlr.simulations.resume import resume
from fedlr.simulations.simulate import run_rounds, simulate
from fedlr.streams import SeededRandomness
from fedlr.training.threads import torch_threads
from tests.simulations.small_runs import experiment, federation, quiet
from tests.training.small_models import mutant

CLIENT = ("privacy=client", "privacy.client_epsilon=20", "privacy.accountant=rdp")
POISSON = (*CLIENT, "cohort=poisson")


def nothing(line: str) -> None:
    """Say nothing."""


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client_unit")
    return simulate(experiment(*POISSON, f"tracking.output_dir={folder}"), say=nothing)


def test_a_run_states_the_unit_whom_it_trusts_and_the_epsilon_of_its_rounds(run_dir: Path) -> None:
    told = json.loads((run_dir / "privacy.json").read_text(encoding="utf-8"))
    (mechanism,) = told["mechanisms"]
    event = PoissonSampler(0.75).dp_event(mechanism["noise_multiplier"])
    assert told["epsilon"]["maximum"] == epsilon([(event, 2)], told["delta"], accountant="rdp") <= 20
    assert told["delta"] == pytest.approx(4**-1.1)
    assert mechanism["sample_rate"] == 0.75 and mechanism["divisor"] == 3.0 and mechanism["num_rounds"] == 2
    assert "one client" in told["statement"] and "server is trusted" in told["statement"]
    assert "clear" in told["trusted"][0] and "Poisson" in told["amplification"]
    assert recompute(run_dir) == told
    assert told["statement"] in (run_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "one client, with all of its training examples" in page and "The server is trusted" in page


def test_nothing_that_a_run_writes_tells_who_took_part(run_dir: Path) -> None:
    assert (run_dir / CLIENTS).read_text() == ""
    for row in rows(run_dir / METRICS)[1:]:
        assert row["num_trained"] is row["num_rejected"] is row["num_refused"] is None
        assert row["reasons"] == row["aggregation_error_by_layer"] == {} and row["aggregation_error"] is None
    sent = [row["bytes_up"] for row in rows(run_dir / METRICS)[1:]]
    assert len(set(sent)) == 1  # of three clients, however many were drawn
    assert not (run_dir / "ledger.jsonl").exists()
    summary = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    assert summary["privacy"] == "dp of clients" and summary["unit"] == "client"
    assert summary["epsilon_max"] == summary["epsilon_client"] and summary["delta"] == summary["delta_client"]


def test_a_statement_that_says_less_than_the_ledger_is_refused(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    told = json.loads((copy / "privacy.json").read_text(encoding="utf-8"))
    told["epsilon"]["maximum"] /= 2
    (copy / "privacy.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(InputError, match="other values of epsilon"):
        recompute(copy)
    (copy / SERVER_LEDGER).unlink()
    with pytest.raises(InputError, match=SERVER_LEDGER):
        recompute(copy)


def test_both_units_are_two_statements_and_no_sum(tmp_path: Path) -> None:
    both = (*CLIENT, "privacy.epsilon=8", f"tracking.output_dir={tmp_path}")
    run_dir = simulate(experiment(*both), say=nothing)
    told = json.loads((run_dir / "privacy.json").read_text(encoding="utf-8"))
    clients = told["client_unit"]
    assert told["unit"] == "one training example of one client" and told["epsilon"]["maximum"] <= 8
    assert clients["unit"] == "one client, with all of its training examples" and clients["epsilon"]["maximum"] <= 20
    assert clients["amplification"].startswith("none") and "never added" in told["statement"]
    assert recompute(run_dir) == told
    last = rows(run_dir / METRICS)[-1]
    assert last["epsilon_max"] == told["epsilon"]["maximum"] and last["epsilon_client"] == clients["epsilon"]["maximum"]
    summary = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    assert summary["privacy"] == "dp of rows and of clients" and summary["delta"] == 1e-5


class Pool:
    """Clients whose updates move every tensor of the block by a number of their own; it notes when it was asked."""

    def __init__(self, moves: Sequence[float], events: list[str] | None = None) -> None:
        self.moves, self.events = moves, events if events is not None else []

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        self.events.append("trained")
        for client in cohort:
            tensors = {
                slot: t + self.moves[client]
                for slot, t in task.broadcast.items()
                if slot.role in task.block or slot in task.block
            }
            yield ClientUpdate(client, tensors, 1.0, task.round_index)


class Watched(PrivacyLedger):
    """A ledger that notes when it is written."""

    events: list[str]

    def reserve(self, *arguments: Any, **more: Any) -> Any:
        self.events.append("charged")
        return super().reserve(*arguments, **more)

    def settle_all(self, *arguments: Any, **more: Any) -> None:
        self.events.append("settled")
        super().settle_all(*arguments, **more)


MECHANISM = Mechanism(noise_multiplier=0.5, max_grad_norm=1.0, sample_rate=0.75, divisor=3.0)


def a_unit(tmp_path: Path, events: list[str] | None = None) -> ClientUnit:
    budget = PrivacyBudget(1e3, 0.1)
    ledger = Watched.create(
        tmp_path / "server.jsonl", budget, dataset_id="x", randomness="seeded", accountant="rdp", unit="client"
    )
    ledger.events = events if events is not None else []
    return ClientUnit(MECHANISM, ledger, randomness=SeededRandomness(0), cohort_size=3)


def moved(before: ServerState, after: ServerState) -> float:
    return max(float((after.adapter.tensors[s] - before.adapter.tensors[s]).abs().max()) for s in after.adapter.tensors)


@pytest.mark.parametrize("method", ["fedavg", "fedsvd", "fedadam", "fedavgm", "fedit"])
def test_a_round_is_charged_before_a_client_trains_and_an_empty_cohort_is_noised(method: str, tmp_path: Path) -> None:
    f, events = federation(*CLIENT, f"method={method}"), []
    unit = a_unit(tmp_path, events)
    after, told = run_round(f.start, (0, 2), pool=Pool([0.1, 0.2, 0.3], events), method=f.method, client_unit=unit)
    assert events == ["charged", "trained", "settled"]
    assert told.is_secret and told.cohort == told.trained == told.dropouts == () and moved(f.start, after) > 0
    empty, also = run_round(after, (), pool=Pool([]), method=f.method, client_unit=unit)
    assert moved(after, empty) > 0 and (also.bytes_up, also.bytes_down) == (told.bytes_up, also.bytes_down)


def test_one_client_moves_what_is_published_by_the_bound_over_the_divisor(tmp_path: Path) -> None:
    f = federation(*CLIENT, "method=fedavg")
    found = []  # under the same noise, which is in no difference
    for number, (cohort, moves) in enumerate([((0, 1), [0.1, 1e5]), ((0,), [0.1]), ((0, 1, 2), [0.1, 1e5, -1e5])]):
        (tmp_path / str(number)).mkdir()
        unit = a_unit(tmp_path / str(number))
        after, _ = run_round(f.start, cohort, pool=Pool(moves), method=f.method, client_unit=unit)
        tensors = after.adapter.tensors
        found.append(torch.cat([tensors[s].flatten().double() for s in sorted(tensors)]))
    assert float((found[0] - found[1]).norm()) == pytest.approx(1 / 3, rel=1e-4)
    assert float((found[2] - found[0]).norm()) == pytest.approx(1 / 3, rel=1e-4)


def test_a_round_that_is_run_again_is_the_same_release_or_another_charge(tmp_path: Path) -> None:
    unit = a_unit(tmp_path)
    for _ in range(2):
        unit.charge(0, "what it asks")
    assert len(read_ledger(tmp_path / "server.jsonl")[1].of(0)) == 1
    with pytest.raises(InputError, match="already_reserved"):
        unit.charge(0, "something else")


def test_with_fresh_noise_a_round_that_is_run_again_is_charged_again(tmp_path: Path) -> None:
    budget = PrivacyBudget(12.0, 0.1)
    make: dict[str, Any] = {"dataset_id": "x", "randomness": "os", "accountant": "rdp", "unit": "client"}
    ledger = PrivacyLedger.create(tmp_path / "server.jsonl", budget, **make)
    unit = ClientUnit(MECHANISM, ledger, randomness=SeededRandomness(0), cohort_size=3)
    with pytest.raises(InputError, match="client_epsilon"):
        for _ in range(50):
            unit.charge(0, "the same round")
    charges = read_ledger(tmp_path / "server.jsonl")[1].of(0)
    assert len(charges) > 1 and ledger.spent(0) <= 12.0


def test_a_killed_run_ends_as_if_it_were_not_and_is_charged_once(tmp_path: Path) -> None:
    f = federation(*POISSON, "tracking.checkpoint_every=1")
    one = whole(f, tmp_path / "one")
    cut, killed = tmp_path / "two", 0

    def stop(row: Any) -> None:
        nonlocal killed
        killed += 1
        if killed == 2:
            raise KeyboardInterrupt

    cut.mkdir()
    ledger = create_server_ledger(f, cut / SERVER_LEDGER)
    with pytest.raises(KeyboardInterrupt), torch_threads(1):
        run_rounds(f, cut, ledger=None, server_ledger=ledger, progress=quiet(f.experiment), track=stop)
    with torch_threads(1):
        state, *_ = run_rounds(f, cut, ledger=None, server_ledger=ledger, progress=quiet(f.experiment))
    assert state.adapter.fingerprint() == one.adapter.fingerprint()
    charges = read_ledger(cut / SERVER_LEDGER)[1].of(0)
    assert sorted(charges) == [0, 1] and charges[0].is_repeated


def whole(f: Federation, folder: Path) -> ServerState:
    folder.mkdir()
    ledger = create_server_ledger(f, folder / SERVER_LEDGER)
    with torch_threads(1):
        return run_rounds(f, folder, ledger=None, server_ledger=ledger, progress=quiet(f.experiment))[0]


def test_a_run_directory_is_finished_from_its_checkpoint_with_the_server_s_ledger(
    run_dir: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(run_dir, cut)
    for name in (SUMMARY, "privacy.json", "report.html"):
        (cut / name).unlink()
    away = (cut / SERVER_LEDGER).read_bytes()
    (cut / SERVER_LEDGER).unlink()
    with pytest.raises(InputError, match=SERVER_LEDGER):
        resume(cut, say=nothing)
    (cut / SERVER_LEDGER).write_bytes(away)
    resume(cut, say=nothing)
    for name in ("privacy.json", METRICS):
        assert (cut / name).read_bytes() == (run_dir / name).read_bytes()


LATE = (
    "        client_unit.charge(state.round_index, client_unit.asked(task.fingerprint(), state.adapter))\n"
    "        max_update_ratio = None\n",
    "        max_update_ratio = None\n",
)
ROUNDS = {
    "not charged": LATE,
    "noise after the aggregate": (
        "updates = iter([client_unit.release(updates, expected, round_index=state.round_index, before=state.adapter)])",
        "client_unit.release(iter(()), expected, round_index=state.round_index)",
    ),
    "told of": (
        "            cohort=(),\n            trained=(),",
        "            cohort=tuple(cohort),\n            trained=(),",
    ),
    "an empty cohort is skipped": (
        "updates = iter([client_unit.release(",
        "updates = iter(() if not cohort else [client_unit.release(",
    ),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_rounds_that_charge_nothing_tell_or_leave_noise_out_are_seen(name: str, tmp_path: Path) -> None:
    module, f, events = mutant(fedlr.rounds.round, ROUNDS[name]), federation(*CLIENT, "method=fedavg"), []
    unit, start = a_unit(tmp_path, events), f.start
    with pytest.raises((AssertionError, ValueError)):
        after, told = module.run_round(start, (0, 2), pool=Pool([0.1] * 3, events), method=f.method, client_unit=unit)
        assert events == ["charged", "trained", "settled"] and told.cohort == ()
        change = torch.cat(
            [(after.adapter.tensors[s] - start.adapter.tensors[s]).flatten() for s in start.adapter.tensors]
        )
        assert len(change[change != 0].unique()) > 100  # of noise each number is its own
        empty, _ = module.run_round(after, (), pool=Pool([]), method=f.method, client_unit=unit)
        assert moved(after, empty) > 0


def test_a_mechanism_without_a_ledger_is_no_run() -> None:
    with pytest.raises(ValueError, match="server's ledger"):
        client_unit(federation(*CLIENT), None)


REFUSED = {
    "fedex_lora": "ExactResidual",
    "fedask": "FedAsk",
    "fedrot_lora": "FedRot",
    "lora_fair": "LoraFair",
    "lora_fair_ridge": "LoraFairRidge",
    "as_lora": "ScoredMean",
    "hetlora": "",
    "flora": "stack_and_fold",
    "flexlora": "svd_redistribution",
    "layer_mean": "LayerMean",
    "scaffold": "remember",
    "fedsa_lora": "keep",
}


@pytest.mark.parametrize("method", REFUSED)
def test_rules_without_a_proof_are_refused_by_name_before_anything_is_read(method: str) -> None:
    more = ("adapter.client_ranks=[2,4]",) if method == "never" else ()
    with pytest.raises(InputError, match=f"method={method}.*got client") as refused:
        make_plan(experiment(*CLIENT, f"method={method}", "data.num_examples=8", *more))
    assert REFUSED[method] in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_every_rule_of_the_project_is_proven_or_has_a_reason() -> None:
    from fedlr.config.parts import PARTS

    named = {path.rpartition(".")[2] for path in PARTS["method.aggregate"].values()}
    assert named - REASONS.keys() == {"weighted_mean", "FedAvgM", "FedAdam", "FedYogi"}


STOPS = ("data.num_validation=0.2", "data.public=true", "patience=1", "num_rounds=4")
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no budget": (("privacy.unit=client",), "privacy.client_epsilon"),
    "a budget of nobody": (("privacy.client_epsilon=3",), "privacy.unit=client"),
    "no privacy": (("privacy=none", "privacy.unit=client", "privacy.client_epsilon=3"), "privacy=client"),
    "flower": ((*CLIENT, "runtime=flower"), "runtime=local"),
    "superlink": ((*CLIENT, "runtime=superlink"), "runtime=local"),
    "sizes": ((*CLIENT, "weighting=examples"), "weighting=uniform"),
    "one client": ((*CLIENT, "num_clients=1", "cohort_size=1"), "two clients"),
    "capped": ((*POISSON, "privacy.max_participations=1", "cohort_size=1"), "max_participations=null"),
    "both and a secret cohort": ((*POISSON, "privacy.epsilon=3"), "cohort=fixed"),
    "a secret cohort of devices": (("cohort=poisson", "runtime=superlink"), "cohort=fixed"),
    "stops early": ((*CLIENT, *STOPS), "patience=null with privacy.unit=client"),
    "a secret cohort that stops early": (
        ("privacy=none", "cohort=poisson", *STOPS),
        "patience=null with cohort=poisson",
    ),
    "ranks": ((*CLIENT, "method=flexlora", "adapter.client_ranks=[4,2,2,1]"), "client_ranks=null"),
}


@pytest.mark.parametrize("overrides", WRONG.values(), ids=WRONG)
def test_what_does_not_go_together_is_one_clear_error(overrides: tuple[tuple[str, ...], str]) -> None:
    given, named = overrides
    with pytest.raises(InputError, match=named):
        experiment(*given)


def test_too_little_noise_is_refused_with_what_it_would_spend() -> None:
    with pytest.raises(InputError, match="client_noise_multiplier.*spends"):
        make_plan(experiment(*CLIENT, "privacy.client_noise_multiplier=0.01"))


def test_plan_says_unit_epsilon_and_trust() -> None:
    plan = make_plan(experiment(*POISSON, "privacy.client_delta=0.3"))
    assert "of one client after 2 rounds" in plan and "server is trusted" in plan and "by chance 0.75" in plan
    assert "privacy.client_delta=0.3 is 1 / num_clients or more" in plan
    assert "no amplification by sampling" in make_plan(experiment(*CLIENT))


Draw = Callable[[int], tuple[int, ...]]


def check_poisson(draw: Draw, *, num_clients: int, rate: float, draws: int) -> None:
    """Fail unless every client is in by itself, with the rate: sizes are binomial, pairs are independent.

    Each of the bounds is 7 standard errors of its statistic: false alarms below 1e-10 in all.
    """
    found = np.zeros((draws, num_clients))
    for number in range(draws):
        found[number, list(draw(number))] = 1
    sd = (rate * (1 - rate) / draws) ** 0.5
    assert np.abs(found.mean(axis=0) - rate).max() < 7 * sd
    centred = found - rate
    covariance = centred.T @ centred / draws
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 7 * rate * (1 - rate) / draws**0.5
    empty = binom.pmf(0, num_clients, rate)
    assert abs((found.sum(axis=1) == 0).mean() - empty) < 7 * (empty * (1 - empty) / draws) ** 0.5


def test_cohorts_are_poisson_over_the_fixed_population() -> None:
    draw = cohort_draws(federation(*POISSON, "num_clients=6", "cohort_size=1"))
    assert draw is not None and draw(3) == draw(3)
    check_poisson(draw, num_clients=6, rate=1 / 6, draws=3_000)


def a_draw(generator: np.random.Generator) -> tuple[int, ...]:
    return poisson_cohort(generator, num_clients=6, sample_rate=1 / 6)


OTHER_DRAWS: dict[str, Callable[[np.random.Generator], tuple[int, ...]]] = {
    "capped": lambda g: a_draw(g)[:1],
    "drawn again": lambda g: a_draw(g) or a_draw(g),
    "of a fixed size": lambda g: (int(g.integers(6)),),
    "all or nobody": lambda g: tuple(range(6)) if g.random() < 1 / 6 else (),
}


@pytest.mark.parametrize("draw", OTHER_DRAWS.values(), ids=OTHER_DRAWS)
def test_cohorts_that_are_not_poisson_are_found(draw: Callable[[np.random.Generator], tuple[int, ...]]) -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(AssertionError):
        check_poisson(lambda number: draw(generator), num_clients=6, rate=1 / 6, draws=3_000)
