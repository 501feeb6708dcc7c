"""What a rule that resists hostile clients cannot go together with is one sentence, before any work."""

import pytest

from fedlr.config.runtime_rules import check_method
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.methods.aggregate.multi_krum import MultiKrum
from tests.methods_of_files import method_of

ROBUST = ("coordinate_median", "trimmed_mean", "multi_krum", "geometric_median", "centered_clipping")


def check(*words: str) -> None:
    experiment = compose_experiment(["experiment=tiny", *words])
    check_method(experiment, method_of("fedsvd", *words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=multi_krum", "cohort_size=4"], "cohort_size >= 5 with method.aggregate=multi_krum.* got 4"),
        (["method=trimmed_mean", "method.aggregate.num_malicious=2"], "cohort_size >= 5 with .*trimmed_mean.* got 3"),
        (
            ["method=coordinate_median", "weighting=examples"],
            "weighting=uniform with method.aggregate=coordinate_median",
        ),
        (
            ["method=trimmed_mean", "adapter.client_ranks=[1,2,2,4,4,4]"],
            "adapter.client_ranks=null with .*trimmed_mean",
        ),
        (
            ["method=fedsa_lora", "method.aggregate=geometric_median"],
            "without personal factors with .*geometric_median",
        ),
        (
            ["method=trimmed_mean", "runtime=flower", "deployment.min_updates=2"],
            "deployment.min_updates >= 3 with .*trimmed_mean.* got 2",
        ),
    ],
)
def test_what_would_break_a_rules_promise_is_refused_by_key(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(*words)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("method", ["fedsvd", "rolora", "fedit", "ffa_lora_orthonormal"])
def test_a_rule_goes_into_any_method_of_a_mean_by_one_key(name: str, method: str) -> None:
    words = [f"method={method}", f"method.aggregate={name}", "cohort_size=6"]
    check(*words)
    assert type(method_of("fedsvd", *words).aggregate) is type(method_of(name).aggregate)
    assert method_of(name).aggregate.name == name  # type: ignore[attr-defined]


def test_what_is_fine_is_not_refused() -> None:
    check("method=geometric_median", "weighting=examples")
    check("method=fedsa_lora", "method.aggregate=coordinate_median")
    check("method=fedsvd", "weighting=examples")
    check("method=trimmed_mean", "runtime=flower", "deployment.min_updates=3")


def test_a_client_alone_has_the_mean_of_one() -> None:
    method = method_of("multi_krum")
    assert isinstance(method.aggregate, MultiKrum) and method.least_updates == 5
    assert method.of_one_client().aggregate is method_of("fedsvd").aggregate
    assert method_of("geometric_median").of_one_client().aggregate == method_of("geometric_median").aggregate
