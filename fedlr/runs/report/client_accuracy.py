"""What a report says of client_accuracy.json: how good the shared adapter is for each client."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlr.runs.report.layout import details, paragraph, table
from fedlr.runs.report.picture import MOST_CLIENTS
from fedlr.runs.report.records import Record
from fedlr.runs.report.wording import count, percent


@dataclass(frozen=True)
class OfClient:
    """The accuracy of the shared adapter on one client's own held-out rows; None: it has none."""

    client_id: int
    name: str
    num_test: int
    accuracy: float | None


def read_client_accuracy(row: Record) -> list[OfClient]:
    """Return the clients of client_accuracy.json, in order."""
    clients = [
        OfClient(
            client_id=one.count("client_id"),
            name=one.text("name") if "name" in one.values else "",
            num_test=one.count("num_test"),
            accuracy=one.optional_number("accuracy"),
        )
        for one in row.records("clients")
    ]
    return sorted(clients, key=lambda one: one.client_id)


def client_accuracy_parts(clients: Sequence[OfClient]) -> list[str]:
    """Return the HTML that says how good the adapter is for each client; nothing where nobody asked."""
    scored = sorted((one for one in clients if one.accuracy is not None), key=lambda one: one.accuracy or 0.0)
    if not scored:
        return []
    accuracy = [one.accuracy or 0.0 for one in scored]
    told = (
        f"On the held-out rows of each client alone the shared adapter has a mean accuracy of "
        f"{percent(sum(accuracy) / len(accuracy))} over {count(len(scored), 'client')}, and {percent(accuracy[0])} at "
        f"the worst, {_called(scored[0])}."
    )
    if without := len(clients) - len(scored):
        told += f" {count(without, 'client')} have no held-out row."
    shown = scored[:MOST_CLIENTS]
    rows = [[_called(one), percent(one.accuracy or 0.0), f"{one.num_test:,}"] for one in shown]
    title = "Each client's own held-out rows, the worst first"
    return [paragraph(told), details(title, [table(["Client", "Accuracy", "Rows"], rows)])]


def _called(one: OfClient) -> str:
    return f"client {one.client_id}" + (f" ({one.name})" if one.name else "")
