"""A device asks no hub for anything: models and data are what its owner put on it."""

import logging
import os
import sys

VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
LOADED = {"huggingface_hub.constants": "HF_HUB_OFFLINE", "datasets.config": "HF_DATASETS_OFFLINE"}


def go_offline() -> None:
    """Tell the hub libraries, loaded or not, that there is no hub, and to keep their chatter to themselves."""
    for variable in VARIABLES:
        os.environ[variable] = "1"
    for name, constant in LOADED.items():
        if name in sys.modules:
            setattr(sys.modules[name], constant, True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
