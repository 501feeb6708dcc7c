"""What a start needs of the rest of a configuration (`fedlr.models.starts.starts`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.config.rule import rule
from fedlr.models.adapter_config import FROM_LABELS, FROM_PUBLIC, INFORMED, MADE_BY_THE_SERVER, WITH_SIDE

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment

START = "adapter.init_lora_weights"


@rule(START, "adapter.start_from")
def one_start(e: "Experiment") -> Iterator[str]:
    """A run that starts from an earlier adapter has no start of its own."""
    start = e.adapter.init_lora_weights
    if e.adapter.start_from is not None and start in (*MADE_BY_THE_SERVER, *INFORMED):
        yield f"Expected {START}=true with adapter.start_from, got {start}: the folder has the start"


@rule("privacy.epsilon", "privacy.client_epsilon", "adapter.start_from")
def start_and_two_units(e: "Experiment") -> Iterator[str]:
    """What an earlier adapter adds to epsilon is counted for one unit of privacy, not for two at once."""
    if e.adapter.start_from is not None and e.privacy.epsilon is not None and e.privacy.client_epsilon is not None:
        yield (
            "Expected a budget of one unit with adapter.start_from, got privacy.epsilon and privacy.client_epsilon: "
            "what a start adds to two epsilons is not counted; set one of them to null"
        )


@rule("privacy.randomness", "adapter.start_from", "runtime")
def start_and_seeded_noise(e: "Experiment") -> Iterator[str]:
    """Devices that go on from an earlier run must not draw its noise again."""
    if e.adapter.start_from is not None and e.runtime.kind != "local" and e.privacy.randomness == "seeded":
        yield (
            f"Expected privacy.randomness=os seed=null with adapter.start_from and runtime={e.runtime.kind}, "
            "got 'seeded': devices would draw the noise of the earlier run again"
        )


@rule("adapter.system", "adapter.start_from")
def start_of_lora(e: "Experiment") -> Iterator[str]:
    """Only LoRA is read from the folder of an earlier run."""
    if e.adapter.start_from is not None and e.adapter.system != "lora":
        yield f"Expected adapter=lora with adapter.start_from, got adapter.system={e.adapter.system}"


@rule("adapter.public", START)
def start_and_public_texts(e: "Experiment") -> Iterator[str]:
    """A start that reads public texts needs a file of them, with labels if it reads gradients; others read none.

    The file is not the one with the clients' rows.
    """
    start, public = e.adapter.init_lora_weights, e.adapter.public
    named = f"{START}={str(start).lower()}"
    if start not in FROM_PUBLIC:
        if public is not None:
            yield f"Expected adapter.public=null for {named}, which reads no texts, got {public.path!r}"
        return
    if public is None:
        yield f"Expected adapter.public={{path: FILE}} for {named}, which reads public texts, got null"
        return
    if start in FROM_LABELS and public.labels is None:
        yield (
            f"Expected adapter.public.labels for {named}, which reads gradients, got null; name them in the order "
            "of data.labels"
        )
    if _is_file_of(e, public.path):
        yield (
            f"Expected adapter.public.path to be another table than data.path, got {public.path!r}: a start reads "
            "its rows without noise, outside every ledger"
        )


@rule("adapter.system", START)
def silver_bullet(e: "Experiment") -> Iterator[str]:
    """LoRA-SB is a start of LoRA-XS."""
    if e.adapter.init_lora_weights == "lora_sb" and e.adapter.system != "lora_xs":
        yield f"Expected adapter=lora_xs for {START}=lora_sb, got adapter.system={e.adapter.system}"


@rule("runtime.base_dtype", START)
def start_out_of_the_base(e: "Experiment") -> Iterator[str]:
    """A start that is taken out of the base weights is taken out in float32, or the two would not add up again."""
    start, dtype = e.adapter.init_lora_weights, e.runtime.base_dtype
    if start in WITH_SIDE and dtype != "float32":
        yield (
            f"Expected runtime.base_dtype=float32 for {START}={str(start).lower()}, got {dtype}: what is taken out of "
            "the base would not be what the adapter has"
        )


@rule("adapter.client_ranks", "adapter.client_memory_mb", START)
def start_of_one_rank(e: "Experiment") -> Iterator[str]:
    """A start that is taken out of the base weights has one rank for all clients."""
    start = e.adapter.init_lora_weights
    for key in ("client_ranks", "client_memory_mb"):
        if start in WITH_SIDE and (given := getattr(e.adapter, key)) is not None:
            yield (
                f"Expected adapter.{key}=null for {START}={str(start).lower()}, got {given}: a smaller rank lacks a "
                "part of what was taken out of the base; adapter.init_lora_weights=principal takes out nothing"
            )


def _is_file_of(experiment: "Experiment", path: str) -> bool:
    own = (experiment.data.model_extra or {}).get("path")
    return isinstance(own, str) and Path(own).expanduser().resolve() == Path(path).expanduser().resolve()
