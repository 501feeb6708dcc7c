"""What budgets, cohorts and runtimes do not go with a unit of privacy; methods are in `fedlr.config.unit_methods`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlr.config.rule import rule
from fedlr.errors.ranges import delta_refusals

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment

CLIENT_KEYS = ("client_epsilon", "client_delta", "client_noise_multiplier")


@rule("privacy.unit", *(f"privacy.{key}" for key in CLIENT_KEYS))
def budgets_of_clients(e: "Experiment") -> Iterator[str]:
    """A budget of whole clients is for the client unit."""
    for key in CLIENT_KEYS:
        if e.privacy.unit != "client" and (value := getattr(e.privacy, key)) is not None:
            yield (
                f"Expected privacy.unit=client with privacy.{key}={value:g}, got {e.privacy.unit}; privacy=client sets "
                "both"
            )


@rule("privacy.client_epsilon", "privacy.unit")
def client_budget(e: "Experiment") -> Iterator[str]:
    """The client unit has a budget of whole clients."""
    if e.privacy.unit == "client" and e.privacy.client_epsilon is None:
        yield (
            "Expected privacy.client_epsilon with privacy.unit=client, got null: set privacy=client, and beside it "
            "privacy.epsilon for a budget of each client's examples too"
        )


@rule("privacy.client_delta", "privacy.accountant", "privacy.unit")
def client_delta(e: "Experiment") -> Iterator[str]:
    """The delta of clients lies where the accountant's epsilon is an upper bound."""
    if e.privacy.unit == "client" and e.privacy.client_delta is not None:
        yield from delta_refusals(e.privacy.client_delta, e.privacy.accountant)


@rule("runtime", "privacy.unit")
def clients_of_a_simulation(e: "Experiment") -> Iterator[str]:
    """A server of devices does not sum clipped updates, so whole clients are hidden in a simulation only."""
    if e.privacy.unit == "client" and e.runtime.kind != "local":
        yield (
            f"Expected runtime=local with privacy.unit=client, got {e.runtime.kind}: a server of devices does not sum "
            "clipped updates yet, and must not say that it does; set privacy=dp"
        )


@rule("weighting", "privacy.unit")
def equal_clients(e: "Experiment") -> Iterator[str]:
    """Clients that are to be hidden have equal weights: a size would tell of one of them."""
    if e.privacy.unit == "client" and e.weighting != "uniform":
        yield (
            f"Expected weighting=uniform with privacy.unit=client, got {e.weighting}: one client's size would weigh "
            "its update and everybody else's"
        )


@rule("num_clients", "privacy.unit")
def two_clients(e: "Experiment") -> Iterator[str]:
    """A client is hidden among others."""
    if e.privacy.unit == "client" and e.num_clients == 1:
        yield "Expected two clients or more with privacy.unit=client, got 1: nobody hides it"


@rule("adapter.client_ranks", "privacy.unit")
def clients_of_one_rank(e: "Experiment") -> Iterator[str]:
    """Updates of different ranks have no common sum to add noise to."""
    if e.privacy.unit == "client" and e.adapter.has_client_ranks:
        yield (
            "Expected adapter.client_ranks=null with privacy.unit=client, got ranks: updates of different ranks have "
            "no common sum"
        )


@rule("cohort", "privacy.epsilon", "privacy.client_epsilon")
def both_units(e: "Experiment") -> Iterator[str]:
    """With budgets of both units the cohort is no secret: what clients spent of their own tells who took part."""
    if e.privacy.unit == "client" and e.privacy.epsilon is not None and e.cohort == "poisson":
        yield (
            "Expected cohort=fixed with budgets of both units (privacy.epsilon and privacy.client_epsilon), got "
            "poisson: what clients have spent of their own budgets tells who took part, and a Poisson cohort must be "
            "secret"
        )


@rule("privacy.unit", "privacy.rows_per_person")
def rows_of_persons(e: "Experiment") -> Iterator[str]:
    """A bound on the rows of one person is for the person unit."""
    p = e.privacy
    if p.unit != "person" and p.rows_per_person is not None:
        yield f"Expected privacy.unit=person with privacy.rows_per_person={p.rows_per_person}, got {p.unit}"


@rule("privacy.epsilon", "privacy.rows_per_person", "data.person_column", "privacy.unit")
def needs_of_persons(e: "Experiment") -> Iterator[str]:
    """The person unit needs a budget, a bound on the rows of one person, and the column that says whose a row is."""
    p = e.privacy
    if p.unit != "person":
        return
    if p.epsilon is None:
        yield "Expected privacy.epsilon with privacy.unit=person, got null: it is the budget of a person"
    if p.rows_per_person is None:
        yield (
            "Expected privacy.rows_per_person with privacy.unit=person, got null: set how many rows of one person are "
            "trained on at most, such as 4; a number that everybody may know"
        )
    if e.data.section().get("person_column") is None:
        yield (
            "Expected data.person_column with privacy.unit=person, got null: name the column of a data=table that says "
            "whose a row is"
        )


@rule("runtime", "privacy.unit")
def persons_of_a_simulation(e: "Experiment") -> Iterator[str]:
    """The ledger of a device knows rows, not persons."""
    if e.privacy.unit == "person" and e.runtime.kind != "local":
        yield (
            f"Expected runtime=local with privacy.unit=person, got {e.runtime.kind}: devices account for rows, and a "
            "ledger of a device knows no persons yet"
        )


@rule("privacy.accountant", "privacy.unit", "privacy.rows_per_person")
def accountant_of_persons(e: "Experiment") -> Iterator[str]:
    """Several rows of one person are accounted for by the PLD accountant."""
    p = e.privacy
    if p.unit == "person" and p.accountant != "pld" and (p.rows_per_person or 0) > 1:
        yield (
            f"Expected privacy.accountant=pld with privacy.unit=person, got {p.accountant}: no Renyi bound of several "
            "rows of one person is at hand"
        )


@rule("privacy.mechanism", "privacy.bands")
def bands_of_ftrl(e: "Experiment") -> Iterator[str]:
    """Bands are those of the correlated noise of DP-FTRL."""
    p = e.privacy
    if p.mechanism != "dp_ftrl" and p.bands is not None:
        yield f"Expected privacy.mechanism=dp_ftrl with privacy.bands={p.bands}, got {p.mechanism}"


@rule("privacy.mechanism", "privacy.unit", "cohort")
def cycles_of_ftrl(e: "Experiment") -> Iterator[str]:
    """DP-FTRL is proven for whole clients that take part in a fixed order."""
    p = e.privacy
    if p.mechanism != "dp_ftrl":
        return
    if p.unit != "client":
        yield (
            f"Expected privacy.mechanism=dp_sgd with privacy.unit={p.unit}, got dp_ftrl: it is proven for noise on the "
            "server's sums, of the client unit; set privacy=client cohort=cyclic"
        )
    if e.cohort != "cyclic":
        yield (
            f"Expected privacy.mechanism=dp_sgd with cohort={e.cohort}, got dp_ftrl: its proof needs rounds between "
            "two participations of a client; set cohort=cyclic"
        )


@rule("privacy.release_noise", "privacy.mechanism")
def grid_and_ftrl(e: "Experiment") -> Iterator[str]:
    """Correlated noise is not drawn on a grid: no proof is known."""
    if e.privacy.mechanism == "dp_ftrl" and e.privacy.release_noise != "float":
        yield "Expected privacy.release_noise=float with privacy.mechanism=dp_ftrl, got grid: no proof"


@rule("privacy.mechanism", "privacy.bands", "cohort_size", "num_clients")
def rounds_between(e: "Experiment") -> Iterator[str]:
    """With DP-FTRL rounds lie between two participations of a client, at least as many as there are bands."""
    p = e.privacy
    if p.mechanism != "dp_ftrl" or not e.num_clients or not e.cohort_size:
        return
    between = -(-e.num_clients // e.cohort_size)
    if between == 1:
        yield (
            f"Expected privacy.mechanism=dp_sgd with cohort_size={e.cohort_size} of num_clients={e.num_clients}, got "
            "dp_ftrl: where all clients take part in every round no round lies between two participations; lower "
            "cohort_size"
        )
    if p.bands is not None and p.bands > between:
        yield (
            f"Expected privacy.bands in [1, {between}], the rounds from one participation of a client to its next, "
            f"got {p.bands}: beyond them its columns overlap, and no sensitivity is proven"
        )


@rule("privacy.client_clip_quantile", "privacy.unit", "privacy.mechanism", "privacy.release_noise")
def adaptive_clip(e: "Experiment") -> Iterator[str]:
    """A clip bound that follows a quantile is for the client unit, whose noised sum has room for a noised count."""
    p, quantile = e.privacy, e.privacy.client_clip_quantile
    if quantile is None:
        return
    expected = "Expected privacy.client_clip_quantile=null"
    if p.unit != "client":
        yield (
            f"{expected} with privacy.unit={p.unit}, got {quantile:g}: a device's own noise has no sum over clients, "
            "and a count of rows needs noise in every step; set privacy=client, or choose privacy.max_grad_norm"
        )
    if p.mechanism != "dp_sgd":
        yield (
            f"{expected} with privacy.mechanism={p.mechanism}, got {quantile:g}: noise of one bound is taken back "
            "under another, and no sensitivity of that is proven"
        )
    if p.release_noise != "float":
        yield f"{expected} with privacy.release_noise={p.release_noise}, got {quantile:g}: no grid for a count"


@rule("cohort", "runtime", "privacy.unit", "privacy.max_participations")
def cyclic_cohorts(e: "Experiment") -> Iterator[str]:
    """Clients take part in a fixed order in a simulation, privately only with the client unit, in every cycle."""
    if e.cohort != "cyclic":
        return
    if e.runtime.kind != "local":
        yield (
            f"Expected cohort=fixed with runtime={e.runtime.kind}, got cyclic: a server asks whoever is connected, "
            "and cannot keep an order"
        )
    if e.privacy.is_private and e.privacy.unit != "client":
        yield (
            f"Expected cohort=fixed with privacy.unit={e.privacy.unit}, got cyclic: its rounds are charged for the "
            "client unit alone; set privacy=client"
        )
    if e.max_participations < e.num_rounds:
        yield (
            f"Expected privacy.max_participations=null with cohort=cyclic, got {e.privacy.max_participations}: the "
            "order says how often a client takes part"
        )


@rule("privacy.max_participations", "cohort")
def independent_draws(e: "Experiment") -> Iterator[str]:
    """Poisson cohorts are drawn independently, so nobody is left out for having been drawn before."""
    if e.cohort == "poisson" and e.max_participations < e.num_rounds:
        yield (
            f"Expected privacy.max_participations=null with cohort=poisson, got {e.privacy.max_participations}, fewer "
            f"than the {e.num_rounds} rounds: whoever was drawn often could not be drawn again, and draws would not be "
            "independent"
        )


@rule("patience", "privacy.unit", "cohort")
def stopping_and_secret_cohorts(e: "Experiment") -> Iterator[str]:
    """A run that may stop early has a cohort of fixed size and a budget of rows, which are charged round by round."""
    if e.patience is not None and (e.privacy.unit == "client" or e.cohort != "fixed"):
        found = "privacy.unit=client" if e.privacy.unit == "client" else f"cohort={e.cohort}"
        yield (
            f"Expected patience=null with {found}, got {e.patience}: a run that stops early is charged its announced "
            "rounds, and cohorts that nobody may know cannot be charged beforehand; release=best goes with it"
        )


@rule("cohort", "runtime")
def poisson_cohorts(e: "Experiment") -> Iterator[str]:
    """A server asks the devices that are connected, which is no Poisson draw of a population."""
    if e.cohort == "poisson" and e.runtime.kind != "local":
        yield (
            f"Expected cohort=fixed with runtime={e.runtime.kind}, got poisson: a server asks whoever is connected, "
            "not a fixed population"
        )
