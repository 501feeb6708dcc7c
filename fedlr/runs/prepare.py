"""From an experiment to the parts that a simulation, a server and a device are made of.

Everything that can be wrong with a configuration, the data or the model is found here, before any work.
"""

from collections.abc import Callable, Iterable
from inspect import signature
from pathlib import Path

from torch import nn

from fedlr.adapters.state import HEAD, Block
from fedlr.config.build import build, build_choice, build_optimizer, checked, naming
from fedlr.config.schema import Experiment, RuntimeSection, TrainerSection
from fedlr.data.memory import free_memory
from fedlr.data.partition import Partition
from fedlr.data.placement import split_train_test
from fedlr.data.store import TableStore
from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from fedlr.methods.client_rules.chain import Chain
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.models.adapter_config import AdapterConfig
from fedlr.models.network import AdaptedModel
from fedlr.models.precision import bfloat16_note, with_bfloat16_base
from fedlr.models.prefix import encode_prefix, without_prefix
from fedlr.models.tuners.blocks import LORA
from fedlr.privacy.accountant import calibrate_noise_multiplier, epsilon
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.tasks.tokenise import TokenisedText
from fedlr.training.cohort import check_elementwise
from fedlr.training.fused import check_fused
from fedlr.training.local import LocalTraining
from fedlr.training.supported import check_supported
from fedlr.training.tuner_supported import check_tuner


def load_examples(experiment: Experiment, *, seed: int) -> tuple[LabelledText, LabelledText]:
    """Return the examples that clients share out, and those the server holds out for evaluation.

    Raises:
        InputError: also where a private run would take its label names from private data.
    """
    section = experiment.data.section()
    data: LabelledText = build(section, "data", seed=seed)
    named = section.get("labels") or section.get("label_groups")
    from_data = "labels" in signature(checked(section, "data", ("seed",))[0]).parameters and not named
    if experiment.privacy.epsilon is not None and not experiment.data.public and from_data:
        raise InputError(
            "Expected data.labels in a private run, got null: the names that are found tell what the data hold; name "
            "them as the file spells them, data.labels=[NAME,NAME], or say data.public=true if the data are no secret"
        )
    with naming("data", "num_test"):
        return split_train_test(data, num_test=experiment.data.num_test, seed=seed)


def placement(experiment: Experiment, partition: Partition, *, num_shared: int) -> tuple[str, ...]:
    """Say what, besides a row itself, decides where it lies; a run with any reason is not for release.

    Args:
        experiment: says how rows are held out.
        partition: of the others over clients.
        num_shared: texts that two or more clients hold.
    """
    found = [partition.depends_on] if partition.depends_on else []
    if experiment.data.num_test >= 1:
        found.append("all rows, as data.num_test is a number of them: set a share below 1, such as 0.2")
    if num_shared:
        found.append("its label or group alone, not its text: clients share texts; keep one row of each")
    return tuple(found)


def check_trainable(
    model: AdaptedModel, roles: Iterable[str], trainer: TrainerSection, adapter: AdapterConfig, *, first: Block
) -> None:
    """Refuse a model of which the engine cannot train these roles, or the block of the first round.

    Raises:
        InputError: which names the layer and the setting to change.
    """
    block = frozenset(roles) | (frozenset({HEAD}) if adapter.train_head else frozenset())
    mode = trainer.grad_sample_mode
    if adapter.system != LORA:
        check_tuner(model, block, first=first, grad_sample_mode=mode)
        return
    check_supported(model, block, grad_sample_mode=mode)
    if trainer.engine == "fused":
        check_fused(model, block)


def working_model(
    runtime: RuntimeSection, model: AdaptedModel, tables: list[TokenisedText], *, say: Callable[[str], None]
) -> tuple[nn.Module, list[TokenisedText]]:
    """Return what trains and is evaluated, and the texts as it reads them: past its frozen layers if that is cached."""
    whole, working = whole_and_working(runtime, model)
    if not runtime.cache_prefix:
        return working, tables
    store = state_store(runtime, say=say)
    found = "" if store.folder is None else f", or come from {store.folder}"
    say(f"{sum(map(len, tables)):,} texts pass the frozen layers once{found}")
    return working, [encode_prefix(whole, t, num_threads=runtime.num_workers, store=store) for t in tables]


def whole_and_working(runtime: RuntimeSection, model: AdaptedModel) -> tuple[nn.Module, nn.Module]:
    """Return the model as it computes, and what of it trains: the same, or the part above its cached prefix."""
    model.to(runtime.device)
    whole: nn.Module = with_bfloat16_base(model) if runtime.base_dtype == "bfloat16" else model
    return whole, without_prefix(whole) if runtime.cache_prefix else whole


def state_store(runtime: RuntimeSection, *, say: Callable[[str], None]) -> TableStore:
    """Return where the states of texts past the frozen layers stay."""
    # Which of the places it is changes no bit.
    memory = free_memory() if runtime.memory_gb is None else int(runtime.memory_gb * 1e9)
    folder = None if runtime.cache_dir is None else Path(runtime.cache_dir).expanduser()
    return TableStore(folder, max_bytes=memory // 2 or None, say=say)


def local_training(trainer: TrainerSection, rule: ClientRule) -> LocalTraining:
    """Return what each client does in a round; `rule` is the method's."""
    optimizer = build_optimizer(trainer)
    if trainer.engine == "fused":
        check_elementwise(optimizer)
    if trainer.after_noise is not None:
        after = build_choice(trainer.after_noise.section(), "trainer.after_noise")
        if not isinstance(after, ClientRule):
            raise InputError(f"Expected trainer.after_noise to make a ClientRule, got {type(after).__name__}")
        if after.remembers:
            raise InputError(
                f"Expected trainer.after_noise to remember nothing, got {type(after).__name__}; set method=scaffold"
            )
        rule = Chain((after, rule)) if rule.changes else after
    return LocalTraining(
        num_steps=trainer.num_steps,
        optimizer=optimizer,
        token_budget=trainer.token_budget,
        divisor=trainer.divisor,
        sampler=PoissonSampler(trainer.sample_rate),
        rule=rule,
    )


def private_mechanism(experiment: Experiment) -> tuple[PrivacyBudget | None, Mechanism | None]:
    """Return the budget and the mechanism whose noise lasts for every participation a client may have."""
    privacy, trainer = experiment.privacy, experiment.trainer
    if privacy.epsilon is None:
        return None, None
    budget = PrivacyBudget(privacy.epsilon, privacy.delta)
    noise_multiplier = privacy.noise_multiplier or calibrate_noise_multiplier(
        budget,
        sample_rate=trainer.sample_rate,
        num_steps=experiment.max_participations * trainer.num_steps,
        accountant=privacy.accountant,
    )
    mechanism = Mechanism(
        noise_multiplier=noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        sample_rate=trainer.sample_rate,
        divisor=trainer.divisor,
    )
    if privacy.noise_multiplier is not None:  # what was calibrated lasts for all rounds
        event = PoissonSampler(mechanism.sample_rate).dp_event(mechanism.noise_multiplier)
        one_round = epsilon([(event, trainer.num_steps)], budget.delta, accountant=privacy.accountant)
        if one_round > budget.epsilon:
            raise InputError(
                "Expected a privacy.noise_multiplier with which one round stays within epsilon "
                f"{budget.epsilon:g}, got {noise_multiplier:g}, which spends {one_round:.3g}; null finds the least "
                "that lasts the whole run"
            )
    return budget, mechanism


def notes(
    experiment: Experiment,
    data: LabelledText,
    held_out: LabelledText,
    tokenised: TokenisedText,
    test: TokenisedText,
    *,
    placed_by: tuple[str, ...],
    num_shared: int,
) -> tuple[str, ...]:
    """Say what the run leaves out of the data it was given, and what would slow it down."""
    found = []
    if experiment.privacy.randomness == "os":
        found += [f"not for release: a row's place depends on {reason}" for reason in placed_by]
    if num_shared:
        found.append(f"{num_shared} texts are at two or more clients, in rows of different labels or groups")
    if len(held_out) < experiment.data.num_test:
        found.append(
            f"{len(held_out)} rows are held out, fewer than data.num_test={experiment.data.num_test}: equal texts stay "
            "together"
        )
    if data.num_dropped:
        found.append(f"{data.num_dropped} bad rows of {data.source} were left out (data.on_bad_row=drop)")
    if cut := tokenised.num_truncated + test.num_truncated:
        total = len(data) + len(held_out)
        found.append(f"{cut} of {total} texts were cut to {experiment.data.max_length} tokens (data.max_length)")
    if experiment.runtime.base_dtype == "bfloat16" and experiment.privacy.epsilon is not None:
        found.append(
            "over a bfloat16 base one example can change how others round, by hundredths of the clip bound; epsilon "
            "does not count that (docs/privacy.md, the last bits)"
        )
    on_cpu = experiment.runtime.device == "cpu"
    if on_cpu and experiment.runtime.base_dtype == "bfloat16" and (slow := bfloat16_note()):
        found.append(slow)
    return tuple(found)
