"""privacy.json in words: what is promised, to whom the numbers belong, and what is not covered."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from fedlr.errors import InputError
from fedlr.privacy.units import CLIENT
from fedlr.runs.report.layout import bullets, details, paragraph, table
from fedlr.runs.report.run_files import Run
from fedlr.runs.report.wording import digits_up, epsilon_text, short

NOT_COVERED = ("not_covered", "what_is_not_covered", "excluded")


def privacy_parts(run: Run) -> list[str]:
    """Return the HTML of the privacy section."""
    statement = run.statement.get("statement")
    parts = [paragraph(statement, kind="lead")] if isinstance(statement, str) else []
    parts += [paragraph(text) for text in meaning(run)]
    if isinstance(choices := run.statement.get("choices"), list):
        parts += ["<h3>What was decided on the way, and what that read</h3>", bullets(map(_plain, choices))]
    key = next((key for key in NOT_COVERED if run.statement.get(key)), None)
    parts.append("<h3>What is not covered</h3>")
    if not run.summary.is_private:
        parts.append(paragraph("Everything: this run gives no differential privacy."))
    elif key is None:
        missing = "privacy.json lists nothing here. Take that as a gap in the statement, not as a wider guarantee."
        parts.append(paragraph(missing))
    else:
        parts.append(_value(run.statement[key]))
    rest = {name: value for name, value in run.statement.items() if name not in (key, "statement", "choices")}
    return [*parts, details("The whole statement, as in privacy.json", [_value(rest)])]


def headline(run: Run) -> tuple[str, str]:
    """Return the privacy of a run in a word or two, and the remark below it."""
    summary = run.summary
    if not summary.is_private:
        return "no differential privacy", "what clients send may reveal their examples"
    if summary.epsilon_max is None:
        return "not stated", "the run asked for privacy but summary.json has no epsilon"
    if not math.isfinite(summary.epsilon_max):
        return "no differential privacy", "epsilon is infinite: no noise was added"
    delta = "no delta stated" if summary.delta is None else f"delta = {short(summary.delta)}"
    whom = f"as {reported} report" if (reported := reporting(run)) else "max over clients"
    if run.statement.get("unit") == CLIENT.text:
        whom = "of one whole client, towards all but the server"
    if run.statement.get("trials"):
        whom = "with the choice among trials, for whoever sees this run alone"
    return f"ε = {epsilon_text(summary.epsilon_max)}", f"{whom}, at {delta}{_with_start(run)}"


def _with_start(run: Run) -> str:
    """Say what is known of a row that the earlier run read too, whose adapter this one began with."""
    if not isinstance(started := run.statement.get("started_from"), Mapping):
        return ""
    total = started.get("epsilon_sum")
    told = f"at most {epsilon_text(total)} with its start" if isinstance(total, float) else "no bound"
    return f"; {told}, for a row that the start was trained on too"


def reporting(run: Run) -> str:
    """Return of how many clients a server knows what they say of their own ledgers; "" where the ledger is here."""
    if run.statement.get("reported_by_clients") is not True:
        return ""
    return f"{run.statement.get('num_clients_that_reported')} of {run.summary.num_clients} clients"


def meaning(run: Run) -> list[str]:
    """Return what the epsilon of this run means, in sentences."""
    summary, last = run.summary, run.states[-1]
    epsilon = summary.epsilon_max
    if not summary.is_private or epsilon is None or not math.isfinite(epsilon):
        return ["Nothing bounds what the messages of a client reveal: keep them as safe as its data."]
    is_chosen = bool(run.statement.get("trials"))
    unit = run.statement.get("unit")
    unit = unit if isinstance(unit, str) else "one protected unit (see the statement)"
    delta = "delta" if summary.delta is None else f"delta = {short(summary.delta)}"
    is_of_clients = unit == CLIENT.text
    seen = (
        f"every model that the server publishes may change their odds on whether {unit} took part"
        if is_of_clients
        else f"everything that a client sent may change their odds on whether {unit} was among its data"
    )
    if is_chosen:
        seen = f"this run, and none of the other trials, may change their odds on whether {unit} was in it"
    sentences = [
        f"In words: whoever sees {seen} by a factor of at most e^ε = {_odds(epsilon)}, apart "
        f"from a probability of at most about {delta}. This is a worst case; a smaller ε is a stronger "
        "promise. On this page ε is rounded up."
    ]
    if is_of_clients:
        sentences.append(
            "It is the same for every client. The server is trusted: it sees each update in the clear, and tells "
            "nobody who took part, which is why this page has no client of its own to show."
        )
    elif not is_chosen and last.epsilon_median is not None and last.epsilon_min is not None:
        sentences.append(
            f"ε is {epsilon_text(epsilon)} for the client that spent most, "
            f"{epsilon_text(last.epsilon_median)} for the median client and "
            f"{epsilon_text(last.epsilon_min)} for the one that spent least. The first number is the one to "
            "quote: it is neither a mean nor a sum over clients, and each client vouches for its own."
        )
    if is_chosen:
        sentences.append("It counts the choice among trials; lines of rounds and of clients are of this trial alone.")
    else:
        sentences += _told_otherwise(run.statement.get("profile"), is_of_clients=is_of_clients)
    of_clients = run.statement.get("client_unit")
    if isinstance(of_clients, Mapping) and isinstance(of_clients.get("statement"), str):
        sentences.append(
            f"Whole clients have another epsilon, which is never added to this one: {of_clients['statement']}"
        )
    if reported := reporting(run):
        sentences.append(
            f"These are the words of {reported} about ledgers of their own, which this server cannot check; a client "
            "that was asked and never heard may have spent as much."
        )
    return sentences


def _told_otherwise(curve: object, *, is_of_clients: bool) -> list[str]:
    """Return the same steps by another relation and by several at once, where the statement has them.

    Raises:
        InputError: the curve was changed to something else.
    """
    if not isinstance(curve, Mapping) or "replace" not in curve:
        return []
    try:
        return [" ".join([*_relations(curve, is_of_clients=is_of_clients), _gaussian(curve["add_or_remove"])])]
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"Expected the curve of a statement in profile of privacy.json, got {error!r:.200}") from None


def _relations(curve: Mapping[str, Any], *, is_of_clients: bool) -> list[str]:
    replaced, several = (
        [point for point in points if point["epsilon"] is not None]
        for points in (curve["replace"]["epsilon"], curve.get("several", ()))
    )
    other = "whose updates are replaced by others'" if is_of_clients else "that is replaced by another"
    told = ", ".join(f"{epsilon_text(p['epsilon'])} at delta = {short(p['delta'])}" for p in replaced)
    added = "whose updates count or count as zero" if is_of_clients else "that is added or removed"
    words = [f"That is for one {added}. For one {other}, " + (f"ε is {told}." if told else "nothing bounds ε.")]
    if several:
        whom = "such as clients of one owner" if is_of_clients else "such as the rows of one person"
        told = ", ".join(f"{epsilon_text(point['epsilon'])} for {point['count']}" for point in several)
        words.append(f"For several at once, {whom}, it is {told}.")
    return words


def _gaussian(bounds: Mapping[str, Any]) -> str:
    mu, partly = digits_up(bounds["mu"]), bounds.get("partly")
    if partly is None:
        return f"The steps are together a Gaussian mechanism with μ = {mu}."
    return (
        f"At every delta of {short(partly['delta_at_least'])} or more, ε is at most that of a Gaussian mechanism "
        f"with μ = {digits_up(partly['mu'])}; only μ = {mu} bounds the whole curve."
    )


def _odds(epsilon: float) -> str:
    """Return e^epsilon, rounded up like epsilon itself."""
    if epsilon > 30:
        return f"e^{epsilon_text(epsilon)}"
    odds = math.exp(epsilon)
    return f"{math.ceil(100 * odds) / 100:.2f}" if odds < 10 else f"{math.ceil(odds):,}"


def _value(value: object) -> str:
    """Return any JSON value as HTML: objects as two columns, lists as bullets, lists of objects as tables."""
    if isinstance(value, Mapping):
        rows = (f'<tr><th scope="row">{escape(_words(k))}</th><td>{_value(v)}</td></tr>' for k, v in value.items())
        return '<div class="scroll"><table><tbody>\n' + "\n".join(rows) + "\n</tbody></table></div>"
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        keys = list(dict.fromkeys(key for item in value for key in item))
        cells = [[_plain(item.get(key, "")) for key in keys] for item in value]
        return details(f"{len(value)} entries", [table([_words(key) for key in keys], cells, text_columns=len(keys))])
    if isinstance(value, list):
        return bullets(map(_plain, value))
    return escape(_plain(value))


def _words(key: str) -> str:
    return key.replace("_", " ")


def _plain(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{_words(str(key))}: {_plain(item)}" for key, item in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)
