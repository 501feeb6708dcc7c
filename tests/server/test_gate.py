"""The gate: thousands of hostile replies change nothing, each is refused by its name, and honest ones all count.

Mutants, each of which a test below rejects: the gate without its check of the client, experiment, round or task; one
that takes a weight from a reply, or tensors from a refusal; a reader without a limit on arrays, facts or layout; facts
that may be infinite, or nested without end; a pool that does not ask which node answers.
"""

import gc
import json
import math
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from types import ModuleType

import pytest
from flwr.app import Message

import fedlr.flower.messages
import fedlr.flower.records
import fedlr.server.gate
import fedlr.server.pool
from fedlr.adapters.state import LORA_A, LORA_B, ClientUpdate
from fedlr.errors import InputError
from fedlr.flower.messages import Request
from fedlr.flower.records import RecordDict, facts_of
from fedlr.methods.method import Method
from fedlr.rounds.round import Dropout, RoundDiagnostics, RoundRequest, ServerState, run_round
from fedlr.rounds.validate import rejection
from fedlr.runs.checkpoint import save_checkpoint
from fedlr.server.gate import Asked, answer_of
from fedlr.server.pool import GridPool
from tests.server.direct_grid import DirectGrid, reply_to, through_bytes
from tests.server.malformed import CANARY, CLASSES, HEAVY, Honest
from tests.server.small_federation import FEDIT, FEDSVD, TERMS, Listening, Outcomes, adapter, reasons
from tests.training.small_models import mutant

REASONS = {reason for reason, _ in CLASSES.values()} | {"offline", "not_sent", "deadline", "other_node", "no_answer"}
MEGABYTE = 2**20


def pool_over(grid: DirectGrid, *, deadline_s: float = 60.0, module: ModuleType = fedlr.server.pool) -> GridPool:
    pool: GridPool = module.GridPool(
        grid,
        grid,
        terms=TERMS,
        enrolled=adapter(),
        deadline_s=deadline_s,
        quorum=1,
        poll_s=0.001,
        say=print,
    )
    return pool


def honestly(record: RecordDict) -> RecordDict:
    return Honest.to(record).record()


def hostile(name: str, seed: int) -> Callable[[RecordDict], RecordDict]:
    return lambda record: CLASSES[name][1](Honest.to(record), random.Random(seed))


def asked_of(client: int = 5, round_index: int = 1) -> tuple[Honest, Asked]:
    """Return one honest answer and what was asked."""
    task = RoundRequest(round_index, dict(adapter().tensors), frozenset({LORA_A, LORA_B}))
    request = Request(TERMS, client, task, adapter().fingerprint(), 1.0, None)
    asked = Asked(TERMS.experiment_id, client, round_index, task.fingerprint(), adapter().select(task.shared))
    return Honest.to(request.record()), asked


def fate(record: RecordDict, asked: Asked, *, gate: ModuleType = fedlr.server.gate) -> str | None:
    """Return why a reply is not used, or None."""
    outcome = gate.answer_of(record, asked, weight=1.0).outcome
    if isinstance(outcome, Dropout):
        return outcome.reason
    who = [asked.client_id]
    return rejection(outcome, expected=asked.expected, round_index=asked.round_index, asked=who, seen=())


def a_crowd(num_rounds: int, num_hostile: int, num_honest: int) -> Iterator[dict[int, str | None]]:
    """Yield the class of each client by round, None for the honest, in an order of no pattern; heavy ones are few."""
    light = cycle(name for name in CLASSES if name not in HEAVY)
    heavy = iter([name for name in CLASSES if name in HEAVY])
    for round_index in range(num_rounds):
        kinds: list[str | None] = [*islice(heavy, 1), *[None] * num_honest]
        kinds += islice(light, num_hostile + num_honest - len(kinds))
        random.Random(round_index).shuffle(kinds)
        yield dict(enumerate(kinds))


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_two_thousand_hostile_replies_change_nothing_and_the_honest_ones_beside_them_all_count(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    state, refused, num_honest, before = ServerState(adapter()), Counter[str](), 0, 0
    for round_index, kinds in enumerate(a_crowd(50, 40, 10)):
        answers = {c: honestly if kind is None else hostile(kind, 100 * round_index + c) for c, kind in kinds.items()}
        pool = Listening(pool_over(DirectGrid(answers)))
        honest = [client for client, kind in kinds.items() if kind is None]
        after, diagnostics = run_round(state, list(kinds), pool=pool, method=FEDIT)
        assert list(diagnostics.trained) == honest
        for dropout in diagnostics.dropouts:
            kind = kinds[dropout.client_id]
            assert kind is not None and (dropout.status, dropout.reason) == ("rejected", CLASSES[kind][0]), kind
            refused[kind] += 1
        updates = [o for o in pool.outcomes if isinstance(o, ClientUpdate) and o.client_id in honest]
        assert {update.weight for update in updates} == {1.0}
        alone, _ = run_round(state, honest, pool=Outcomes(updates), method=FEDIT)
        assert after.adapter.fingerprint() == alone.adapter.fingerprint() != state.adapter.fingerprint()
        state, num_honest = after, num_honest + len(honest)
        before = before or resident_bytes()  # after a round, when everything is imported
    assert num_honest == 500 and refused.total() == 2000 and refused.keys() == CLASSES.keys() and len(CLASSES) >= 80
    assert resident_bytes() - before < 64 * MEGABYTE
    said = capfd.readouterr()
    warned = [str(warning.message) for warning in recwarn]
    assert CANARY not in said.out + said.err + caplog.text + "".join(warned) and not caplog.records


@pytest.mark.parametrize("method", [FEDIT, FEDSVD], ids=lambda method: method.name)
def test_a_round_of_hostile_replies_alone_leaves_the_adapter_as_it_was(method: Method) -> None:
    state = ServerState(adapter())
    answers = {client: hostile(name, 7) for client, name in enumerate(name for name in CLASSES if name not in HEAVY)}
    after, diagnostics = run_round(state, list(answers), pool=pool_over(DirectGrid(answers)), method=method)
    assert diagnostics.trained == () and len(diagnostics.dropouts) == len(answers)
    assert {dropout.reason for dropout in diagnostics.dropouts} <= REASONS
    assert after.adapter.fingerprint() == state.adapter.fingerprint()


SENT = [name for name in CLASSES if name != "failure_with_words"]


@pytest.mark.parametrize("name", SENT)
def test_a_hostile_reply_costs_little_work_and_memory(name: str) -> None:
    honest, asked = asked_of()
    record = through_bytes(CLASSES[name][1](honest, random.Random(3)))
    assert fate(record, asked) == CLASSES[name][0]
    with counted_calls() as calls:
        fate(record, asked)
    assert calls.total() < 5000
    tracemalloc.start()
    fate(record, asked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEGABYTE


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Count the calls of functions, Python's and C's."""
    calls = Counter[str]()
    sys.setprofile(lambda frame, event, what: calls.update([event] if event.endswith("call") else []))
    try:
        yield calls
    finally:
        sys.setprofile(None)


GATE_MUTANTS = {
    "answer_to_another_task": [("facts.task_sha256 != asked.task_sha256", "False")],
    "answer_in_another_experiment": [("facts.experiment_id != asked.experiment_id", "False")],
    "answer_of_another_client": [("facts.client_id != client", "False")],
    "answer_to_another_round": [
        ("facts.round_index != asked.round_index", "False"),
        ("weight, facts.round_index)", "weight, asked.round_index)"),
    ],
    "refusal_with_tensors": [("if reply.tensors:", "if False:")],
    "facts_without_end": [("Reply.read(record, reply_limits(asked.expected, asked.codec))", "Reply.read(record)")],
    "impossible_epsilon": [("except InputError", "except KeyError")],
}


@pytest.mark.parametrize("name", GATE_MUTANTS)
def test_a_gate_without_one_of_its_checks_is_found_out(name: str) -> None:
    honest, asked = asked_of()
    broken = mutant(fedlr.server.gate, *GATE_MUTANTS[name])
    assert fate(honest.record(), asked, gate=broken) is None
    record = CLASSES[name][1](honest, random.Random(1))
    assert fate(record, asked) == CLASSES[name][0]
    try:
        assert fate(record, asked, gate=broken) != CLASSES[name][0]
    except InputError:
        pass


WIRE_MUTANTS = {
    "layout_of_many_tensors_of_nothing": ("len(text) > 1000 * limits.num_tensors + 100 or ", ""),
    "larger": ("sum(map(_num_bytes, arrays.values())) > limits.num_bytes", "False"),
    "fortran_order": ("if not is_whole or", "if"),
    "lies_about_its_array": (
        '(array.stype, array.dtype, tuple(array.shape)) != ("numpy.ndarray", str(carrier), (size,))',
        "False",
    ),
    "layout_leaves_values_over": (" or dict(taken) != {dtype: array.size for dtype, array in flat.items()}", ""),
    "metrics_beside_it": ("if others or", "if"),
}


@pytest.mark.parametrize("name", WIRE_MUTANTS)
def test_a_reader_without_one_of_its_checks_is_found_out(name: str) -> None:
    honest, asked = asked_of()
    record, limits = CLASSES[name][1](honest, random.Random(1)), fedlr.flower.messages.reply_limits(asked.expected)
    with pytest.raises(InputError):
        fedlr.flower.records.from_record(record, limits)
    mutant(fedlr.flower.records, WIRE_MUTANTS[name]).from_record(record, limits)


def test_facts_of_any_depth_are_refused_and_never_end_a_round() -> None:
    honest, asked = asked_of()
    broken = mutant(fedlr.flower.messages, ("except RecursionError", "except KeyError"))
    raised = 0
    for depth in range(900, 1010):
        record = honest.with_facts(json.dumps(dict(honest.facts))[:-1] + f', "a": {"[" * depth + "]" * depth}' + "}")
        assert fate(record, asked) == "malformed"
        try:
            with pytest.raises(InputError):
                broken.Reply.read(record)
        except RecursionError:
            raised += 1
    assert raised > 0


def test_no_epsilon_that_a_device_reports_can_keep_the_server_from_its_checkpoint(tmp_path: Path) -> None:
    honest, asked = asked_of()
    for epsilon in (math.inf, math.nan, 1e308, 1e9, 0.0):
        answer = answer_of(honest.record(epsilon=epsilon), asked, weight=1.0)
        facts = {} if answer.facts is None else {"5": answer.facts.epsilon}
        assert facts == ({"5": epsilon} if epsilon <= 1e9 else {})
        save_checkpoint(tmp_path, ServerState(adapter()), {"epsilon": facts})
    broken = mutant(fedlr.flower.messages, (", le=LARGEST_EPSILON", ""))
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(
            tmp_path, ServerState(adapter()), {"5": broken.Reply.read(honest.record(epsilon=math.inf)).facts.epsilon}
        )


def weights(gate: ModuleType) -> set[float]:
    """Return every weight that an update of any reply gets from a server whose own is 0.25."""
    honest, asked = asked_of()
    records = [make(honest, random.Random(9)) for name, (_, make) in CLASSES.items() if name in SENT]
    records += [honest.record(epsilon=epsilon, ledger_head=None) for epsilon in (None, 0.0, 1, 29.0, 1e9)]
    outcomes = [gate.answer_of(record, asked, weight=0.25).outcome for record in records]
    return {outcome.weight for outcome in outcomes if isinstance(outcome, ClientUpdate)}


def test_nothing_that_a_reply_holds_moves_its_weight() -> None:
    assert weights(fedlr.server.gate) == {0.25}
    assert weights(
        mutant(fedlr.server.gate, ("tensors, weight, facts", "tensors, facts.epsilon or weight, facts"))
    ) != {0.25}


# What is said a second time, too late, or in another's name.


class Postman(DirectGrid):
    """A grid that lets a test see and change what is delivered: `deliver` gets the replies of one pull."""

    def __init__(self, answers: Mapping[int, Callable[[RecordDict], RecordDict | None]]) -> None:
        super().__init__(answers)
        self.deliver: Callable[[list[Message]], list[Message]] = list

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.deliver(list(super().pull_messages(message_ids)))


def a_round(
    grid: DirectGrid,
    state: ServerState,
    cohort: Sequence[int] = (0, 1),
    *,
    deadline_s: float = 60.0,
    module: ModuleType = fedlr.server.pool,
) -> tuple[ServerState, RoundDiagnostics]:
    return run_round(state, cohort, pool=pool_over(grid, deadline_s=deadline_s, module=module), method=FEDIT)


class Recorder:
    """A client that answers the first request it gets, and sends that answer again for ever."""

    def __init__(self) -> None:
        self.first: RecordDict | None = None

    def __call__(self, record: RecordDict) -> RecordDict:
        self.first = self.first or honestly(record)
        return self.first


def test_a_reply_of_an_earlier_round_is_not_taken_again() -> None:
    grid = Postman({0: Recorder(), 1: honestly})
    state, diagnostics = a_round(grid, ServerState(adapter()))
    assert diagnostics.trained == (0, 1)
    _, diagnostics = a_round(grid, state)
    assert diagnostics.trained == (1,) and reasons(diagnostics) == {0: "wrong_round"}


def test_a_reply_of_a_round_that_is_asked_again_with_another_adapter_is_not_taken() -> None:
    grid = Postman({0: Recorder(), 1: honestly})
    a_round(grid, ServerState(adapter()))
    other = adapter().with_tensors({slot: 2 * tensor for slot, tensor in adapter().tensors.items()})
    _, diagnostics = a_round(grid, ServerState(other))
    assert diagnostics.trained == (1,) and reasons(diagnostics) == {0: "other_task"}


@pytest.mark.parametrize(
    "copies", [lambda replies: replies + replies, lambda replies: replies[::-1]], ids=["twice", "reversed"]
)
def test_a_reply_that_comes_twice_or_out_of_order_counts_once(copies: Callable[[list[Message]], list[Message]]) -> None:
    state, grid = ServerState(adapter()), Postman({0: honestly, 1: honestly})
    expected, _ = a_round(grid, state)
    grid.deliver = copies
    after, diagnostics = a_round(grid, state)
    assert diagnostics.trained == (0, 1) and diagnostics.dropouts == ()
    assert after.adapter.fingerprint() == expected.adapter.fingerprint()


def test_a_reply_that_comes_a_round_late_is_not_taken() -> None:
    grid, held = Postman({0: honestly, 1: honestly}), list[Message]()

    def hold_back(replies: list[Message]) -> list[Message]:
        held.extend(reply for reply in replies if reply.metadata.src_node_id == 100)
        return [reply for reply in replies if reply.metadata.src_node_id != 100]

    grid.deliver = hold_back
    state, diagnostics = a_round(grid, ServerState(adapter()), deadline_s=0.2)
    assert diagnostics.trained == (1,) and reasons(diagnostics) == {0: "deadline"} and len(held) == 1
    grid.deliver = list
    expected, _ = a_round(grid, state)
    grid.deliver = lambda replies: [*held, *replies]
    after, diagnostics = a_round(grid, state)
    assert diagnostics.trained == (0, 1) and after.adapter.fingerprint() == expected.adapter.fingerprint()


def of_node(reply: Message, node: int) -> Message:
    return reply_to(reply.metadata.reply_to_message_id, node, content=reply.content)


def test_an_answer_from_another_node_than_was_asked_is_not_taken() -> None:
    grid = Postman({0: honestly, 1: honestly})
    grid.deliver = lambda replies: [of_node(reply, 101) for reply in replies]  # node 101 answers for node 100 too
    _, diagnostics = a_round(grid, ServerState(adapter()))
    assert diagnostics.trained == (1,) and reasons(diagnostics) == {0: "other_node"}
    trusting = mutant(fedlr.server.pool, ("reply.metadata.src_node_id != node_id", "False"))
    assert a_round(grid, ServerState(adapter()), module=trusting)[1].trained == (0, 1)


def test_the_answer_of_another_client_is_not_taken() -> None:
    stolen = Recorder()

    def thief(record: RecordDict) -> RecordDict | None:
        return stolen.first

    _, diagnostics = a_round(Postman({0: stolen, 1: thief}), ServerState(adapter()))
    assert diagnostics.trained == (0,) and reasons(diagnostics) == {1: "other_client"}


def test_an_answer_that_nobody_asked_for_is_not_taken() -> None:
    grid = Postman({0: honestly, 1: honestly})
    _, asked = asked_of(1, 0)
    unasked = [reply_to("m999", 555, content=asked_of(1, 0)[0].record())]  # a node of no client, and no message
    expected, _ = a_round(grid, ServerState(adapter()), [0])
    grid.deliver = lambda replies: unasked + replies
    after, diagnostics = a_round(grid, ServerState(adapter()), [0])
    assert diagnostics.trained == (0,) and diagnostics.dropouts == ()
    assert after.adapter.fingerprint() == expected.adapter.fingerprint()


def test_two_requests_for_one_thing_have_names_that_no_other_device_can_guess() -> None:
    nonces = set()
    for _ in range(100):
        task = RoundRequest(0, {}, frozenset({LORA_B}))
        nonces.add(facts_of(Request(TERMS, 0, task, "ab" * 32, 1.0, None).record())["nonce"])
    assert len(nonces) == 100 and {len(nonce) for nonce in nonces} == {32}
