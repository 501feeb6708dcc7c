"""Rates by round number: of the clients in every engine, of the server, on devices, and in what is derived from them.

Mutants this file kills: a schedule that begins anew in every round (`Restarted`); a decay that shrinks the memory of a
momentum; Adam's bias corrected by the round's number where a tensor trains in every second round.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, Slot
from fedlr.config.auto_rates import noise_of
from fedlr.errors import InputError
from fedlr.flower.terms import Terms
from fedlr.methods.aggregate.server_optimizer import FedAdam, FedAvgM
from fedlr.methods.method import full_adapter, keep
from fedlr.methods.rate_schedule import DECAYS, RateSchedule, scheduled_accumulation
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.rounds.round import ServerState
from fedlr.runs.prepare import local_training
from fedlr.simulations.federation import Federation, prepare
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.runtime import make_pool
from fedlr.training.rates import ACCUMULATED_NOISE
from tests.simulations.small_runs import experiment, federation

SLOT = Slot("layer", LORA_B)
OTHER = Slot("layer", LORA_A)


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_a_schedule_rises_to_its_whole_falls_from_there_and_never_reaches_0(name: str, warmup: int) -> None:
    factors = RateSchedule(name, warmup, 12).factors()
    assert max(factors) == factors[warmup] == 1.0 and min(factors) > 0
    assert all(a < b for a, b in pairwise(factors[: warmup + 1]))
    falling = list(pairwise(factors[warmup:]))
    assert all(a == b for a, b in falling) if name == "constant" else all(a > b for a, b in falling)
    assert RateSchedule(name, warmup, 12).over(12) == RateSchedule(name, warmup, 12)


@dataclass(frozen=True)
class Restarted(RateSchedule):
    def factor(self, round_index: int) -> float:
        return super().factor(0)


def sent(f: Federation, round_index: int, folder) -> dict[int, str]:
    """The updates of a round, by client."""
    ledger = create_ledger(f, folder / f"{len(list(folder.iterdir()))}.jsonl")
    assert isinstance(ledger, PrivacyLedger)
    pool = make_pool(f, ledger)
    outcomes = list(pool.train(f.request(round_index), [0, 1]))
    pool.close()
    assert all(isinstance(outcome, ClientUpdate) for outcome in outcomes)
    return {one.client_id: AdapterState(one.tensors, 1.0).fingerprint() for one in outcomes}  # type: ignore[union-attr]


@pytest.mark.parametrize("engine", ["fused", "opacus"])
def test_clients_train_at_the_rate_of_the_round_whatever_the_engine(engine: str, tmp_path) -> None:
    words = (f"trainer.engine={engine}", "privacy.noise_multiplier=1", "num_rounds=4", "trainer.check_parity=false")
    linear = federation(*words, "trainer.lr_schedule=linear", "trainer.optimizer.lr=2.0")
    constant = {lr: federation(*words, f"trainer.optimizer.lr={lr}") for lr in (2.0, 1.5, 0.5)}
    for round_index, lr in ((0, 2.0), (1, 1.5), (3, 0.5)):
        assert sent(linear, round_index, tmp_path) == sent(constant[lr], round_index, tmp_path)
    mutant = replace(linear, training=replace(linear.training, rates=Restarted("linear", 0, 4)))
    assert sent(mutant, 1, tmp_path) != sent(constant[1.5], 1, tmp_path)


def test_a_client_alone_goes_through_the_whole_schedule_in_its_fewer_rounds() -> None:
    f = federation("trainer.lr_schedule=linear", "num_rounds=8", "cohort_size=2", "privacy.noise_multiplier=1")
    assert f.over(4).training.rates.factors() == [1.0, 0.75, 0.5, 0.25]
    constant = federation("num_rounds=8", "cohort_size=2", "privacy.noise_multiplier=1")
    assert constant.over(4) is constant


# The server's step


def one_number(value: float = 0.0) -> AdapterState:
    return AdapterState({s: torch.full((1, 1), value).double() for s in (OTHER, SLOT)}, scale=1.0)


def walk(method, deltas, slots=(SLOT,)) -> AdapterState:
    state = ServerState(one_number())
    for number, delta in enumerate(deltas):
        now, slot = method.at(number), slots[number % len(slots)]
        update = ClientUpdate(0, {slot: state.adapter.tensors[slot] + delta}, 1.0, number)
        after = now.aggregate(state.adapter, [update])
        adapter = now.finish(state.adapter, after, frozenset({slot.role}))
        state = ServerState(adapter, number + 1)
    return state.adapter


DELTAS = (1.0, -0.3, 0.7, 0.2)
LINEAR = RateSchedule("linear", 1, 4)


def test_a_scheduled_momentum_steps_by_its_factor_and_remembers_the_whole() -> None:
    own = federation("method=ffa_lora", "server_momentum=0.5").method
    scheduled, plain = (walk(replace(own, server_rates=rates), DELTAS) for rates in (LINEAR, RateSchedule()))
    position = velocity = 0.0
    for delta, factor in zip(DELTAS, LINEAR.factors(), strict=True):
        velocity = 0.5 * velocity + delta
        position += factor * velocity
    assert scheduled.tensors[SLOT].item() == pytest.approx(position)
    assert scheduled.tensors[SLOT].item() != pytest.approx(plain.tensors[SLOT].item())
    assert scheduled.memory["server_momentum"][SLOT].item() == pytest.approx(velocity)


def test_the_rate_of_a_server_optimizer_follows_the_schedule() -> None:
    own = federation("method=fedavgm").method
    found = walk(replace(own, server_rates=LINEAR), DELTAS).tensors[SLOT].item()
    assert isinstance(own.aggregate, FedAvgM)
    position = velocity = 0.0
    for delta, factor in zip(DELTAS, LINEAR.factors(), strict=True):
        velocity = own.aggregate.momentum * velocity + delta
        position += own.aggregate.lr * factor * velocity
    assert found == pytest.approx(position)


def adam_of_torch(deltas, rates: RateSchedule) -> float:
    """Where torch's own Adam goes with these pseudo-gradients."""
    value = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([value], lr=0.1, betas=(0.9, 0.95), eps=1e-3)
    for number, delta in enumerate(deltas):
        optimizer.param_groups[0]["lr"] = 0.1 * rates.factor(number)
        value.grad = torch.full_like(value, -delta)
        optimizer.step()
    return value.item()


def test_adam_with_a_corrected_bias_and_a_decay_is_torchs() -> None:
    rule = FedAdam(lr=0.1, beta_1=0.9, beta_2=0.95, tau=1e-3, bias_correction=True)
    own = replace(federation("method=fedadam").method, aggregate=rule)
    found = walk(replace(own, server_rates=LINEAR), DELTAS).tensors[SLOT].item()
    assert found == pytest.approx(adam_of_torch(DELTAS, LINEAR), rel=1e-12)
    plain = replace(own, aggregate=replace(rule, bias_correction=False), server_rates=LINEAR)
    assert walk(plain, DELTAS).tensors[SLOT].item() != pytest.approx(found, rel=1e-3)


def test_a_tensor_that_trains_in_every_second_round_counts_its_own_steps() -> None:
    rule = FedAdam(lr=0.1, beta_1=0.9, beta_2=0.95, tau=1e-3, bias_correction=True)
    own = replace(federation("method=fedadam").method, aggregate=rule, finalise=keep, broadcast=full_adapter)
    found = walk(own, (1.0, 9.0, -0.3, 9.0, 0.7), slots=(SLOT, OTHER)).tensors[SLOT].item()
    assert found == pytest.approx(adam_of_torch((1.0, -0.3, 0.7), RateSchedule()), rel=1e-12)


# What is derived from rates, and who is told


def test_the_noise_of_scheduled_rounds_adds_up_as_one_kick_after_the_other_does() -> None:
    kicks, steps, momentum = RateSchedule("cosine", 2, 9).factors(), RateSchedule("linear", 0, 9).factors(), 0.6
    total = 0.0
    for only in range(9):
        position = velocity = 0.0
        for number in range(9):
            velocity = momentum * velocity + (kicks[number] if number == only else 0.0)
            position += steps[number] * velocity
        total += position**2
    assert scheduled_accumulation(momentum, kicks, steps) == pytest.approx(total)


def test_an_automatic_rate_gathers_the_same_noise_under_a_schedule() -> None:
    words = ("trainer.optimizer.lr=auto", "num_rounds=8", "privacy.noise_multiplier=40", "adapter.train_head=true")
    found = {}
    for more in (("trainer.lr_schedule=linear",), ("trainer.lr_schedule=cosine", "server_momentum=0.5"), ()):
        e = prepare(experiment(*words, *more), seed=0).experiment
        assert noise_of(e, (0.0, 1.0)) == pytest.approx(ACCUMULATED_NOISE, rel=1e-3)
        found[more] = e.trainer.optimizer.section()["lr"]
    assert found["trainer.lr_schedule=linear",] > found[()]


def test_a_device_is_told_the_schedule_and_hears_nothing_of_a_constant_rate() -> None:
    def terms(*words: str) -> Terms:
        e = experiment("trainer.optimizer.lr=1.0", "num_rounds=4", *words)
        about = {"experiment_id": "0" * 32, "seed": 0, "model_sha256": "0" * 64, "label_names": ["a", "b"]}
        return Terms.of(e, None, **about)  # type: ignore[arg-type]

    assert "lr_schedule" not in terms().text() and "warmup" not in terms().text()
    told = Terms.read(terms("trainer.lr_schedule=linear", "trainer.warmup_rounds=1").text())
    f = federation("trainer.lr_schedule=linear", "trainer.warmup_rounds=1", "num_rounds=4", "privacy=none")
    training = local_training(told.trainer, f.training.rule, num_rounds=told.num_rounds)
    assert training.rates == f.training.rates != RateSchedule()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trainer.lr_schedule=step",), "trainer.lr_schedule"),
        (("trainer.warmup_rounds=2",), "Expected trainer.warmup_rounds < num_rounds=2, got 2"),
        (("server_warmup_rounds=5",), "Expected server_warmup_rounds < num_rounds=2, got 5"),
        (("server_lr_schedule=linear",), "Expected server_lr_schedule=constant and server_warmup_rounds=0 for method="),
        (
            ("trainer.lr_schedule=linear", "method=scaffold"),
            "whose clients are told one rate of all rounds, got linear",
        ),
    ],
)
def test_a_schedule_that_nothing_follows_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as error:
        prepare(experiment(*words), seed=0)
    assert message in str(error.value)


def test_a_constant_schedule_leaves_rates_and_methods_as_they_are() -> None:
    f = federation()
    assert f.method.at(7) is f.method and f.training.rates.is_constant
