"""What the doctor looks at on the device itself. Each function says what it found, or raises what to change."""

import os
import resource
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from fedlr.adapters.state import HEAD, SHIPPED, roles_of
from fedlr.client.device import OWN
from fedlr.client.policy import check_terms
from fedlr.client.settings import Settings
from fedlr.client.trainee import Trainee, own_model
from fedlr.config.build import build
from fedlr.data.images import LabelledImages
from fedlr.data.memory import free_memory
from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.flower.terms import Terms
from fedlr.models.network import BaseModel, resolve
from fedlr.models.peft_state import read_adapter
from fedlr.privacy.charges import Charge, read_ledger
from fedlr.privacy.ledger import Refusal
from fedlr.privacy.mechanism import Mechanism, check_delta
from fedlr.rounds.round import RoundRequest
from fedlr.training.threads import torch_threads

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
    needed = weights  # what a step needs comes on top: `round_text`
    if needed > free:
        raise InputError(
            f"{text}, and loading the model takes {needed / GB:.1f} GB; end other programs, or take another"
        )
    return f"{text}; loading the model takes {needed / GB:.1f} GB"


def weight_bytes(settings: Settings) -> int | None:
    """Return the bytes of the model's files and of its weights as float32; None where it is not read from a folder."""
    name = settings.model.section().get("name_or_path")
    folder = Path(resolve(name)) if isinstance(name, str) else None
    files = sorted(folder.glob("*.safetensors")) if folder and folder.is_dir() else []
    return sum(file.stat().st_size + BYTES * num_weights(file) for file in files) or None


def num_weights(path: Path) -> int:
    """Return how many numbers a file of tensors holds, by its header."""
    with safe_open(path, framework="pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # no mapping


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
    base: BaseModel = build(settings.model.section(), "model", label_names=settings.output_names, seed=0)
    body, size = base.body_sha256, sum(p.numel() for p in base.network.parameters())
    text = f"{base.source}, {size / 1e6:.1f} million parameters, body {body}"
    if body not in settings.policy.allowed_models:
        raise InputError(f"{text} is not in policy.allowed_models; add it if this is the model you mean to train with")
    return text


def data_text(settings: Settings) -> str:
    """Read the data; the number of rows is for this screen only."""
    data: Table = build(settings.data.section(), "data", seed=0)
    if data.label_names != settings.label_names:
        raise InputError(f"{data.source} has the labels {list(data.label_names)}, got {list(settings.label_names)}")
    if settings.budget() is not None:
        check_delta(settings.privacy.delta, len(data))
    dropped = f" ({data.num_dropped} bad rows left out)" if data.num_dropped else ""
    what = f" with the labels {', '.join(data.label_names)}" if data.label_names else ""
    if isinstance(data, LabelledImages):
        height, width = data.image_size
        what += f", pictures of {height} x {width} pixels, {data.pixels.nbytes / GB:.1f} GB once they are read"
    return f"{len(data)} rows{dropped}{what}; nobody else is told how many"


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
    own_model(settings, terms)
    return f"{text}, task {terms.task_name}, with the base model that is here"


def round_text(settings: Settings, terms: Terms) -> str:
    """Try a round of the terms on constant rows of the largest size, and read the device's own rows as it would.

    Nothing is charged, and no row of the device's passes the model. The number of rows is for this screen only.
    """
    trainee = Trainee.prepare(settings, terms, say=lambda line: None)
    text = f"{len(trainee.share)} rows are read"
    if trainee.share.table.num_truncated:
        text += f", {trainee.share.table.num_truncated} of them cut to {terms.max_length} tokens"
    if terms.mechanism is None:  # then a round is not tried before it begins
        return text
    adapter = read_adapter(trainee.model)
    frozen = {SHIPPED} if terms.adapter.train_head else {SHIPPED, HEAD}
    block = frozenset({slot.role for slot in adapter.tensors} - frozen)
    with torch_threads(1):
        trainee.check(block)
        pool = trainee.pool(OWN, adapter, NothingToSpend())
        list(pool.train(RoundRequest(0, adapter.select(block), block), [OWN]))
        pool.close()
    return f"{text}; a step of {', '.join(sorted(roles_of(block)))} was tried on constant rows: {peak_memory()}"


def peak_memory() -> str:
    """Say how much memory this process has had at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"this process has taken {peak / GB:.1f} GB at most, and {free_memory() / GB:.1f} GB are free"


class NothingToSpend:
    """Stands for a ledger whose budget is used up: a round is tried on constant rows, and then it is refused."""

    def reserve(
        self,
        round_index: int,
        mechanism: Mechanism,
        num_steps: int,
        client_ids: Sequence[int],
        task: str | None = None,
    ) -> Mapping[int, Refusal | None]:
        """Refuse everybody."""
        return dict.fromkeys(client_ids, Refusal("budget_exhausted", 0.0, 0.0))

    def settle_all(self, round_index: int, steps_taken: Mapping[int, int]) -> None:
        """Do nothing: no step was taken."""
