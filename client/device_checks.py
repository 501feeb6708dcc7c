"""What the doctor looks at on the device itself. Each function says what it found, or raises what to change."""

import os
import shutil
import stat
from pathlib import Path

import torch

from client.device import OWN
from client.policy import check_terms
from client.settings import Settings
from client.trainee import check_model
from fedlr.config.build import build
from fedlr.data.memory import free_memory
from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from fedlr.flower.terms import Terms
from fedlr.models.network import BaseModel, resolve
from fedlr.privacy.charges import Charge, read_ledger
from fedlr.privacy.mechanism import check_delta

GB = 1e9
BYTES = 4  # of a float32
REPLIES_KEPT = 5  # adapters that one experiment leaves on the disk, at most


def files_text(settings: Settings, path: Path) -> str:
    """Look at who may change the settings and the ledger; `load_settings` has looked at key and state folder."""
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o022:
        raise InputError(f"others may change {path} (mode {mode:04o}), and with it the policy; chmod 644 {path}")
    ledger = settings.ledger_path
    if ledger.exists() and (mode := stat.S_IMODE(ledger.stat().st_mode)) & 0o077:
        raise InputError(f"others may open {ledger} (mode {mode:04o}); chmod 600 {ledger}")
    return "settings, key, state folder and ledger are this user's"


def memory_text(settings: Settings) -> str:
    """Compare what the model needs with what is free."""
    free, total = free_memory(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{free / GB:.1f} of {total / GB:.1f} GB free"
    if (weights := weight_bytes(settings)) is None:
        return text
    needed = 2 * weights  # once as they are read, once as float32; what a step needs comes on top
    if needed > free:
        raise InputError(
            f"{text}, and loading the model takes {needed / GB:.1f} GB; end other programs, or take another"
        )
    return f"{text}; loading the model takes {needed / GB:.1f} GB"


def weight_bytes(settings: Settings) -> int | None:
    """Return the size of the model's files; None where it is not read from a folder."""
    name = settings.model.section().get("name_or_path")
    folder = Path(resolve(name)) if isinstance(name, str) else None
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")] if folder and folder.is_dir() else []
    return sum(sizes) or None


def device_text(settings: Settings) -> str:
    """Look for the processor that the settings name."""
    name, threads = settings.runtime.device, settings.runtime.num_workers
    if name == "cpu":
        num_cpus = len(os.sched_getaffinity(0))
        if threads > num_cpus:
            raise InputError(f"{num_cpus} processors for runtime.num_workers={threads}; set it to {num_cpus} at most")
        return f"cpu, {threads} of {num_cpus} processors"
    if not torch.cuda.is_available():
        raise InputError(
            f"PyTorch {torch.__version__} finds no GPU for runtime.device={name}; set cpu, or its driver up"
        )
    index = torch.device(name).index or 0
    if index >= torch.cuda.device_count():
        raise InputError(f"{torch.cuda.device_count()} GPUs are here, got runtime.device={name}")
    free, total = torch.cuda.mem_get_info(index)
    return f"{torch.cuda.get_device_name(index)}, {free / GB:.1f} of {total / GB:.1f} GB free"


def disk_text(settings: Settings) -> str:
    """Compare what an experiment leaves on the disk with what is free."""
    place = settings.state_dir
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    needed = BYTES * settings.policy.max_trained_values * REPLIES_KEPT
    text = f"{free / GB:.1f} GB free for {settings.state_dir}"
    if needed > free:
        raise InputError(
            f"{text}, and an experiment may leave {needed / GB:.1f} GB; free some, or lower policy.max_trained_values"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{place} is not writable for this user")
    return text


def model_text(settings: Settings) -> str:
    """Load the base model and compare its body's hash with the owner's list."""
    base: BaseModel = build(settings.model.section(), "model", label_names=settings.label_names, seed=0)
    body, size = base.body_sha256, sum(p.numel() for p in base.network.parameters())
    text = f"{base.source}, {size / 1e6:.1f} million parameters, body {body}"
    if body not in settings.policy.allowed_models:
        raise InputError(f"{text} is not in policy.allowed_models; add it if this is the model you mean to train with")
    return text


def data_text(settings: Settings) -> str:
    """Read the data; the number of rows is for this screen only."""
    data: LabelledText = build(settings.data.section(), "data", seed=0)
    if data.label_names != settings.label_names:
        raise InputError(f"{data.source} has the labels {list(data.label_names)}, got {list(settings.label_names)}")
    if settings.budget() is not None:
        check_delta(settings.privacy.delta, len(data))
    dropped = f" ({data.num_dropped} bad rows left out)" if data.num_dropped else ""
    return f"{len(data)} rows{dropped} with the labels {', '.join(data.label_names)}; nobody else is told how many"


def ledger_text(settings: Settings, terms: Terms | None) -> str:
    """Verify the ledger, and say what is left of the budget."""
    ledger = settings.open_ledger()
    if ledger is None:
        return "none: privacy.epsilon=null, so what leaves this device may reveal its data"
    spent, most = ledger.spent(OWN), settings.privacy.epsilon
    text = f"epsilon {spent:.4g} of {most:g} spent in {ledger.participations(OWN)} rounds, head {ledger.head()}"
    if terms is None:
        return text
    rounds = rounds_left(settings, terms)
    if not rounds:
        raise InputError(f"{text}; the rest does not pay for a round of {terms.name}")
    return f"{text}; the rest pays for {rounds} of {terms.num_rounds} rounds of {terms.name}"


def rounds_left(settings: Settings, terms: Terms) -> int:
    """Return how many rounds of an experiment the rest of the budget pays for, at most all of them."""
    mechanism = terms.private_steps()
    if mechanism is None:
        return 0
    header, charges, _ = read_ledger(settings.ledger_path)

    def is_paid(num_rounds: int) -> bool:
        more = Charge(mechanism, num_rounds * terms.trainer.num_steps, announced_steps=terms.announced_steps())
        return charges.epsilon_with(OWN, header, more) <= header.epsilon

    least, most = 0, min(terms.num_rounds, settings.policy.max_rounds)
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if is_paid(middle) else (least, middle - 1)
    return least


def terms_text(settings: Settings, terms: Terms, load: bool) -> str:
    """Check terms against the policy, and the base model against theirs unless it must not be loaded."""
    check_terms(terms, settings)
    text = f"{terms.name} is within the policy: {terms.num_rounds} rounds of {terms.trainer.num_steps} steps"
    if not load:
        return text
    base: BaseModel = build(settings.model.section(), "model", label_names=settings.label_names, seed=terms.seed)
    check_model(base, settings, terms)
    return f"{text}, with the base model that is here"
