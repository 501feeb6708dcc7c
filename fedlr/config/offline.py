"""Whether model and data hubs may be asked for anything."""

import os
import sys

VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
LOADED = ("huggingface_hub.constants", "datasets.config")


def go_offline(offline: bool) -> None:
    """Tell the hub libraries, loaded or not, whether they may use the network."""
    for variable in VARIABLES:
        os.environ[variable] = str(int(offline))
    for name in LOADED:
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = offline  # type: ignore[attr-defined]
