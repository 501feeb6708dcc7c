"""A Flower user's rounds are the simulation's, every wait in them ends, and the example runs.

Mutants this file kills: those of `MUTANTS`, compiled from the source with one text changed.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, in_block
from fedlr.errors import InputError
from fedlr.flower import FedIT, FedSVD, FfaLora, LoraFair, lora_strategy, strategy
from fedlr.flower.lora_strategy import LoraStrategy, method_named, needs_more_of_clients
from fedlr.methods.method import Always, Method, full_adapter, keep
from fedlr.methods.rate_schedule import RateSchedule
from fedlr.rounds.cohorts import sample_cohort
from fedlr.rounds.round import RoundRequest, initial_state, run_round
from tests.flower.in_process_grid import InProcessGrid, inside_a_run
from tests.flower.strategy_clients import (
    KEYS,
    METHODS,
    NODES,
    REFUSED,
    SHAPES,
    A,
    B,
    Check,
    catches_mutant,
    draw,
    failed,
    honest,
    method_of,
    quick,
    run,
    same,
    start_tensors,
    trained,
)

ROOT = Path(__file__).parents[2]


EXAMPLE = ROOT / "examples" / "flower_app"


@pytest.fixture(autouse=True)
def _inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inside_a_run(monkeypatch)


class SameClients:
    """The pool of a simulation whose clients train as `trained` does."""

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate]:
        for node in cohort:
            tensors = {
                slot: task.broadcast[slot] + 0.3 * draw(node, task.round_index + 1, key, shape=tuple(shape))
                for (key, slot), shape in zip(KEYS.items(), SHAPES, strict=True)
                if in_block(slot, task.block)
            }
            yield ClientUpdate(node, tensors, weight=1.0, base_round=task.round_index)


@pytest.mark.parametrize("zero_B", [False, True], ids=["from_any_B", "from_zero_B"])
@pytest.mark.parametrize("name", sorted(set(METHODS) - REFUSED - {"multi_krum"}))  # which needs five nodes
def test_three_rounds_are_those_of_the_simulation(name: str, zero_B: bool) -> None:
    method, tensors = method_of(name), start_tensors(zero_B=zero_B)
    adapter = AdapterState({slot: tensors[key] for key, slot in KEYS.items()}, scale=1.7)  # no rule reads the scale
    state = initial_state(adapter, method)
    for _ in range(3):
        state, _ = run_round(state, sorted(NODES), pool=SameClients(), method=method, train_head=True)
    result = run(quick(name), num_rounds=3, tensors=tensors)
    arrays = result.arrays.to_torch_state_dict()
    assert list(arrays) == list(KEYS)
    for key, slot in KEYS.items():
        assert (arrays[key] - state.adapter.tensors[slot]).abs().max() <= 1e-6, key
        if slot.role != LORA_A and (slot.role == HEAD or LORA_B in method.block_schedule.roles):
            assert not torch.equal(arrays[key], tensors[key]), "something was learnt"


@pytest.mark.parametrize(
    ("kind", "name"), [(FedSVD, "fedsvd"), (LoraFair, "lora_fair"), (FfaLora, "ffa_lora"), (FedIT, "fedit")]
)
def test_a_named_strategy_is_the_method_of_its_file(kind: type[LoraStrategy], name: str) -> None:
    assert kind().method == method_named(name) == strategy(name).method


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_method_that_needs_more_of_clients_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"got {name}: clients (keep|merge|apply|give) .*fedlr's own server"):
        strategy(name)


def test_an_override_reaches_the_methods_file_and_a_wrong_one_is_refused() -> None:
    assert strategy("lora_fair_ridge", ["aggregate.penalty=0.5"]).method.aggregate.penalty == 0.5  # type: ignore[attr-defined]
    for name, overrides in (("no_such", []), ("fedsvd", ["aggregate.penalty=1"]), ("fedsvd", ["nonsense"])):
        with pytest.raises(InputError):
            strategy(name, overrides)


def test_a_robust_rule_with_too_few_replies_keeps_the_model_and_names_them() -> None:
    """Trimmed means need 3 updates: with fewer the round is no crash and no mean."""

    def two(message: Message) -> Message:
        return honest(message) if message.metadata.dst_node_id in NODES[:2] else failed(message)

    used = quick("trimmed_mean")
    assert same(run(used, two).arrays, ArrayRecord(dict(start_tensors())))
    reasons = [(d.client_id, d.reason) for d in used.rounds[0].dropouts if d.reason == "too_few"]
    assert reasons == [(node, "too_few") for node in sorted(NODES[:2])] and not used.rounds[0].used
    assert not same(run(quick("trimmed_mean")).arrays, ArrayRecord(dict(start_tensors())))


def test_fedit_is_the_mean_of_each_factor_and_fedsvd_keeps_the_mean_product() -> None:
    starts = start_tensors()
    sent = {node: {k: starts[k] + 0.3 * draw(node, 1, k, shape=tuple(starts[k].shape)) for k in KEYS} for node in NODES}
    mean = {key: torch.stack([sent[node][key].double() for node in NODES]).mean(dim=0) for key in KEYS}
    arrays = run(quick("fedit")).arrays.to_torch_state_dict()
    assert all(torch.allclose(arrays[key].double(), mean[key], atol=1e-7) for key in KEYS)
    products: list[Tensor] = []

    def client(message: Message) -> Message:
        products.append(trained(message)[B] @ message.content["arrays"].to_torch_state_dict()[A])
        return honest(message)

    arrays = run(quick("fedsvd"), client).arrays.to_torch_state_dict()
    assert torch.allclose(arrays[A] @ arrays[A].T, torch.eye(3), atol=1e-6)
    assert torch.allclose(arrays[B] @ arrays[A], torch.stack(products).mean(dim=0), atol=1e-5)


def test_below_the_quorum_a_round_keeps_the_model_and_the_next_one_goes_on() -> None:
    def two_in_round_one(message: Message) -> Message | None:
        first = message.content["config"]["server-round"] == 1
        return None if first and message.metadata.dst_node_id in sorted(NODES)[2:] else honest(message)

    sent: list[ArrayRecord] = []
    used = quick(min_results=3)
    grid = InProcessGrid(lambda m: (sent.append(m.content["arrays"]), two_in_round_one(m))[1], NODES)
    result = used.start(grid, ArrayRecord(start_tensors()), num_rounds=2, timeout=5)
    assert [result.train_metrics_clientapp[r]["num-results"] for r in (1, 2)] == [2, 4]
    assert all(same(arrays, ArrayRecord(start_tensors())) for arrays in sent[:8]), "round 2 begins with them too"
    assert not same(result.arrays, ArrayRecord(start_tensors()))
    enough = run(quick(min_results=2), two_in_round_one)
    assert not same(enough.arrays, ArrayRecord(start_tensors()))


def cohorts_of(used: LoraStrategy, nodes: Sequence[int], num_rounds: int) -> list[tuple[int, ...]]:
    run(used, num_rounds=num_rounds, nodes=nodes)
    return [round_.cohort for round_ in used.rounds]


def test_the_cohort_is_that_of_the_simulation_by_seed_and_round_alone() -> None:
    nodes = [7 * index + 3 for index in range(12)]
    options = {"fraction_train": 0.5, "seed": 4}
    drawn = cohorts_of(quick(**options), nodes, 4)
    assert [len(cohort) for cohort in cohorts_of(quick(fraction_train=0.1, min_results=3), nodes, 1)] == [3]
    asked = [
        sample_cohort(seed=4, round_index=r, num_clients=12, cohort_size=6, max_participations=4) for r in range(4)
    ]
    assert drawn == [tuple(nodes[client] for client in cohort) for cohort in asked]
    assert drawn == cohorts_of(quick(**options), nodes[::-1], 4) and len(set(drawn)) > 1
    assert drawn != cohorts_of(quick(**{**options, "seed": 5}), nodes, 4)


def test_waiting_for_nodes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(lora_strategy.time, "monotonic", lambda: clock[0])

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        assert seconds > 0 and clock[0] < 1000, "this waits for ever"

    monkeypatch.setattr(lora_strategy.time, "sleep", sleep)
    used = quick(max_wait_s=30)
    result = run(used, num_rounds=2, nodes=lambda: NODES[:1])
    assert clock == [60.0] and same(result.arrays, ArrayRecord(start_tensors()))
    assert [round_.cohort for round_ in used.rounds] == [(), ()], "one node is not asked where two results are needed"
    clock[0] = 0.0
    used = quick(max_wait_s=30, min_available_nodes=4)
    run(used, nodes=lambda: NODES if clock[0] >= 7 else NODES[:2])
    assert clock == [7.0] and len(used.rounds[0].cohort) == 4
    used = quick(max_wait_s=30, min_available_nodes=4)
    run(used, nodes=NODES[:3])
    assert clock == [37.0] and len(used.rounds[0].cohort) == 3, "those there are asked when the wait is over"


def test_a_message_says_what_to_train_and_expires_with_the_round() -> None:
    grid, config = InProcessGrid(honest, NODES), ConfigRecord({"lr": 0.5})
    quick("ffa_lora", train_head=False).start(
        grid, ArrayRecord(start_tensors()), num_rounds=2, timeout=7, train_config=config
    )
    assert [message.metadata.group_id for message in grid.asked] == ["1"] * 4 + ["2"] * 4
    for message in grid.asked:
        told = message.content["config"]
        assert told["trained-keys"] == [key for key in KEYS if "lora_B" in key] and told["lr"] == 0.5
        assert message.metadata.ttl == 7 and list(message.content["arrays"]) == list(KEYS)
    assert dict(config) == {"lr": 0.5}, "the user's own record is not written to"


def test_names_of_a_state_dict_are_kept() -> None:
    names = {key: key.replace(".weight", ".default.weight") if "lora" in key else key for key in KEYS}
    renamed = run(quick(), tensors={names[key]: tensor for key, tensor in start_tensors().items()})
    assert list(renamed.arrays) == list(names.values())


def test_evaluation_asks_its_own_sample_and_nobody_at_fraction_zero() -> None:
    nodes = list(range(1, 41))
    grid = InProcessGrid(honest, nodes)
    quick(fraction_train=0.5, fraction_evaluate=0.5).start(grid, ArrayRecord(start_tensors()), num_rounds=1)
    asked = [
        {m.metadata.dst_node_id for m in grid.asked if m.metadata.message_type == kind}
        for kind in ("train", "evaluate")
    ]
    assert [len(nodes) for nodes in asked] == [20, 20] and asked[0] != asked[1]
    assert run(quick()).evaluate_metrics_clientapp == {}


BROKEN_STARTS: dict[str, tuple[str, dict[str, Tensor]]] = {
    "no LoRA": ("named like 'X.lora_A.weight'", {"fc.weight": torch.ones(2, 2)}),
    "nothing": ("named like 'X.lora_A.weight'", {}),
    "half a pair": ("lora_A .R, K. and lora_B", {A: torch.ones(2, 2)}),
    "ranks differ": ("lora_A .R, K. and lora_B", {A: torch.ones(2, 4), B: torch.ones(4, 3)}),
    "convolution": ("linear layers", {A: torch.ones(2, 4, 3, 3), B: torch.ones(4, 2, 1, 1)}),
    "DoRA": (
        "plain LoRA of linear layers, got 'x.lora_magnitude_vector.weight'",
        {"x.lora_magnitude_vector.weight": torch.ones(2)},
    ),
    "the base too": ("without its base model, got 'x.base_layer.weight'", {"x.base_layer.weight": torch.ones(2)}),
    "two adapters": ("second lora_A", {A: torch.ones(1, 2), A.replace(".weight", ".b.weight"): torch.ones(1, 2)}),
    "float16": ("got float16 for .*lora_A", {A: torch.ones(1, 2).half()}),
    "integers": ("got int64", {"position_ids": torch.arange(3)}),
    "nan": ("finite numbers to start from", {A: torch.full((1, 2), math.nan)}),
    "an empty head": ("or nothing in 'x'", {"x": torch.ones(0)}),
    "rank above the layer": ("in_features", {A: torch.ones(3, 2), B: torch.ones(4, 3)}),
}


def test_a_step_of_the_server_that_the_strategy_would_not_take_is_refused() -> None:
    falling = RateSchedule("cosine", num_rounds=4)
    fedavg, fedadam = method_named("fedavg"), method_named("fedadam")
    for method in (replace(fedavg, server_momentum=0.9), replace(fedadam, server_rates=falling)):
        with pytest.raises(InputError, match="without momentum and schedule of the server's step"):
            LoraStrategy(method)


@pytest.mark.parametrize("case", BROKEN_STARTS)
def test_arrays_that_are_no_adapter_are_refused_before_anyone_is_asked(case: str) -> None:
    match, tensors = BROKEN_STARTS[case]
    grid = InProcessGrid(honest, NODES)
    with pytest.raises(InputError, match=match):
        FedSVD().start(grid, ArrayRecord(tensors))
    assert grid.asked == []


@pytest.mark.parametrize(
    "options",
    [
        {"fraction_train": 1.5},
        {"fraction_evaluate": -0.1},
        {"min_train_nodes": -1},
        {"min_results": 0},
        {"max_wait_s": math.nan},
        {"max_wait_s": math.inf},
        {"weight_cap": 0},
        {"weight_cap": math.inf},
        {"seed": -1},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused(options: Mapping[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        FedSVD(**options)


@pytest.mark.parametrize("timeout", [0, -1, math.inf, math.nan])
def test_a_round_without_a_deadline_is_refused(timeout: float) -> None:
    with pytest.raises(InputError, match="timeout"):
        FedSVD().start(InProcessGrid(honest, NODES), ArrayRecord(start_tensors()), timeout=timeout)


def test_flowers_noise_on_what_a_strategy_returns_is_refused() -> None:
    private = DifferentialPrivacyServerSideFixedClipping(FedSVD(), 1.0, 1.0, 4)
    grid = InProcessGrid(honest, NODES)
    with pytest.raises(InputError, match="epsilon of a wrapper"):
        private.start(grid, ArrayRecord(start_tensors()), num_rounds=1)
    assert grid.asked == []


def test_a_strategy_can_start_again_and_remembers_nothing() -> None:
    used = quick("fedadam")
    first = run(used, num_rounds=2)
    assert same(first.arrays, run(used, num_rounds=2).arrays) and len(used.rounds) == 2


def test_a_method_of_ones_own_can_be_a_strategy() -> None:
    def last(adapter: AdapterState, updates: Any) -> AdapterState:
        return adapter.with_tensors(list(updates)[-1].tensors)

    result = run(LoraStrategy(Method("last", Always([LORA_B]), last, keep, full_adapter), fraction_evaluate=0.0))
    expected = start_tensors()[B] + 0.3 * draw(max(NODES), 1, B, shape=(5, 3))
    assert torch.equal(result.arrays.to_torch_state_dict()[B], expected)


def test_a_method_that_folds_without_saying_so_is_refused() -> None:
    def fold(adapter: AdapterState, updates: Any) -> AdapterState:
        return replace(adapter, side=adapter.factors())

    with pytest.raises(InputError, match="folds=true"):
        run(LoraStrategy(Method("folder", Always([LORA_B]), fold, keep, full_adapter), fraction_evaluate=0.0))


def contexts() -> Callable[[int], Context]:
    made: dict[int, Context] = {}

    def context(node: int) -> Context:
        number = sorted({*made, node}).index(node) if node in made else len(made)
        return made.setdefault(node, Context(1, node, {"partition-id": number}, RecordDict(), {}))

    return context


def test_the_example_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = example_in_process(monkeypatch, capsys)
    assert accuracies[0] < 0.6 and accuracies[-1] > 0.7


def example_in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[float]:
    monkeypatch.syspath_prepend(EXAMPLE)
    from flower_app import client_app, server_app  # type: ignore[import-not-found]

    context_of = contexts()
    grid = InProcessGrid(lambda message: client_app.app(message, context_of(message.metadata.dst_node_id)), (5, 9, 20))
    capsys.readouterr()
    server_app.app(grid, Context(1, 1, {}, RecordDict(), {}))
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed["dropped"] == [0] * 5
    return list(printed["accuracies"])


@pytest.mark.slow
def test_the_example_learns_the_same_in_flowers_simulation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = subprocess.run([sys.executable, "simulate.py"], cwd=EXAMPLE, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-2000:]
    line = next(line for line in ran.stdout.splitlines() if line.startswith('{"accuracies"'))
    assert json.loads(line)["accuracies"] == pytest.approx(example_in_process(monkeypatch, capsys), abs=0.011)


def test_the_document_names_what_is_refused_and_why() -> None:
    text = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", text, flags=re.MULTILINE)
    reasons = {name: reason for names, reason in table for name in re.findall(r"`(\w+)`", names)}
    assert set(reasons) == REFUSED
    for name, reason in reasons.items():
        told = needs_more_of_clients(method_of(name))
        assert told is not None and (told == reason or reason == re.sub(r"the rule \w+", "a rule", told))


MUTANTS: dict[str, tuple[str, str, Check]] = {
    "no quorum": (
        "len(outcome.used) < self.min_results",
        "False",
        lambda _: test_below_the_quorum_a_round_keeps_the_model_and_the_next_one_goes_on(),
    ),
    "one seed for all": (
        "stream(self.seed, purpose",
        "stream(0, purpose",
        lambda _: test_the_cohort_is_that_of_the_simulation_by_seed_and_round_alone(),
    ),
    "one round for all": (
        "round_index=server_round - 1",
        "round_index=0",
        lambda _: test_the_cohort_is_that_of_the_simulation_by_seed_and_round_alone(),
    ),
    "nodes as they come": (
        "while len(nodes := sorted(grid.get_node_ids()))",
        "while len(nodes := list(grid.get_node_ids()))",
        lambda _: test_the_cohort_is_that_of_the_simulation_by_seed_and_round_alone(),
    ),
    "the training cohort evaluates": (
        "Purpose.EVALUATION",
        "Purpose.COHORT",
        lambda _: test_evaluation_asks_its_own_sample_and_nobody_at_fraction_zero(),
    ),
    "no end of waiting": (
        "(left := deadline - time.monotonic()) > 0",
        "(left := 1.0)",
        lambda m: test_waiting_for_nodes_ends(m),
    ),
    "one is asked where two are needed": ("cohort = []", "pass", lambda m: test_waiting_for_nodes_ends(m)),
    "a message that outlives its round": (
        "ttl=ttl, ",
        "",
        lambda _: test_a_message_says_what_to_train_and_expires_with_the_round(),
    ),
    "the user's config written to": (
        "config = ConfigRecord({**config, SERVER_ROUND: server_round, TRAINED_KEYS: run.names.keys(block)})",
        "config.update({SERVER_ROUND: server_round, TRAINED_KEYS: run.names.keys(block)})",
        lambda _: test_a_message_says_what_to_train_and_expires_with_the_round(),
    ),
    "a head that always trains": (
        "train_head=self.train_head",
        "train_head=True",
        lambda _: test_a_message_says_what_to_train_and_expires_with_the_round(),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    catches_mutant(*MUTANTS[name], monkeypatch)
