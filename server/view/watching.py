"""Follow a run over the network, through restarts of its view, one readable line a round."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import grpc

from fedlr.errors import InputError
from fedlr.server.view.connection import ANSWER_S, ViewAddress, printable, refuse
from fedlr.server.view.operator_pb2 import AskedClient, Round, RunStatus, StatusRequest, WatchRequest

LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
SHOWN_CLIENTS = 5


@dataclass(frozen=True)
class Patience:
    """How long to try again between two rounds: pauses in seconds that double up to the longest; some ten minutes."""

    first_s: float = 0.5
    longest_s: float = 30.0
    num_tries: int = 25

    def pauses(self) -> Iterator[float]:
        """Yield the pause before each try."""
        return (min(self.longest_s, self.first_s * 2**number) for number in range(self.num_tries))


def watch_run(
    address: ViewAddress, *, from_round: int, patience: Patience, say: Callable[[str], None]
) -> Iterator[RunStatus | Round]:
    """Yield the status of a run when connected for the first time, then its rounds, and end when it does.

    A view that was reached and is gone is tried again, from the round after the last one seen; `say` is told.

    Raises:
        InputError: if the view is not reached at first, refuses, or stays away.
    """
    pauses: Iterator[float] | None = None  # None until the view was reached
    while True:
        try:
            with address.connected() as view:
                status = view.Status(StatusRequest(), timeout=ANSWER_S, metadata=address.token.metadata())
                if pauses is None:
                    pauses = patience.pauses()
                    yield status
                for event in view.Watch(WatchRequest(from_round=from_round), metadata=address.token.metadata()):
                    from_round, pauses = event.rounds_completed + 1, patience.pauses()
                    yield event
                return
        except grpc.RpcError as error:
            if pauses is None or error.code() not in LOST:
                refuse(error, address)
            code = error.code().name
        pause = next(pauses, None)
        if pause is None:
            raise InputError(
                f"Expected the view at {address} to come back, got none; go on with --from-round {from_round}"
            )
        say(f"the view at {address} is gone ({code}); trying again in {pause:g} s")
        time.sleep(pause)


def status_line(status: RunStatus) -> str:
    """Say which run this is and how far it has come."""
    planned = f" of {status.num_rounds}" if status.num_rounds else ""
    last = status.last_line_unix_s
    spent = _epsilon(status) if status.rounds_completed or status.HasField("epsilon_max") else ", before training"
    at = f"{spent}, last written {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(last))}" if last else ""
    title = printable(", ".join(filter(None, [status.name, status.method]))) or "a run without a configuration yet"
    return f"{title}: round {status.rounds_completed}{planned}{at}"


def round_line(event: Round, *, num_rounds: int) -> str:
    """Say what a round came to; `num_rounds` planned, 0 if that is not known."""
    number = f"{event.rounds_completed:>{len(str(num_rounds))}}{f'/{num_rounds}' if num_rounds else ''}"
    scores = "".join(f"   {name} {getattr(event, name):.3f}" for name in ("accuracy", "loss") if event.HasField(name))
    median = f" (median {event.epsilon_median:.2f})" if event.HasField("epsilon_median") else ""
    if not event.rounds_completed:
        return f"round {number}{scores}   before training"
    asked = f"   trained {event.num_trained} of {len(event.cohort)}"
    return f"round {number}{scores}{_epsilon(event, sep='   ')}{median}{asked}{''.join(_absent(event.cohort))}"


def _epsilon(message: RunStatus | Round, *, sep: str = ", ") -> str:
    return f"{sep}epsilon {message.epsilon_max:.2f}" if message.HasField("epsilon_max") else f"{sep}no privacy"


def _absent(cohort: Sequence[AskedClient]) -> Iterator[str]:
    """Yield why clients gave no update, and which they are."""

    def reason(client: AskedClient) -> tuple[str, str]:
        return client.status, client.reason

    without = sorted((client for client in cohort if client.status != "trained"), key=reason)
    for (status, why), group in groupby(without, key=reason):
        clients = [str(client.client_id) for client in group]
        more = [f"and {len(clients) - SHOWN_CLIENTS} more"] if len(clients) > SHOWN_CLIENTS else []
        yield f"   {printable(status)} {', '.join(clients[:SHOWN_CLIENTS] + more)} ({printable(why)})"
