"""The rules of what goes together: each names keys that exist and a reason, and the page in docs/ is made of them.

Mutants this file kills: a rule that is asked of nobody, a page that was not written again, a check that looks at the
first rule, a rule that names a key which was renamed.
"""

import importlib.util
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import fedlr.config
from fedlr.config.choice import Choice
from fedlr.config.rule import Rule, Rules, rule
from fedlr.config.rules import OF_EVERY_RUN
from fedlr.config.runtime_rules import OF_A_METHOD, OF_THIS_MACHINE
from fedlr.config.schema import Experiment, compose_experiment
from fedlr.errors import InputError
from fedlr.methods.method import Method
from fedlr.server.federation import OF_DEVICES
from fedlr.simulations.audit.audit import OF_AN_AUDIT
from tests.methods_of_files import method_of

ROOT = Path(__file__).parents[1]
LISTS = (OF_EVERY_RUN, OF_A_METHOD, OF_THIS_MACHINE, OF_DEVICES, OF_AN_AUDIT)
ALL: list[Rule[object]] = [one for rules in LISTS for one in rules.rules]  # type: ignore[attr-defined]


def written() -> list[Rule[object]]:
    """Every rule in the folder of the configuration."""
    modules = [importlib.import_module(f"fedlr.config.{m.name}") for m in pkgutil.iter_modules(fedlr.config.__path__)]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Rule)]
    return list({id(one): one for one in found}.values())


def is_key(key: str) -> bool:
    """Whether a configuration has the key, or a section that takes keys of a part."""
    section, _, name = key.partition(".")
    field = Experiment.model_fields.get(section)
    if field is None or not name:
        return field is not None
    kind = field.annotation
    if section == "method":
        return name in Method.__dataclass_fields__
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return False
    return name in kind.model_fields or kind.model_config.get("extra") == "allow"


def test_every_rule_is_asked() -> None:
    listed = {id(one) for one in ALL}
    assert [one.why for one in written() if id(one) not in listed] == [] and len(listed) == len(ALL)


def test_every_rule_names_keys_that_exist_and_says_why() -> None:
    assert [key for one in ALL for key in one.keys if not is_key(key)] == []
    assert not is_key("privacy.epsylon") and not is_key("cohorts") and not is_key("method.agregate")
    assert all(one.keys and one.why.endswith(".") and "|" not in one.why for one in ALL)


def test_the_page_is_made_of_the_rules() -> None:
    spec = importlib.util.spec_from_file_location("make_rules", ROOT / "docs" / "make_rules.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    wanted = script.text()
    assert script.PAGE.read_text(encoding="utf-8") == wanted, "run python docs/make_rules.py"
    assert wanted.count("\n| `") == len(ALL)


def test_the_first_rule_that_does_not_hold_is_named_and_all_can_be_asked() -> None:
    @rule("a")
    def small(n: int) -> Iterator[str]:
        """It is small."""
        if n > 1:
            yield "Expected a <= 1"

    @rule("a")
    def even(n: int) -> Iterator[str]:
        """It is even."""
        if n % 2:
            yield "Expected an even a"

    rules = Rules("Numbers", "Asked here.", (small, even))
    rules.check(0)
    for n, message in ((2, "<= 1"), (1, "even"), (3, "<= 1")):
        with pytest.raises(InputError, match=message):
            rules.check(n)
    assert rules.refused(3) == ["Expected a <= 1", "Expected an even a"]


def test_a_configuration_that_composes_is_refused_by_no_rule() -> None:
    experiment = compose_experiment(["experiment=tiny"])
    method = method_of("fedsvd", "experiment=tiny")
    assert OF_EVERY_RUN.refused(experiment) == OF_DEVICES.refused(experiment) == []
    for rules in (OF_A_METHOD, OF_THIS_MACHINE):
        assert rules.refused(Choice(experiment, method, method.client)) == []
