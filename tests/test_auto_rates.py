"""What stands for auto: public numbers in, plain numbers out, once.

Mutant: a divisor counted from private rows, which one row more or less moves.
"""

from typing import Any

import pytest

from fedlr.config import auto_rates
from fedlr.config.auto_rates import (
    arm,
    found_text,
    noise_multiplier_of,
    noise_of,
    provisional,
    resolved_rates,
    rows_source,
)
from fedlr.config.build import build_method, check_sections
from fedlr.config.schema import AUTO, Experiment, check_experiment, compose_experiment
from fedlr.errors import InputError
from fedlr.flower.terms import Terms
from fedlr.training.rates import ACCUMULATED_NOISE, RATE_WITHOUT_NOISE

TINY = ("experiment=tiny", "trainer.optimizer.lr=auto", "trainer.divisor=auto")

ROWS = 600


def experiment(*words: str) -> Experiment:
    found = compose_experiment([*TINY, *words])
    check_sections(found)
    return found


def numbers(e: Experiment, num_rows: int = ROWS) -> tuple[Any, ...]:
    found = resolved_rates(e, num_rows=num_rows)
    tracking = found.tracking
    return found.trainer.divisor, found.trainer.optimizer.section()["lr"], tracking.no_privacy_lr, tracking.alone_lr


def test_the_noise_of_the_rate_that_is_found_is_the_stated_one() -> None:
    for words in ((), ("server_momentum=0.5",), ("+trainer.optimizer.momentum=0.9",), ("privacy.epsilon=1",)):
        found = resolved_rates(experiment(*words), num_rows=ROWS)
        server_step = build_method(found).server_step
        assert noise_of(found, server_step) == pytest.approx(ACCUMULATED_NOISE, rel=1e-3), words


def test_a_private_row_more_or_less_moves_no_number() -> None:
    e = experiment("data.public=false")
    assert numbers(e, ROWS) == numbers(e, ROWS + 1) == numbers(e, 10 * ROWS)
    assert rows_source(e).startswith("assumed")


def test_a_divisor_that_counts_private_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_rates, "expected_rows", lambda e, *, num_rows: num_rows / e.num_clients)
    e = experiment("data.public=false")
    assert numbers(e, ROWS) != numbers(e, ROWS + 6)


def test_rows_are_declared_or_public_or_a_constant() -> None:
    assert numbers(experiment("data.rows_per_client=300"))[0] == 60.0  # a sample rate of 0.2
    assert numbers(experiment("data.rows_per_client=300", "data.public=false"))[0] == 60.0
    assert numbers(experiment())[0] == 0.2 * (600 - 120) / 6
    assert numbers(experiment("data.num_test=0.5"))[0] == 0.2 * 300 / 6
    assert numbers(experiment("data.public=false"))[0] == 51.2
    assert numbers(experiment("data.rows_per_client=1"))[0] == 1.0, "never less than a row in a step"


def test_a_number_always_wins_and_nothing_changes_without_auto() -> None:
    plain = compose_experiment(["experiment=tiny"])
    assert resolved_rates(plain, num_rows=ROWS) is plain and provisional(plain) is plain
    assert numbers(experiment("trainer.divisor=7"))[0] == 7.0
    found = resolved_rates(experiment("trainer.optimizer.lr=3"), num_rows=ROWS)
    assert found.trainer.optimizer.section()["lr"] == 3 and found.tracking.no_privacy_lr is None
    assert arm(found, "no_privacy_lr") is found, "the twin of a run with a number has the same number"
    assert numbers(experiment("tracking.no_privacy_lr=5"))[2] == 5.0


def test_what_was_found_is_found_again_from_what_was_written() -> None:
    found = resolved_rates(experiment("tracking.run_no_privacy=true"), num_rows=ROWS)
    again = check_experiment(found.resolved())
    assert resolved_rates(again, num_rows=ROWS + 60) == again == found


def test_other_arms_have_a_rate_by_the_same_rule() -> None:
    e = experiment()
    divisor, lr, no_privacy, alone = numbers(e)
    assert no_privacy == RATE_WITHOUT_NOISE
    # Alone, one client in place of three in each of 2 rounds in place of 4 (tiny has 3 rounds of 3 of 6 clients).
    assert alone == pytest.approx(lr * (3 / 2) ** 0.5 * (1 / 3) ** 0.5, rel=1e-3)
    assert numbers(experiment("privacy=none"))[1:] == (RATE_WITHOUT_NOISE,) * 3


def test_scaffold_is_told_the_number_in_every_arm() -> None:
    found = resolved_rates(experiment("method=scaffold"), num_rows=ROWS)
    lr = found.trainer.optimizer.section()["lr"]
    assert found.method["client"]["lr"] == found.method["aggregate"]["lr"] == lr != AUTO
    twin = arm(found, "no_privacy_lr")
    assert twin.method["client"]["lr"] == twin.method["aggregate"]["lr"] == RATE_WITHOUT_NOISE
    build_method(twin)


def test_a_server_optimizer_of_the_method_counts() -> None:
    e = experiment("method=fedavgm", "method.aggregate.lr=1.0")
    step = build_method(e).server_step
    assert step == (0.9, 1.0)
    found = resolved_rates(e, num_rows=ROWS, server_step=step)
    assert found.trainer.optimizer.section()["lr"] < 0.6 * numbers(experiment("method=ffa_lora"))[1]
    assert noise_of(found, step) == pytest.approx(ACCUMULATED_NOISE, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trainer.optimizer._target_=torch.optim.AdamW",), "a number in trainer.optimizer.lr with AdamW, got auto"),
        (("trainer=adamw", "trainer.optimizer.lr=auto"), "set trainer.optimizer.lr=0.005"),
        (("+trainer.optimizer.weight_decay=0.1",), "trainer.optimizer.weight_decay=0 with trainer.optimizer.lr=auto"),
        (("+trainer.optimizer.momentum=1.0",), r"trainer.optimizer.momentum in \[0, 1\)"),
        (("trainer=lora_plus", "method=fedit", "trainer.optimizer.lr=auto"), "trainer.after_noise=null"),
        (("trainer.optimizer.lr=atuo",), "trainer.optimizer.lr"),
        (("trainer.divisor=atuo",), "trainer.divisor to be a valid number or 'auto', got"),
    ],
)
def test_what_the_rule_was_not_derived_for_is_refused_before_any_work(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        experiment(*words)


def test_the_command_that_a_configuration_shows_still_composes_with_what_it_says() -> None:
    for word in ("trainer=adamw", "trainer=lora_plus", "trainer=scaled_gradient"):
        e = compose_experiment([word, "method=fedit"])
        check_sections(e)
        assert e.trainer.divisor == AUTO and e.trainer.optimizer.section()["lr"] != AUTO


def test_a_device_is_never_sent_auto() -> None:
    e = experiment()
    more = {"experiment_id": "0" * 32, "seed": 0, "model_sha256": "0" * 64, "label_names": ["a", "b"]}
    with pytest.raises(ValueError, match="numbers in divisor and optimizer.lr"):
        Terms.of(e, None, **more)
    found = resolved_rates(e, num_rows=ROWS)
    text = Terms.of(found, None, **more).text()
    assert AUTO not in text and noise_multiplier_of(found) is not None
    with pytest.raises(InputError, match="numbers in divisor"):
        Terms.read(text.replace(f'"divisor":{found.trainer.divisor}', '"divisor":"auto"'))


def test_a_run_says_which_numbers_it_found() -> None:
    given = experiment()
    found = resolved_rates(given, num_rows=ROWS)
    divisor, lr, *_ = numbers(given)
    told = found_text(given, found)
    assert told == f"auto is trainer.optimizer.lr={lr:g} and trainer.divisor={divisor:g}, from public numbers"
    assert found_text(found, found) is None
