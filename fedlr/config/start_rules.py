"""What a start needs of the rest of a configuration (`fedlr.models.starts.starts`), found before any work."""

from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.errors import InputError
from fedlr.models.adapter_config import FROM_LABELS, FROM_PUBLIC, INFORMED, MADE_BY_THE_SERVER, WITH_SIDE

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment


def check_start(experiment: "Experiment") -> None:
    """Refuse a start that nothing can be made from, or that the runtime would round away or cut.

    Raises:
        InputError: which names the key to change.
    """
    adapter = experiment.adapter
    start, public = f"adapter.init_lora_weights={str(adapter.init_lora_weights).lower()}", adapter.public
    if adapter.start_from is not None:
        check_start_from(experiment)
    if adapter.init_lora_weights in FROM_PUBLIC:
        if public is None:
            raise InputError(f"Expected adapter.public={{path: FILE}} for {start}, which reads public texts, got null")
        if adapter.init_lora_weights in FROM_LABELS and public.labels is None:
            raise InputError(
                f"Expected adapter.public.labels for {start}, which reads gradients, got null; name them in the order "
                "of data.labels"
            )
        if _is_file_of(experiment, public.path):
            raise InputError(
                f"Expected adapter.public.path to be another table than data.path, got {public.path!r}: a start reads "
                "its rows without noise, outside every ledger"
            )
    elif public is not None:
        raise InputError(f"Expected adapter.public=null for {start}, which reads no texts, got {public.path!r}")
    if adapter.init_lora_weights == "lora_sb" and adapter.system != "lora_xs":
        raise InputError(f"Expected adapter=lora_xs for {start}, got adapter.system={adapter.system}")
    if adapter.init_lora_weights in WITH_SIDE:
        _check_side(experiment, start)


def check_start_from(experiment: "Experiment") -> None:
    """Refuse two starts at once, and one of another system than LoRA.

    Raises:
        InputError: which names the key to change.
    """
    adapter = experiment.adapter
    if adapter.init_lora_weights in (*MADE_BY_THE_SERVER, *INFORMED):
        raise InputError(
            f"Expected adapter.init_lora_weights=true with adapter.start_from, got {adapter.init_lora_weights}: the "
            "folder has the start"
        )
    if experiment.privacy.epsilon is not None and experiment.privacy.client_epsilon is not None:
        raise InputError(
            "Expected a budget of one unit with adapter.start_from, got privacy.epsilon and privacy.client_epsilon: "
            "what a start adds to two epsilons is not counted; set one of them to null"
        )
    if experiment.runtime.kind != "local" and experiment.privacy.randomness == "seeded":
        raise InputError(
            f"Expected privacy.randomness=os seed=null with adapter.start_from and runtime={experiment.runtime.kind}, "
            "got 'seeded': devices would draw the noise of the earlier run again"
        )
    if adapter.system != "lora":
        raise InputError(f"Expected adapter=lora with adapter.start_from, got adapter.system={adapter.system}")


def _check_side(experiment: "Experiment", start: str) -> None:
    """A side product takes back what the start gives: whole, and in float32."""
    if (dtype := experiment.runtime.base_dtype) != "float32":
        raise InputError(
            f"Expected runtime.base_dtype=float32 for {start}, got {dtype}: what is taken out of the base would not be "
            "what the adapter has"
        )
    for key in ("client_ranks", "client_memory_mb"):
        if (given := getattr(experiment.adapter, key)) is not None:
            raise InputError(
                f"Expected adapter.{key}=null for {start}, got {given}: a smaller rank lacks a part of what was taken "
                "out of the base; adapter.init_lora_weights=principal takes out nothing"
            )


def _is_file_of(experiment: "Experiment", path: str) -> bool:
    own = (experiment.data.model_extra or {}).get("path")
    return isinstance(own, str) and Path(own).expanduser().resolve() == Path(path).expanduser().resolve()
