"""Which methods and runs an uplink codec goes with."""

from fedlr.config.build import build_codec
from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.methods.codecs.codec import Codec
from fedlr.methods.method import Method


def check_codec(experiment: Experiment, method: Method, rule: ClientRule) -> Codec | None:
    """Return the codec of an experiment, None where there is none, or refuse what does not go together.

    Raises:
        InputError: which names the key to change.
    """
    e = experiment
    codec = build_codec(e.codec)
    if codec is None:
        return None
    name = e.codec.target
    if not codec.is_for_private() and e.privacy.is_private:
        raise InputError(
            f"Expected codec=int8, bf16 or projection with privacy, got {name}: under noise the largest numbers are "
            "mostly noise, so that it would keep noise and cut what was learned; set privacy=none for it"
        )
    if rule.remembers:
        raise InputError(
            f"Expected codec=none for method={method.name}, whose server and clients must remember the same exact "
            f"numbers, got {name}"
        )
    return codec
