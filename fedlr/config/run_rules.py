"""What goes together in any run: clients and rounds, noise and seeds, baselines and public data."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlr.config.ledger_rules import BASELINES
from fedlr.config.rule import rule
from fedlr.errors.ranges import delta_refusals

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment


@rule("privacy.delta", "privacy.accountant")
def delta(e: "Experiment") -> Iterator[str]:
    """Delta lies where the accountant's epsilon is an upper bound."""
    if e.privacy.epsilon is not None:
        yield from delta_refusals(e.privacy.delta, e.privacy.accountant)


@rule("data.max_length", "model.max_length")
def length_of_rows(e: "Experiment") -> Iterator[str]:
    """A made-up model reads rows as long as the data have them."""
    most = e.model.section().get("max_length")
    if isinstance(most, int) and 8 <= most < e.data.max_length:
        yield f"Expected data.max_length <= model.max_length={most}, got {e.data.max_length}"


@rule("num_clients", "runtime")
def devices_are_counted(e: "Experiment") -> Iterator[str]:
    """A server is told how many devices there are; in a simulation null takes what the data have."""
    if e.num_clients == 0 and e.runtime.kind != "local":
        yield (
            f"Expected num_clients to be a number with runtime={e.runtime.kind}, got null: a server counts devices, "
            "not rows"
        )


@rule("privacy.max_participations", "num_rounds")
def participations(e: "Experiment") -> Iterator[str]:
    """A client takes part once per round at most."""
    if e.max_participations > e.num_rounds:
        yield f"Expected privacy.max_participations <= num_rounds={e.num_rounds}, got {e.max_participations}"


@rule("cohort_size", "privacy.max_participations", "num_clients", "num_rounds")
def clients_fill_rounds(e: "Experiment") -> Iterator[str]:
    """There are enough clients, that may take part often enough, for every round."""
    if not e.num_clients:
        return
    if e.cohort_size > e.num_clients:
        yield f"Expected cohort_size <= num_clients={e.num_clients}, got {e.cohort_size}"
    if e.max_participations * e.num_clients < e.num_rounds * e.cohort_size:
        yield (
            f"Expected privacy.max_participations >= {-(-e.num_rounds * e.cohort_size // e.num_clients)} so that "
            f"{e.num_clients} clients can fill {e.num_rounds} rounds of {e.cohort_size}, got {e.max_participations}"
        )


@rule("weighting", "data.public", "privacy.epsilon")
def weights_by_size(e: "Experiment") -> Iterator[str]:
    """Weights by size reveal whether one row is present: clients of private data have equal weights."""
    if e.weighting == "examples" and not e.data.public and e.privacy.is_private:
        yield (
            "Expected weighting=uniform, got 'examples': weights by size reveal whether one row is present; "
            "if sizes are public knowledge, say data.public=true"
        )


@rule("privacy.noise_multiplier", "privacy.epsilon")
def noise_and_budget(e: "Experiment") -> Iterator[str]:
    """Noise is added where there is a budget."""
    if e.privacy.noise_multiplier is not None and e.privacy.epsilon is None:
        yield (
            f"Expected privacy=dp with privacy.noise_multiplier={e.privacy.noise_multiplier:g}, got no "
            "privacy.epsilon: without a budget no noise is added"
        )


@rule("seed", "privacy.randomness")
def noise_without_a_seed(e: "Experiment") -> Iterator[str]:
    """Noise of the operating system goes with no seed: what can be repeated can be subtracted."""
    if e.privacy.randomness == "os" and e.seed is not None:
        yield (
            f"Expected seed=null with privacy.randomness=os, got seed={e.seed}: noise that a seed can "
            "repeat can be subtracted"
        )


@rule("runtime.base_dtype", "privacy.randomness", "privacy.epsilon")
def released_in_float32(e: "Experiment") -> Iterator[str]:
    """What is released is trained in float32: in bfloat16 rounding lets one example change what others add."""
    if e.runtime.base_dtype == "bfloat16" and e.privacy.is_private and e.privacy.randomness == "os":
        yield (
            "Expected runtime.base_dtype=float32 with privacy.randomness=os, got bfloat16: one example can change how "
            "others are padded, and so round, by hundredths of the clip bound, which no epsilon here allows for"
        )


@rule("privacy.randomness", "runtime", "deployment.rehearsal")
def noise_of_devices(e: "Experiment") -> Iterator[str]:
    """Devices draw noise that the server cannot repeat, except in a rehearsal on data that are nobody's."""
    seeded = e.privacy.randomness == "seeded" and e.privacy.epsilon is not None
    if e.runtime.kind == "superlink" and seeded and not e.deployment.rehearsal:
        yield (
            "Expected privacy.randomness=os seed=null with runtime=superlink, got 'seeded': noise of a seed that "
            "the server knows hides nothing from it; on data of no one's, say deployment.rehearsal=true"
        )


@rule("deployment.min_updates", "cohort_size", "runtime")
def updates_of_a_round(e: "Experiment") -> Iterator[str]:
    """A round needs no more updates than it asks clients for."""
    if e.runtime.kind != "local" and e.deployment.min_updates > e.cohort_size:
        yield (
            f"Expected deployment.min_updates <= cohort_size={e.cohort_size}, got {e.deployment.min_updates}: no round "
            "could ever have enough updates"
        )


@rule("tracking.tracker", "runtime")
def tracker_of_a_simulation(e: "Experiment") -> Iterator[str]:
    """Only a simulation sends its lines to a tracker."""
    if e.tracking.tracker is not None and e.runtime.kind != "local":
        yield (
            f"Expected tracking.tracker=null with runtime={e.runtime.kind}, got {e.tracking.tracker}: only runs of "
            "runtime=local send their lines to one"
        )


@rule("tracking.client_accuracy", "data.public", "runtime")
def accuracy_of_clients(e: "Experiment") -> Iterator[str]:
    """The accuracy on a client's own rows tells of them: it is measured in a simulation, on public data."""
    if e.tracking.client_accuracy and not e.data.public:
        yield (
            "Expected tracking.client_accuracy=false, got true: the accuracy on a client's own rows tells of them, and "
            "no epsilon covers it; if the data are public knowledge, say data.public=true"
        )
    if e.tracking.client_accuracy and e.runtime.kind != "local":
        yield (
            f"Expected tracking.client_accuracy=false with runtime={e.runtime.kind}, got true: a server knows no "
            "rows of a device's own"
        )


@rule(*(f"tracking.{key}" for key in BASELINES), "data.public", "privacy.epsilon")
def baselines(e: "Experiment") -> Iterator[str]:
    """Baselines train on the same rows outside the privacy statement: those of a private run need public data."""
    for key in BASELINES:
        if getattr(e.tracking, key) and e.privacy.is_private and not e.data.public:
            yield (
                f"Expected tracking.{key}=false, got true: baselines train on the same rows outside the privacy "
                "statement; if the data are public knowledge, say data.public=true"
            )
