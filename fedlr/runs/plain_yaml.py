"""YAML that somebody else wrote, as plain values: no tags that make objects, and no references."""

from typing import Any

import yaml

from fedlr.errors.messages import one_line


def plain_yaml(text: str) -> Any:
    """Return the values that a text holds.

    Raises:
        ValueError: it is no such YAML; the text of the error is one line.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{one_line(error):.200}") from error


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Without references (*name), of which ten lines can stand for more values than a memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a reference (*name), which no run writes")
        return super().compose_node(parent, index)
