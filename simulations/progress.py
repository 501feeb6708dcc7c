"""Live progress: one plain line a round, readable in a terminal and in a log file."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlr.config.auto_rates import alone_rounds
from fedlr.config.schema import Experiment
from fedlr.runs.outcome import SMALLER_STEPS, counted
from fedlr.runs.recorder import score_text
from fedlr.runs.report.wording import count, epsilon_text
from fedlr.runs.selection import BEST, LAST, VALIDATION, told
from fedlr.runs.verdict import verdict_lines
from fedlr.tasks.evaluation import ACCURACY, Metric


class Progress:
    """Says where the run is and how long it will still take, in units of one client's round.

    The main run, the run without privacy and the clients alone cost about the same a client and round, so what is left
    is estimated from what is done.
    """

    def __init__(self, experiment: Experiment, *, say: Callable[[str], None], metric: Metric = ACCURACY) -> None:
        e = experiment
        arms = 1 + int(e.tracking.run_no_privacy and e.privacy.is_private)
        alone = e.num_clients * alone_rounds(e) if e.tracking.run_alone else 0
        self._experiment, self.say, self._metric = e, say, metric
        together = e.num_rounds * e.num_clients if e.tracking.run_centralised else 0
        self._total = arms * e.num_rounds * e.cohort_size + together + alone
        self._done = 0
        self._lock = threading.Lock()
        self._started = time.perf_counter()

    def arm(self, name: str, experiment: Experiment, row: dict[str, Any]) -> None:
        """Announce an arm of the run and its start."""
        e = experiment
        who = "1 client" if e.num_clients == 1 else f"{e.num_clients} clients, {e.cohort_size} a round"
        self.say(f"\n{name}: {who}")
        self.say(f"  start        {self._scored(row)}")

    def taken_up(self, num_rounds: int) -> None:
        """Announce a federated run that goes on."""
        self._total -= num_rounds * self._experiment.cohort_size
        self.say(f"\ngoing on after round {num_rounds}/{self._experiment.num_rounds}")

    def round_done(self, row: dict[str, Any], *, num_clients: int) -> None:
        """Report one finished round."""
        self._done += num_clients
        number = f"{row['rounds_completed']:>{len(str(self._experiment.num_rounds))}}/{self._experiment.num_rounds}"
        epsilon = "no privacy" if row["epsilon_max"] is None else f"epsilon {epsilon_text(row['epsilon_max'])}"
        privacy = self._experiment.privacy
        budget = privacy.client_epsilon if privacy.epsilon is None else privacy.epsilon
        of_budget = "" if row["epsilon_max"] is None else f" of {budget:g}"
        if privacy.epsilon is not None and row.get("epsilon_client") is not None:
            of_budget += f" of rows, {epsilon_text(row['epsilon_client'])} of {privacy.client_epsilon:g} of clients"
        if "codec_error" in row:
            of_budget += f"   codec {percent(row['codec_error'])}"
        absent = f"   without an update: {counted(row['reasons'])}" if row["reasons"] else ""
        self.say(
            f"  round {number}  {self._scored(row)}   {epsilon}{of_budget}"
            f"   {row['seconds']['round']:.1f} s   left {self.left()}{absent}"
        )
        if row["num_trained"] == 0:
            self.say(f"  NO USABLE UPDATE in round {row['rounds_completed']}: the model stays as it was")
        if row["accuracy"] is not None and row["loss"] is None:
            self.say(f"  NOT FINITE: the model's outputs overflow; {SMALLER_STEPS}")

    def arm_done(self, experiment: Experiment, *, num_rounds: int, is_private: bool) -> None:
        """Say that an arm stopped before its last round, if it did."""
        e = experiment
        if num_rounds == e.num_rounds:
            return
        self._total -= (e.num_rounds - num_rounds) * e.cohort_size
        self.say(
            f"  stopped: {count(e.patience or 0, 'scored round')} without a better model on validation rows"
            + ("" if e.release == BEST else "; released is the last model, as release=last says, not the best")
            + (f"; epsilon is that of all {e.num_rounds} announced rounds" if is_private else "")
        )

    def judged(self, verdict: Mapping[str, Any], released: Mapping[str, Any]) -> None:
        """Say which model is released where it is not the last, whether the run learned, and what to change if not."""
        if released["model"] != LAST:
            self.say(f"\n{told(released)}")
        for line in verdict_lines(verdict):
            self.say(line)

    def alone(self) -> None:
        """Announce the clients that train alone."""
        self.say(f"\neach client alone: {alone_rounds(self._experiment)} rounds of the same steps")

    def client_done(self) -> None:
        """Count one round of one client alone; called from several threads."""
        with self._lock:
            self._done += 1

    def alone_done(self, scores: Sequence[float], *, num_idle: int) -> None:
        """Report how the clients alone came out."""
        worst, best = sorted((min(scores), max(scores)), reverse=not self._metric.higher_is_better)
        mean, worst_text, best_text = map(self._metric.text, (statistics.fmean(scores), worst, best))
        self.say(f"  {self._metric.name} mean {mean}, worst {worst_text}, best {best_text}")
        if num_idle:
            self.say(f"  NO USABLE UPDATE of {num_idle} clients alone: they stay at the start")

    def _scored(self, row: dict[str, Any]) -> str:
        """Write headline and loss of a state, or that it has none."""
        if row["accuracy"] is None:
            return "not scored"
        found = f"{self._score(row)}   {loss_text(row)}"
        if VALIDATION not in row:
            return found
        value = row[VALIDATION][self._metric.name]
        return f"{found}   on validation rows {'not finite' if value is None else self._metric.text(value)}"

    def _score(self, row: Mapping[str, Any]) -> str:
        """Write the headline of a state; one that is not finite has no number."""
        name, text = self._metric.name, score_text(row, self._metric)
        of_groups = row.get("measures", {}).get(f"macro_{name}")
        return text if of_groups is None else f"{text}, of groups {self._metric.text(of_groups)}"

    def left(self) -> str:
        """Return the estimated time left, as minutes and seconds."""
        seconds = (time.perf_counter() - self._started) / max(self._done, 1) * (self._total - self._done)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def loss_text(row: dict[str, Any]) -> str:
    """Write the loss of a state; one that is not finite has no number."""
    return "loss not finite" if row["loss"] is None else f"loss {row['loss']:.3f}"


def percent(share: float | None) -> str:
    """Write how far a codec moved an update, relative to how far that moved.

    >>> percent(0.0071), percent(None)
    ('0.71 %', 'not finite')
    """
    return "not finite" if share is None else f"{100 * share:.2g} %"
