"""What budgets, cohorts and runtimes do not go with a unit of privacy; methods are in `fedlr.config.unit_methods`."""

from typing import TYPE_CHECKING

from fedlr.errors import InputError
from fedlr.errors.ranges import require_delta

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment


def check_privacy(experiment: "Experiment") -> None:
    """Refuse budgets, cohorts and runtimes that do not go with the unit of privacy.

    Raises:
        InputError: which names the key, its value and what to set.
    """
    e, p = experiment, experiment.privacy
    if p.unit != "client":
        _check_no_client_keys(e)
    if p.unit == "client":
        _check_client(e)
    _check_person(e)
    _check_ftrl(e)
    _check_quantile(e)
    _check_cyclic(e)
    if e.cohort == "poisson" and e.max_participations < e.num_rounds:
        raise InputError(
            f"Expected privacy.max_participations=null with cohort=poisson, got {p.max_participations}, fewer than the "
            f"{e.num_rounds} rounds: whoever was drawn often could not be drawn again, and draws would not be "
            "independent"
        )
    if e.patience is not None and (p.unit == "client" or e.cohort != "fixed"):
        found = "privacy.unit=client" if p.unit == "client" else f"cohort={e.cohort}"
        raise InputError(
            f"Expected patience=null with {found}, got {e.patience}: a run that stops early is charged its announced "
            "rounds, and cohorts that nobody may know cannot be charged beforehand; release=best goes with it"
        )
    if e.cohort == "poisson" and e.runtime.kind != "local":
        raise InputError(
            f"Expected cohort=fixed with runtime={e.runtime.kind}, got poisson: a server asks whoever is connected, "
            "not a fixed population"
        )


def _check_no_client_keys(e: "Experiment") -> None:
    p = e.privacy
    for key, value in (
        ("client_epsilon", p.client_epsilon),
        ("client_delta", p.client_delta),
        ("client_noise_multiplier", p.client_noise_multiplier),
    ):
        if value is not None:
            raise InputError(
                f"Expected privacy.unit=client with privacy.{key}={value:g}, got {p.unit}; privacy=client sets both"
            )


def _check_client(e: "Experiment") -> None:
    p = e.privacy
    if p.client_epsilon is None:
        raise InputError(
            "Expected privacy.client_epsilon with privacy.unit=client, got null: set privacy=client, and beside it "
            "privacy.epsilon for a budget of each client's examples too"
        )
    if p.client_delta is not None:
        require_delta(p.client_delta, p.accountant)
    if e.runtime.kind != "local":
        raise InputError(
            f"Expected runtime=local with privacy.unit=client, got {e.runtime.kind}: a server of devices does not sum "
            "clipped updates yet, and must not say that it does; set privacy=dp"
        )
    if e.weighting != "uniform":
        raise InputError(
            f"Expected weighting=uniform with privacy.unit=client, got {e.weighting}: one client's size would weigh "
            "its update and everybody else's"
        )
    if e.num_clients == 1:
        raise InputError("Expected two clients or more with privacy.unit=client, got 1: nobody hides it")
    if e.adapter.has_client_ranks:
        raise InputError(
            "Expected adapter.client_ranks=null with privacy.unit=client, got ranks: updates of different ranks have "
            "no common sum"
        )
    if p.epsilon is not None and e.cohort == "poisson":
        raise InputError(
            "Expected cohort=fixed with budgets of both units (privacy.epsilon and privacy.client_epsilon), got "
            "poisson: what clients have spent of their own budgets tells who took part, and a Poisson cohort must be "
            "secret"
        )


def _check_ftrl(e: "Experiment") -> None:
    p = e.privacy
    if p.mechanism != "dp_ftrl":
        if p.bands is not None:
            raise InputError(f"Expected privacy.mechanism=dp_ftrl with privacy.bands={p.bands}, got {p.mechanism}")
        return
    expected = "Expected privacy.mechanism=dp_sgd"
    if p.unit != "client":
        raise InputError(
            f"{expected} with privacy.unit={p.unit}, got dp_ftrl: it is proven for noise on the server's sums, of the "
            "client unit; set privacy=client cohort=cyclic"
        )
    if e.cohort != "cyclic":
        raise InputError(
            f"{expected} with cohort={e.cohort}, got dp_ftrl: its proof needs rounds between two participations of a "
            "client; set cohort=cyclic"
        )
    if p.release_noise != "float":
        raise InputError("Expected privacy.release_noise=float with privacy.mechanism=dp_ftrl, got grid: no proof")
    between = -(-e.num_clients // e.cohort_size) if e.num_clients and e.cohort_size else None
    if between == 1:
        raise InputError(
            f"{expected} with cohort_size={e.cohort_size} of num_clients={e.num_clients}, got dp_ftrl: where all "
            "clients take part in every round no round lies between two participations; lower cohort_size"
        )
    if between is not None and p.bands is not None and p.bands > between:
        raise InputError(
            f"Expected privacy.bands in [1, {between}], the rounds from one participation of a client to its next, "
            f"got {p.bands}: beyond them its columns overlap, and no sensitivity is proven"
        )


def _check_quantile(e: "Experiment") -> None:
    p, quantile = e.privacy, e.privacy.client_clip_quantile
    if quantile is None:
        return
    expected = "Expected privacy.client_clip_quantile=null"
    if p.unit != "client":
        raise InputError(
            f"{expected} with privacy.unit={p.unit}, got {quantile:g}: a device's own noise has no sum over clients, "
            "and a count of rows needs noise in every step; set privacy=client, or choose privacy.max_grad_norm"
        )
    if p.mechanism != "dp_sgd":
        raise InputError(
            f"{expected} with privacy.mechanism={p.mechanism}, got {quantile:g}: noise of one bound is taken back "
            "under another, and no sensitivity of that is proven"
        )
    if p.release_noise != "float":
        raise InputError(
            f"{expected} with privacy.release_noise={p.release_noise}, got {quantile:g}: no grid for a count"
        )


def _check_cyclic(e: "Experiment") -> None:
    if e.cohort != "cyclic":
        return
    if e.runtime.kind != "local":
        raise InputError(
            f"Expected cohort=fixed with runtime={e.runtime.kind}, got cyclic: a server asks whoever is connected, "
            "and cannot keep an order"
        )
    if e.privacy.is_private and e.privacy.unit != "client":
        raise InputError(
            f"Expected cohort=fixed with privacy.unit={e.privacy.unit}, got cyclic: its rounds are charged for the "
            "client unit alone; set privacy=client"
        )
    if e.max_participations < e.num_rounds:
        raise InputError(
            f"Expected privacy.max_participations=null with cohort=cyclic, got {e.privacy.max_participations}: the "
            "order says how often a client takes part"
        )


def _check_person(e: "Experiment") -> None:
    p, column = e.privacy, e.data.section().get("person_column")
    if p.unit != "person":
        if p.rows_per_person is not None:
            raise InputError(
                f"Expected privacy.unit=person with privacy.rows_per_person={p.rows_per_person}, got {p.unit}"
            )
        return
    if p.epsilon is None:
        raise InputError("Expected privacy.epsilon with privacy.unit=person, got null: it is the budget of a person")
    if p.rows_per_person is None:
        raise InputError(
            "Expected privacy.rows_per_person with privacy.unit=person, got null: set how many rows of one person are "
            "trained on at most, such as 4; a number that everybody may know"
        )
    if column is None:
        raise InputError(
            "Expected data.person_column with privacy.unit=person, got null: name the column of a data=table that says "
            "whose a row is"
        )
    if e.runtime.kind != "local":
        raise InputError(
            f"Expected runtime=local with privacy.unit=person, got {e.runtime.kind}: devices account for rows, and a "
            "ledger of a device knows no persons yet"
        )
    if p.accountant != "pld" and p.rows_per_person > 1:
        raise InputError(
            f"Expected privacy.accountant=pld with privacy.unit=person, got {p.accountant}: no Renyi bound of several "
            "rows of one person is at hand"
        )
