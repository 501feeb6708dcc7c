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
    for what, why in (
        (e.adapter.has_client_ranks, "whose clients have ranks of their own (adapter.client_ranks)"),
        (method.prunes, "whose clients cut their own ranks"),
        (rule.remembers, "whose server and clients must remember the same exact numbers"),
    ):
        if what:
            raise InputError(f"Expected codec=none for method={method.name}, {why}, got {name}")
    return codec
