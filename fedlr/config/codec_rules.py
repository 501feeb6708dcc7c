"""Which methods and runs an uplink codec goes with."""

from collections.abc import Iterator

from fedlr.config.build import build_codec
from fedlr.config.choice import Choice
from fedlr.config.rule import rule


@rule("codec", "privacy")
def codec_of_noise(c: Choice) -> Iterator[str]:
    """A codec that keeps the largest numbers is for runs without noise, where the largest are what was learnt."""
    e, codec = c.experiment, build_codec(c.experiment.codec)
    if codec is not None and not codec.is_for_private() and e.privacy.is_private:
        yield (
            f"Expected codec=int8, bf16 or projection with privacy, got {e.codec.target}: under noise the largest "
            "numbers are mostly noise, so that it would keep noise and cut what was learned; set privacy=none for it"
        )


@rule("codec", "method.client")
def codec_and_memory(c: Choice) -> Iterator[str]:
    """Clients and a server that remember the same numbers send them as they are."""
    if build_codec(c.experiment.codec) is not None and c.rule.remembers:
        yield (
            f"Expected codec=none for method={c.method.name}, whose server and clients must remember the same exact "
            f"numbers, got {c.experiment.codec.target}"
        )
