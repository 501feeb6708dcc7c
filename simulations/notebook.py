"""Federated runs from Python: what `fedlr.simulate` and its neighbours are, for a notebook or a script of one's own.

The words are those of the command line: `fedlr.simulate("experiment=tiny", "num_rounds=3")` is `fedlr simulate
experiment=tiny num_rounds=3`, with the same files, checks and numbers. `parts` puts functions and classes of one's own
where a configuration names parts: `parts={"method.aggregate": my_rule}`.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from secrets import randbits
from typing import TYPE_CHECKING, Any

from fedlr.errors import InputError
from fedlr.runs.commands import quiet_libraries, ready

if TYPE_CHECKING:
    import pandas

    from fedlr.rounds.round import RoundDiagnostics, ServerState
    from fedlr.simulations.federation import Federation
    from fedlr.tasks.evaluation import Evaluation

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what is in it.

    Args:
        folder: the run's directory (docs/files.md says what each file holds).
    """

    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        """Return summary.json: the final score, epsilon, traffic, verdict."""
        return _record(self.folder / "summary.json")

    @property
    def privacy(self) -> dict[str, Any]:
        """Return privacy.json: the statement, with what it does not cover."""
        return _record(self.folder / "privacy.json")

    @property
    def metrics(self) -> "pandas.DataFrame":
        """Return metrics.jsonl as a data frame: a line per round, the first before any training."""
        return _frame(self.folder / "metrics.jsonl")

    @property
    def clients(self) -> "pandas.DataFrame":
        """Return clients.jsonl as a data frame: a line for each client asked in each round."""
        return _frame(self.folder / "clients.jsonl")

    @property
    def adapter(self) -> Path:
        """Return the folder of the adapter, which PEFT opens."""
        return self.folder / "adapter"

    @property
    def report(self) -> Path:
        """Return the page that shows the run."""
        return self.folder / "report.html"

    def __repr__(self) -> str:
        """Say how the run ended."""
        told = self.summary
        spent = told["epsilon_max"]
        privacy = "no privacy" if spent is None else f"epsilon {spent:.3g}"
        score = "no score" if told["final_score"] is None else f"{told['metric']['name']} {told['final_score']:.3f}"
        return f"Run({told['name']}, {told['method']}: {score}, {privacy}; {self.folder})"


def read_run(folder: Path | str) -> Run:
    """Return the finished run of a folder.

    Raises:
        InputError: for a folder without one.
    """
    path = Path(folder)
    if not (path / "summary.json").is_file():
        raise InputError(f"Expected the folder of a finished run, got {str(folder)!r}, which has no summary.json")
    return Run(path)


def simulate(*words: str, parts: Mapping[str, Callable[..., Any]] | None = None, say: Say | None = print) -> Run:
    """Run an experiment on this machine and return what it leaves behind, as `fedlr simulate` does.

    Args:
        words: overrides of the configuration, `KEY=VALUE` each.
        parts: functions and classes of one's own, by the section that each takes the place of.
        say: is told each line of progress; None: nobody is.

    Raises:
        InputError: for whatever could not run as configured; nothing is written then.

    >>> import fedlr
    >>> small = ("num_clients=3", "cohort_size=3", "data.num_examples=60", "data.num_test=20", "runtime.num_workers=1")
    >>> folder = getfixture("tmp_path")
    >>> run = fedlr.simulate("experiment=tiny", "num_rounds=2", *small, f"tracking.output_dir={folder}", say=None)
    >>> len(run.metrics), run.privacy["differential_privacy"], run.report.name
    (3, True, 'report.html')
    """
    quiet_libraries()
    experiment = ready([*words, *words_of(parts)])
    from fedlr.simulations.simulate import simulate as run

    return Run(run(experiment, say=say or _nobody))


def federation(
    *words: str, parts: Mapping[str, Callable[..., Any]] | None = None, say: Say | None = print
) -> "Federation":
    """Return a federation that is ready to train, for a loop of one's own (`train`, `score`); nothing is written.

    Args: see `simulate`.

    Raises:
        InputError: for whatever could not run as configured.
    """
    quiet_libraries()
    experiment = ready([*words, *words_of(parts)])
    from fedlr.simulations.federation import assemble
    from fedlr.training.threads import torch_threads

    with torch_threads(1):
        seed = randbits(32) if experiment.seed is None else experiment.seed
        return assemble(experiment, seed=seed, say=say or _nobody)


def train(
    federation: "Federation", *, ledger: Path | str | None = None, server_ledger: Path | str | None = None
) -> "Iterator[tuple[ServerState, RoundDiagnostics]]":
    """Train a federation, one round per step: yield the server's state after it, and what happened in it.

    Args:
        federation: of `fedlr.federation`.
        ledger: a file that is not there yet, for what each client spends; needed with privacy, as no result may leave
            a client that is not written down.
        server_ledger: likewise, for what the server spends where whole clients are hidden (`privacy.unit=client`).

    Raises:
        InputError: with privacy and without its ledger; a ledger that is there already; or all runs of
            `privacy.ledger` together would exceed its budget.

    >>> import fedlr
    >>> small = ("num_clients=3", "cohort_size=3", "data.num_examples=60", "data.num_test=20", "runtime.num_workers=1")
    >>> f = fedlr.federation("experiment=tiny", "privacy=none", "num_rounds=2", *small, say=None)
    >>> [(state.round_index, len(told.trained)) for state, told in fedlr.train(f)]
    [(1, 3), (2, 3)]
    """
    from fedlr.simulations.all_runs import charge_run
    from fedlr.simulations.choosing import charge_the_rest
    from fedlr.simulations.ledgers import create_ledger, create_server_ledger
    from fedlr.simulations.rounds import rounds_of
    from fedlr.simulations.runtime import make_pool
    from fedlr.training.threads import torch_threads

    for budget, name, given in (
        (federation.budget, "ledger", ledger),
        (federation.client_budget, "server_ledger", server_ledger),
    ):
        if budget is not None and given is None:
            raise InputError(
                f"Expected a {name} with privacy, got none: name a new file, such as {name}='{name}.jsonl', or set "
                "privacy=none"
            )
    clients = None if ledger is None else create_ledger(federation, Path(ledger))
    servers = None if server_ledger is None else create_server_ledger(federation, Path(server_ledger))
    try:
        charge_run(federation)
    except InputError:
        for created in filter(None, (clients, servers)):
            created.path.unlink()  # nothing was trained, and the next call makes it anew
        raise
    with torch_threads(1), closing(make_pool(federation, clients)) as pool:
        done = 0
        try:
            for state, told in rounds_of(federation, federation.start, pool, server_ledger=servers):
                done = state.round_index
                yield state, told
        finally:
            if federation.experiment.cohort != "poisson":  # a secret cohort cannot be charged beforehand
                charge_the_rest(federation, clients, num_rounds=done)


def score(federation: "Federation", state: "ServerState") -> "Evaluation":
    """Return how good a state's adapter is on the held-out rows, which are public; nothing is noised."""
    from fedlr.rounds.round import scored
    from fedlr.simulations.choosing import evaluator_of

    return evaluator_of(federation).score(scored(state))[0]


def words_of(parts: Mapping[str, Callable[..., Any]] | None) -> list[str]:
    """Return the overrides that put functions in the place of parts.

    A class, and what loads data or makes a partition, is called with the section's keys; a rule that is a function is
    used as it is.

    >>> words_of({"method.aggregate": json.dumps, "data": json.loads})
    ['method.aggregate=json.dumps', 'data=own', 'data._target_=json.loads']

    Raises:
        InputError: for a function that has no name of its own in a module, such as a lambda.
    """
    words = []
    for section, function in (parts or {}).items():
        if section == "data":  # the arguments of another source would not fit it
            words.append("data=own")
        is_rule = section.startswith("method.") and not isinstance(function, type)
        words.append(f"{section}={name_of(function)}" if is_rule else f"{section}._target_={name_of(function)}")
    return words


def name_of(function: Callable[..., Any]) -> str:
    """Return the dotted path of a function or class.

    Raises:
        InputError: where that path leads to nothing, or to something else.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    found: Any = sys.modules.get(str(module))
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not function:
        raise InputError(
            f"Expected a function or class at the top of a module or notebook, got {name or function!r}: give it a "
            "name there with def or class"
        )
    return f"{module}.{name}"


def _nobody(line: str) -> None:
    """Tell nobody."""


def _record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _frame(path: Path) -> "pandas.DataFrame":
    import pandas

    return pandas.DataFrame([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
