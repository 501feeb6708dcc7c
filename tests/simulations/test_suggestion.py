"""What the plan says of rate and schedule is what a run of it would have."""

from fedlr.config.auto_rates import learning_rate_of, noise_multiplier_of
from fedlr.config.build import check_sections
from fedlr.config.schema import compose_experiment
from fedlr.runs.prepare import with_found_rates
from fedlr.simulations.federation import prepare
from fedlr.simulations.suggestion import rate_lines, suggestion_lines
from tests.simulations.small_runs import SMALL, experiment

AUTO = ("trainer.optimizer.lr=auto", "trainer.divisor=auto")


def told(*words: str) -> tuple[list[str], list[str]]:
    e = experiment(*words)
    f = prepare(e, seed=0)
    return rate_lines(e, f), suggestion_lines(f)


def test_the_noise_of_a_users_own_rate_is_said_and_what_auto_would_be() -> None:
    rate, suggestion = told()
    found = with_found_rates(experiment(*AUTO), seed=0)
    noise = noise_multiplier_of(found)
    assert noise is not None
    own = 1.0 * noise / 16 * (2 * 2 / 3) ** 0.5  # lr sigma C / D sqrt(steps x rounds / cohort)
    assert rate[0] == f"rate        lr 1, divisor 16: noise of {own:.2g} adds up in a weight of the last model"
    assert rate[1].endswith(f"auto would be lr {learning_rate_of(found):g}, divisor 4.8, for noise of 0.8")


def test_the_suggested_words_make_a_run_with_the_noise_that_is_said() -> None:
    for words in ((), ("privacy.max_participations=2", "privacy.noise_multiplier=0.9"), ("method=fedavgm",)):
        first, second = told(*words)[1]
        typed = first.removeprefix("suggestion").split()
        e = compose_experiment([*SMALL, *words, *typed])
        check_sections(e)
        found = prepare(e, seed=0)
        assert found.mechanism is not None
        assert f"noise multiplier {found.mechanism.noise_multiplier:g} in place of" in second
        assert ("server_momentum=0.5" in typed) == (words != ("method=fedavgm",))
        assert suggestion_lines(found) == [], "what is suggested has nothing better to suggest"


def test_of_private_rows_nothing_is_counted() -> None:
    words = (*AUTO, "data.public=false", "data.num_test=0.2")
    few, many = (told(*words, f"data.num_examples={n}") for n in (120, 130))
    assert few == many and "256 rows a client (assumed: declare data.rows_per_client)" in few[0][1]


def test_other_arms_and_what_has_no_rule() -> None:
    rate, _ = told(*AUTO, "tracking.run_no_privacy=true", "data.rows_per_client=30")
    assert rate[1].endswith("divisor found from 30 rows a client (data.rows_per_client)")
    assert rate[2].endswith("lr 64 for the arm without privacy")
    rate, (first, _) = told("trainer=adamw")
    assert rate == ["rate        lr 1, divisor 16"] and "auto" not in first
    assert told("privacy=none")[1] == []
