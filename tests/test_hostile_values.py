"""Every key of a configuration, with every kind of value that nobody means: one line, at once, and nothing is written.

The table is made: the keys are those of the composed experiment, the values one of each kind of nonsense, so a new key
is tried as soon as it is there. More than a thousand configurations in seconds, as none is parsed by Hydra; what its
parser must survive is a table of its own. Mutants: a key without an upper bound; numbers that float32 has not;
a pattern with a repeated group.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedlr.config.build import check_sections
from fedlr.config.schema import check_experiment, compose_experiment, known_keys
from fedlr.errors import InputError, in_range
from fedlr.errors.limits import MOST_DEPTH, check_limits, pattern_problem
from fedlr.runs.commands import USAGE_ERROR, command
from fedlr.simulations import cli
from fedlr.simulations.federation import assemble
from fedlr.training.threads import torch_threads

SMALL = (
    "experiment=tiny",
    "data.num_examples=60",
    "data.num_test=20",
    "num_clients=4",
    "cohort_size=2",
    "num_rounds=2",
)
NESTED: list[Any] = []
for _ in range(200):
    NESTED = [NESTED]
# One of each kind. Those that some key means (null, true, 0, 1000000) must be taken or refused, and never crash.
VALUES: Mapping[str, Any] = {
    "a word": "abc",
    "negative": -1,
    "negative share": -0.5,
    "zero": 0,
    "true": True,
    "null": None,
    "a million": 1_000_000,
    "2**53 - 1": 2**53 - 1,
    "31 digits": int("9" * 31),
    "5,000 digits": 10**5000,
    "1e29": 1e29,
    "1e300": 1e300,
    "1e-29": 1e-29,
    "1e-300": 1e-300,
    "nan": float("nan"),
    "inf": float("inf"),
    "empty": "",
    "5,000 characters": "x" * 5000,
    "nested 5": [[[[[1]]]]],
    "nested 200": NESTED,
    "a section": {"a": {"b": 1}},
    "nul": "a\0b",
    "half a character": "a\ud800",
    "two lines": "a\nb",
    "other direction": "a\u202eb",
}
NEVER = {"31 digits", "5,000 digits", "1e300", "1e-300", "nan", "inf", "5,000 characters", "nested 200", "nul"}
NEVER |= {"half a character", "two lines", "other direction", "a section", "nested 5", "negative", "negative share"}


@cache
def base() -> dict[str, Any]:
    return compose_experiment(SMALL).resolved()


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of values that are no sections."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix


def changed(key: str, value: Any) -> dict[str, Any]:
    """Return the configuration with one other value."""

    def put(node: Any, parts: list[str]) -> Any:
        return {**(node or {}), parts[0]: put((node or {}).get(parts[0]), parts[1:])} if parts else value

    return put(base(), key.split("."))


def told(key: str, value: Any) -> str | None:
    """Return the line that refuses a value, None if all that needs neither data nor model takes it."""
    try:
        check_sections(check_experiment(changed(key, value)))
    except InputError as error:
        return str(error)
    return None


def refusal(tree: Mapping[str, Any]) -> str | None:
    """Return the line that refuses a configuration before it trains, None if it could train."""
    try:
        with torch_threads(1):
            assemble(check_experiment(tree), seed=0)
    except InputError as error:
        return str(error)
    return None


BY_THEIR_FUNCTIONS = ("data.num_examples", "model.", "partition.")  # whose ranges these check when they are called
KEYS = sorted({*leaves(base()), "adapter.public.path", "adapter.public.learning_rate"})


@pytest.mark.parametrize("key", KEYS)
def test_every_key_refuses_what_nobody_means_in_one_line(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in VALUES.items():
        line = told(key, value)
        if line is None and name in NEVER and key.startswith(BY_THEIR_FUNCTIONS):
            line = refusal(changed(key, value))
        if key == "adapter.sizes" and isinstance(value, dict):
            continue  # it is a section, whose keys are another library's
        assert line is not None or name not in NEVER, f"{key} took {name}"
        assert line is None or (0 < len(line) < 800 and line.isprintable()), (key, name, line)
    assert capsys.readouterr() == ("", "")


def test_the_table_has_every_key_and_more_than_200_configurations() -> None:
    assert len(KEYS) * len(VALUES) > 1000
    schema = {key for key in known_keys(base()) if not isinstance(told(key, {}), type(None))}
    assert {"privacy.epsilon", "deployment.poll_s", "trainer.optimizer.lr", "method.name"} <= schema | set(KEYS)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in KEYS if not key.endswith("_target_")])
def test_what_is_taken_is_assembled_or_refused(key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in VALUES.items():
        line = told(key, value) or refusal(changed(key, value)) or ""
        assert line.isprintable() and len(line) < 800, (key, name)
    assert not list(tmp_path.iterdir())


WORDS = {
    "privacy.epsilon=1e300": "1e+300",
    "privacy.epsilon=1e-300": "1e-300",
    "privacy.epsilon=1e20": "between 0.0001 and 1e+06",
    "model.hidden_size=1000000000": "model.hidden_size in [1, 4,096]",
    "model.num_layers=100000": "model.num_layers in [1, 256]",
    "data.num_examples=100000000000": "data.num_examples in [1, 200,000]",
    "tracking.output_dir=" + "a" * 5000: "at most 2,000 characters, got 5,000",
    "tracking.output_dir=" + "a" * 500: "File name too long",
    "name=" + "a" * 300: "at most 100 letters",
    "adapter.layers=" + "[" * 200 + "]" * 200: "16 brackets inside each other for 'adapter.layers', got 200",
    "adapter.layers=" + "[" * 30_000: "at most 20,000 characters",
    "num_rounds=" + "1" * 31: "2**53, got one of 31 digits",
    "num_rounds=" + "1" * 5000: "got one of 5,000 digits",
    "num_rounds=10000000": "num_rounds",
    'adapter.target_modules="(.*)*(.*)*(.*)*x"': "without a repeated group",
    "tracking.output_dir='a\0b'": "NUL",
    "trainer.optimizer.lr=1e38": "trainer.optimizer.lr",
    "trainer.divisor=1e-300": "trainer.divisor",
    "runtime.num_workers=1000000": "runtime.num_workers",
    "runtime.device=cuda:99999999999999999999": "runtime.device",
    "method.block_schedule.roles=[[[lora_A]]]": "method.block_schedule.roles",
    "adapter.sizes={r:1e9}": "adapter.sizes",
}


@pytest.mark.parametrize(("word", "fragment"), WORDS.items(), ids=[word[:40] for word in WORDS])
def test_words_that_a_parser_or_a_library_would_not_survive(
    word: str, fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.simulate([*SMALL, word]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and fragment in line and len(line) < 800, line
    assert not list(tmp_path.iterdir())


def test_what_ranges_miss_is_still_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (MemoryError(), RecursionError("too deep"), OverflowError(34, "Numerical result out of range")):

        def fails(arguments: list[str], error: BaseException = error) -> None:
            """Fail."""
            raise error

        fails.__module__ = "fedlr.simulations.cli"
        assert command(fails)([]) == USAGE_ERROR
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and type(error).__name__ in line and "lower what is large" in line


PATTERNS = [
    r".*\.(query|value)",
    r".*encoder\.layer\.[45]\..*(query|value)",
    r"bert\.encoder\.layer\.\d+\.attention\.self\.query",
    r".*\.(q|k|v|o|gate|up|down)_proj",
    "all-linear",
    r"(?:.*)layer\.[^.]+\.value",
]
ENDLESS = [
    "(.*)*x",
    "(a+)+$",
    "(a|a)*b",
    "([a-z]+)*x",
    "(.|.){50}x",
    ".*.*.*.*x",
    "a?" * 30 + "x",
    "(a|a)" * 40,
    "a" * 600,
]
ENDLESS += [r"(?=(.*)x).*", r"(.)\1", "((a{1,50}){1,50}){1,50}b", r"(?:.*)*x"]


def test_patterns_that_match_for_ever_are_refused_and_useful_ones_are_not() -> None:
    assert [pattern for pattern in PATTERNS if pattern_problem(pattern)] == []
    assert [pattern for pattern in ENDLESS if not pattern_problem(pattern)] == []


def test_the_worst_pattern_that_is_let_through_takes_few_steps() -> None:
    """It comes back: a pattern that is refused takes minutes, or years, on the same name."""
    name = "base_model.model.roberta.encoder.layer.11.attention.self.query." * 2
    for pattern in (".*.*.*(x|y)", "(a|a)" * 8 + ".*.*x", r"[^x]*[^x]*[^x]*x"):
        assert pattern_problem(pattern) is None
        assert re.fullmatch(pattern, name) is None


def test_a_range_is_one_line() -> None:
    in_range(0, 1, share=0.0, other=1.0)
    for value in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"Expected share in \[0, 1\], got"):
            in_range(0, 1, share=value)


def test_limits_do_not_recurse() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(InputError, match=f"at most {MOST_DEPTH} levels"):
        check_limits(deep)
