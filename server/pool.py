"""Devices behind Flower's Grid, as a `ClientPool`: one message out and one reply back for each client of a round.

Replies are taken as they come, by our own short poll; whoever has not answered at the deadline is a dropout of the
round, and its message expires with it. A client is known by its registered key, never by what a message says.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fedlr.adapters.client_ranks import narrowed
from fedlr.adapters.state import AdapterState, ClientUpdate, Slot
from fedlr.flower.messages import Request
from fedlr.flower.terms import Terms
from fedlr.methods.codecs.codec import Place
from fedlr.rounds.round import Dropout, RoundRequest
from fedlr.server.gate import Answer, Asked, answer_of, is_stated
from fedlr.server.nodes import Nodes
from fedlr.server.reports import Reports

TRAIN = "train"
LEAST_TTL_S = 1.0


class GridPool:
    """A `ClientPool` (fedlr.rounds.round) over a Grid.

    Args:
        grid: of a running Flower run.
        nodes: who is reachable.
        terms: of the experiment; every request carries them.
        enrolled: the adapter every client is given once.
        deadline_s: for one attempt of a round.
        grace_s: for whoever has not answered, once a quorum has sent updates; None: until the deadline.
        quorum: how many clients of a cohort must be reachable before anybody is asked.
        poll_s: between two looks for replies.
        reports: what the clients said before of their ledgers; added to here.
        public_keys: returns the line of each client's key, by which signatures are checked; None: there are none.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Nodes,
        *,
        terms: Terms,
        enrolled: AdapterState,
        deadline_s: float,
        quorum: int,
        poll_s: float,
        grace_s: float | None = None,
        say: Callable[[str], None] = lambda line: None,
        reports: Reports | None = None,
        public_keys: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        self._grid, self._nodes, self._terms = grid, nodes, terms
        self._deadline_s, self._quorum, self._poll_s, self._say = deadline_s, quorum, poll_s, say
        self._grace_s = grace_s
        self._enrolled = enrolled = AdapterState(enrolled.tensors, enrolled.scale)  # a side comes with every task
        self._sha256 = enrolled.fingerprint()
        self._has_adapter: set[int] = set()  # clients that answered, so they hold what they were given
        self.reports = reports or Reports()
        self._public_keys = public_keys or dict
        self._codec = terms.built_codec()

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        """Ask every client that is reachable; yield what comes of it, in the order in which it comes."""
        deadline = time.monotonic() + self._deadline_s
        nodes = self._wait(cohort, deadline)
        absent = [client for client in cohort if client not in nodes]
        yield from (Dropout(client, "rejected", "offline") for client in absent)
        alike = None if task.ranks else task.fingerprint()
        expected = self._enrolled.overlaid(task.broadcast).select(task.shared)
        waiting: dict[str, tuple[int, Asked]] = {}  # by message: the node that was asked, and what
        for client in cohort:
            if client in nodes:
                ttl = max(LEAST_TTL_S, deadline - time.monotonic())
                own = task if not task.ranks else replace(task, ranks={client: task.ranks[client]})
                message_id = self._push(own, client, nodes[client], ttl)
                if message_id is None:
                    yield Dropout(client, "rejected", "not_sent")
                else:
                    waiting[message_id] = nodes[client], self._asked(own, client, alike or own.fingerprint(), expected)
        num_updates, in_time = 0, True
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                found = waiting.pop(reply.metadata.reply_to_message_id, None)
                if found is not None:
                    yield (outcome := self._take(reply, *found))
                    num_updates += isinstance(outcome, ClientUpdate)
            if in_time and self._grace_s is not None and num_updates >= min(self._quorum, len(cohort)):
                in_time, deadline = False, min(deadline, time.monotonic() + self._grace_s)
            left = deadline - time.monotonic()
            if not waiting or left <= 0:
                break
            time.sleep(min(self._poll_s, left))
        self.reports.remember()
        yield from (Dropout(asked.client_id, "rejected", "deadline") for _, asked in waiting.values())

    def _wait(self, cohort: Sequence[int], deadline: float) -> Mapping[int, int]:
        """Wait, not longer than the deadline, until enough of the cohort can be reached; return whoever can."""
        wanted = min(self._quorum, len(cohort))
        said = False
        while True:
            online = self._nodes.online()
            nodes = {client: online[client] for client in cohort if client in online}
            if len(nodes) >= wanted or time.monotonic() >= deadline:
                return nodes
            if not said:
                self._say(f"  waiting: {len(nodes)} of {len(cohort)} clients are online, {wanted} are needed")
                said = True
            time.sleep(min(1.0, self._deadline_s / 10))

    def _push(self, task: RoundRequest, client: int, node_id: int, ttl: float) -> str | None:
        request = Request(
            terms=self._terms,
            client_id=client,
            task=task,
            enrolled_sha256=self._sha256,
            scale=self._enrolled.scale,
            enrolled=None if client in self._has_adapter else self._enrolled,
            echo=None if self._terms.mechanism is None else self.reports.echo(client),
        )
        message = Message(request.record(), node_id, TRAIN, ttl=ttl, group_id=str(task.round_index))
        return next(iter(self._grid.push_messages([message])), None)

    def _asked(self, task: RoundRequest, client: int, task_sha256: str, expected: Mapping[Slot, Tensor]) -> Asked:
        own = dict(narrowed(expected, task.ranks.get(client)))
        delta = None if self._terms.mechanism is None else self._terms.mechanism.delta
        place = Place(self._terms.seed, client, task.round_index)
        return Asked(self._terms.experiment_id, client, task.round_index, task_sha256, own, self._codec, place, delta)

    def _take(self, reply: Message, node_id: int, asked: Asked) -> ClientUpdate | Dropout:
        client = asked.client_id
        if reply.has_error():  # of Flower's own; its text may be anybody's, so only that it came is kept
            return Dropout(client, "rejected", "no_reply")
        if reply.metadata.src_node_id != node_id:
            return Dropout(client, "rejected", "other_node")
        answer: Answer = answer_of(reply.content, asked, weight=1.0)
        if (facts := answer.facts) is not None:
            # Only who says so itself is given the adapter again.
            (self._has_adapter.discard if facts.refused == "not_enrolled" else self._has_adapter.add)(client)
            if asked.delta is not None and is_stated(facts, asked.delta):
                key = self._public_keys().get(client)
                reason = self.reports.hear(client, facts, asked.task_sha256, public_key=key)
                if reason is not None and isinstance(answer.outcome, ClientUpdate):
                    return Dropout(client, "rejected", reason)
        return answer.outcome
