"""`report.html`: one run on one page that opens offline, for the one who decides and the one who checks."""

from collections import Counter
from html import escape
from pathlib import Path

from fedlr.files import write_whole
from fedlr.runs.report import client_pictures, cost_pictures, learning_pictures, own_rows_picture, server_pictures
from fedlr.runs.report.audit_text import audit_parts
from fedlr.runs.report.checks import disagreements, for_nothing
from fedlr.runs.report.chosen import how_chosen
from fedlr.runs.report.client_accuracy import client_accuracy_parts
from fedlr.runs.report.contact_sheet import sheet_parts
from fedlr.runs.report.evaluation_text import evaluation_parts
from fedlr.runs.report.layout import details, gallery, page, paragraph, section, table
from fedlr.runs.report.learned import did_it_learn
from fedlr.runs.report.overview import headline_card, sentence, worth
from fedlr.runs.report.picture import Picture
from fedlr.runs.report.privacy_text import privacy_parts
from fedlr.runs.report.released import which_model
from fedlr.runs.report.reproduce import reproduce
from fedlr.runs.report.run_files import Run, read_run
from fedlr.runs.report.spectrum_picture import layer_rows, singular_values
from fedlr.runs.report.wording import count


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory, from its files alone, and return its path.

    Guarantees: the same files give the same bytes; it fetches nothing and runs no script; text from files is
    escaped.

    Raises:
        InputError: a required file is missing or broken; the message names it.
    """
    path = Path(run_dir) / "report.html"
    write_whole(path, report_page(read_run(Path(run_dir))))
    return path


def report_page(run: Run) -> str:
    """Return the report of one run as HTML."""
    return page(
        f"{run.summary.name}: {run.summary.method}",
        [
            f"<header>\n<h1>{escape(run.summary.name)}</h1>",
            f"{paragraph(sentence(run), kind='lead')}\n</header>",
            *(paragraph(text) for text in (*how_chosen(run), *which_model(run))),
            *(paragraph(text, kind="warning") for text in (*for_nothing(run), *disagreements(run))),
            headline_card(run),
            *([section("Did it learn?", parts)] if (parts := did_it_learn(run)) else []),
            section("What it is worth", [*worth(run), *_by_client(run), *_scored(run)]),
            *([section("What it takes pictures for", parts)] if (parts := sheet_parts(run.contact_sheet)) else []),
            section("Privacy", [*privacy_parts(run), *audit_parts(run.audit)]),
            section("Learning, and the privacy it took", [gallery(_learning(run))]),
            section("Server, traffic and time", [gallery(_server(run)), *_layers(run), *_answers(run)]),
            section("Check it and use it", reproduce(run)),
        ],
    )


def _by_client(run: Run) -> list[str]:
    told = client_accuracy_parts(run.client_accuracy)
    picture = own_rows_picture.together_and_alone(run)
    return [*told, gallery([picture])] if picture else told


def _scored(run: Run) -> list[str]:
    return evaluation_parts(run.evaluations, adapter_sha256=run.summary.adapter_sha256)


def _learning(run: Run) -> list[Picture]:
    return [
        learning_pictures.accuracy_by_round(run),
        learning_pictures.accuracy_by_epsilon(run),
        client_pictures.epsilon_by_client(run),
        client_pictures.label_distribution(run),
    ]


def _server(run: Run) -> list[Picture]:
    noise = server_pictures.noise_to_signal(run)
    # Two halves make a row: with the noise there are three, so the time gets a row of its own.
    time = cost_pictures.time_spent(run, is_wide=noise is not None)
    halves = (
        [server_pictures.aggregation_error(run), noise] if noise else [server_pictures.aggregation_error(run), time]
    )
    rest = [singular_values(run), cost_pictures.traffic(run)]
    return [*halves, *rest, time] if noise else [*halves, *rest]


def _layers(run: Run) -> list[str]:
    header = ["Layer", "Name", "Largest singular value", "Aggregation error"]
    rows = layer_rows(run)
    shown = table(header, rows, text_columns=2)
    return [details(f"{count(len(rows), 'layer')} after the last round", [shown])] if rows else []


def _answers(run: Run) -> list[str]:
    """Return what came of asking clients: counts by status, and the reasons of those that did not train."""
    if run.hides_clients:
        return [paragraph("Which clients were asked is told to nobody: this run hides whole clients.", kind="answers")]
    status = Counter(row.status for row in run.asked)
    told = ", ".join(f"{status[name]:,} {name}" for name in sorted(status, key=lambda name: (-status[name], name)))
    parts = [
        paragraph(
            f"Clients were asked {count(len(run.asked), 'time')}: {told or 'nothing to count'}.",
            kind="answers",
        )
    ]
    reasons = Counter((row.status, row.reason or "no reason given") for row in run.asked if row.status != "trained")
    if reasons:
        rows = [[*key, f"{number:,}"] for key, number in sorted(reasons.items())]
        parts.append(details("Why some did not count", [table(["Outcome", "Reason", "Times"], rows, text_columns=2)]))
    return parts
