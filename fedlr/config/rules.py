"""Rules of a configuration that span several keys: what goes together, and what would lie."""

from typing import TYPE_CHECKING

from fedlr.config.language_rules import check_language
from fedlr.config.ledger_rules import check_ledger
from fedlr.config.schedules import check_schedules
from fedlr.config.start_rules import check_start
from fedlr.config.trials_rules import check_trials
from fedlr.config.unit_rules import check_privacy
from fedlr.config.validation_rules import check_validation
from fedlr.errors import InputError
from fedlr.errors.ranges import require_delta

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment


BASELINES = ("run_no_privacy", "run_alone", "run_centralised")  # of tracking: what trains on the same rows again


def check_together(experiment: "Experiment") -> None:
    """Refuse values that are right one by one and wrong together.

    Raises:
        InputError: which names the key to change.
    """
    e = experiment
    check_start(e)
    check_language(e)
    if e.privacy.epsilon is not None:
        require_delta(e.privacy.delta, e.privacy.accountant)
    most = e.model.section().get("max_length")
    if isinstance(most, int) and 8 <= most < e.data.max_length:
        raise InputError(f"Expected data.max_length <= model.max_length={most}, got {e.data.max_length}")
    check_held_out(e)
    check_validation(e)
    check_schedules(e)
    check_privacy(e)
    check_ledger(e, BASELINES)
    check_trials(e, BASELINES)
    if e.num_clients == 0 and e.runtime.kind != "local":
        raise InputError(
            f"Expected num_clients to be a number with runtime={e.runtime.kind}, got null: a server counts devices, "
            "not rows"
        )
    if e.max_participations > e.num_rounds:
        raise InputError(
            f"Expected privacy.max_participations <= num_rounds={e.num_rounds}, got {e.max_participations}"
        )
    if e.num_clients:
        check_num_clients(e)
    if e.weighting == "examples" and not e.data.public and e.privacy.is_private:
        raise InputError(
            "Expected weighting=uniform, got 'examples': weights by size reveal whether one row is present; "
            "if sizes are public knowledge, say data.public=true"
        )
    if e.privacy.noise_multiplier is not None and e.privacy.epsilon is None:
        raise InputError(
            f"Expected privacy=dp with privacy.noise_multiplier={e.privacy.noise_multiplier:g}, got no "
            "privacy.epsilon: without a budget no noise is added"
        )
    if e.privacy.randomness == "os" and e.seed is not None:
        raise InputError(
            f"Expected seed=null with privacy.randomness=os, got seed={e.seed}: noise that a seed can "
            "repeat can be subtracted"
        )
    if e.runtime.base_dtype == "bfloat16" and e.privacy.is_private and e.privacy.randomness == "os":
        raise InputError(
            "Expected runtime.base_dtype=float32 with privacy.randomness=os, got bfloat16: one example can change how "
            "others are padded, and so round, by hundredths of the clip bound, which no epsilon here allows for"
        )
    if e.runtime.kind == "superlink" and e.privacy.randomness == "seeded" and not e.deployment.rehearsal:
        if e.privacy.epsilon is not None:
            raise InputError(
                "Expected privacy.randomness=os seed=null with runtime=superlink, got 'seeded': noise of a seed that "
                "the server knows hides nothing from it; on data of no one's, say deployment.rehearsal=true"
            )
    if e.runtime.kind != "local" and e.deployment.min_updates > e.cohort_size:
        raise InputError(
            f"Expected deployment.min_updates <= cohort_size={e.cohort_size}, got {e.deployment.min_updates}: no round "
            "could ever have enough updates"
        )
    if e.tracking.tracker is not None and e.runtime.kind != "local":
        raise InputError(
            f"Expected tracking.tracker=null with runtime={e.runtime.kind}, got {e.tracking.tracker}: only runs of "
            "runtime=local send their lines to one"
        )
    if e.tracking.client_accuracy and not e.data.public:
        raise InputError(
            "Expected tracking.client_accuracy=false, got true: the accuracy on a client's own rows tells of them, and "
            "no epsilon covers it; if the data are public knowledge, say data.public=true"
        )
    if e.tracking.client_accuracy and e.runtime.kind != "local":
        raise InputError(
            f"Expected tracking.client_accuracy=false with runtime={e.runtime.kind}, got true: a server knows no "
            "rows of a device's own"
        )
    baselines = [key for key in BASELINES if getattr(e.tracking, key)]
    if baselines and e.privacy.is_private and not e.data.public:
        raise InputError(
            f"Expected tracking.{baselines[0]}=false, got true: baselines train on the same rows outside the privacy "
            "statement; if the data are public knowledge, say data.public=true"
        )


def check_held_out(experiment: "Experiment") -> None:
    """Refuse data without, or with two ways to say, which rows are held out.

    Raises:
        InputError: which names the keys.
    """
    data = experiment.data
    ways = {"num_test": data.num_test, "test_path": data.test_path, "test_split": data.test_split}
    given = {key: value for key, value in ways.items() if value is not None}
    if not given:
        raise InputError(
            "Expected a value for data.num_test, data.test_path or data.test_split, got none: add data.num_test=0.2, "
            "a share of the rows, or the table that is held out"
        )
    if len(given) > 1:
        first, second = list(given)[:2]
        raise InputError(
            f"Expected data.{first}=null beside data.{second}, got {given[first]!r}: rows are held out in one way"
        )


def check_num_clients(experiment: "Experiment") -> None:
    """Refuse a cohort and participations that so many clients cannot fill.

    Raises:
        InputError: which names the key to change.
    """
    e = experiment
    if e.cohort_size > e.num_clients:
        raise InputError(f"Expected cohort_size <= num_clients={e.num_clients}, got {e.cohort_size}")
    if e.max_participations * e.num_clients < e.num_rounds * e.cohort_size:
        raise InputError(
            f"Expected privacy.max_participations >= {-(-e.num_rounds * e.cohort_size // e.num_clients)} so that "
            f"{e.num_clients} clients can fill {e.num_rounds} rounds of {e.cohort_size}, got {e.max_participations}"
        )
