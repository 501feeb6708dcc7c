"""Write docs/rules.md, the rules of what goes together, from the code that asks them: python docs/make_rules.py"""

from pathlib import Path

from fedlr.config.rule import page
from fedlr.config.rules import OF_EVERY_RUN
from fedlr.config.runtime_rules import OF_A_METHOD, OF_THIS_MACHINE

PAGE = Path(__file__).parent / "rules.md"
INTRODUCTION = """# What goes together

Values that are right one by one can be wrong together. Every such rule is checked before any work is done or budget
spent; the first that does not hold is one line that names the key, its value and what to set. This page is written by
`python docs/make_rules.py` from the rules in the code (`fedlr/config/`, where a rule is a function that yields that
line). The first key of a row is the one to change. What a part refuses by itself, such as a number out of its range or
an optimizer that a method cannot use, is not listed here.

"""


def text() -> str:
    """Return the page."""
    from fedlr.server.federation import OF_DEVICES
    from fedlr.simulations.audit.audit import OF_AN_AUDIT

    return INTRODUCTION + page([OF_EVERY_RUN, OF_A_METHOD, OF_THIS_MACHINE, OF_DEVICES, OF_AN_AUDIT])


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
