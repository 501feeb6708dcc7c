"""From an experiment to the parts that a simulation, a server and a device are made of.

Everything that can be wrong with a configuration, the data or the model is found here, before any work.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import nn

from fedlr.adapters.state import HEAD, AdapterState, Block, roles_of, with_head
from fedlr.config.auto_rates import noise_multiplier_of, provisional, resolved_rates
from fedlr.config.build import build_choice, build_method, build_optimizer
from fedlr.config.rules import OF_EVERY_RUN
from fedlr.config.schema import Experiment, RuntimeSection, TrainerSection
from fedlr.data.memory import free_memory
from fedlr.data.partition import Partition
from fedlr.data.store import TableStore
from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.methods.client_rules.chain import Chain
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.methods.method import Method
from fedlr.methods.rate_schedule import RateSchedule
from fedlr.models.adapter_config import AdapterConfig
from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.models.peft_state import LAYOUT
from fedlr.models.picture_prefix import encode_picture_features, encode_picture_prefix, without_picture_prefix
from fedlr.models.pooling import PooledClassifier
from fedlr.models.precision import bfloat16_note, with_bfloat16_base
from fedlr.models.prefix import encode_features, encode_prefix, without_encoder, without_prefix
from fedlr.models.products import library_of, use_library
from fedlr.models.token_prefix import encode_token_prefix, reads_tokens_in_order, without_token_prefix
from fedlr.models.tuners.blocks import LORA
from fedlr.models.zero_head import check_head_trains
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.runs.tables import load_examples, num_rows_of
from fedlr.tasks.examples import Examples
from fedlr.tasks.pictures import EncodedImages
from fedlr.tasks.task import Task
from fedlr.tasks.tokenise import TokenisedText
from fedlr.tasks.tokenised_turns import TokenisedTurns
from fedlr.training.cohort import check_elementwise
from fedlr.training.fused import check_fused
from fedlr.training.local import LocalTraining
from fedlr.training.supported import check_supported
from fedlr.training.tuner_supported import check_tuner


def with_clients_of(experiment: Experiment, partition: Partition) -> Experiment:
    """Return the experiment with as many clients as a partition found, where it asked for those that there are.

    Raises:
        InputError: if they cannot fill its rounds.
    """
    if experiment.num_clients:
        return experiment
    found = partition.num_clients
    known = experiment.model_copy(update={"num_clients": found, "cohort_size": experiment.cohort_size or found})
    OF_EVERY_RUN.check(known)
    return known


def placement(experiment: Experiment, partition: Partition, *, num_shared: int) -> tuple[str, ...]:
    """Say what, besides a row itself, decides where it lies; a run with any reason is not for release.

    Args:
        experiment: says how rows are held out.
        partition: of the others over clients.
        num_shared: texts that two or more clients hold.
    """
    found = [partition.depends_on] if partition.depends_on else []
    if (experiment.data.num_test or 0) >= 1:
        found.append("all rows, as data.num_test is a number of them: set a share below 1, such as 0.2")
    if num_shared:
        found.append("its label or group alone, not its text: clients share texts; keep one row of each")
    return tuple(found)


def with_library(experiment: Experiment) -> Experiment:
    """Return the experiment with the name of a library where `runtime.matmul` is auto: the run keeps it.

    Raises:
        InputError: it names a library that this machine lacks.
    """
    runtime = experiment.runtime.model_copy(update={"matmul": library_of(experiment.runtime.matmul)})
    return experiment.model_copy(update={"runtime": runtime})


def with_whole_path(experiment: Experiment) -> Experiment:
    """Return the experiment with the whole path of `privacy.ledger`: a run may go on from another folder."""
    if experiment.privacy.ledger is None:
        return experiment
    privacy = experiment.privacy.model_copy(update={"ledger": str(Path(experiment.privacy.ledger).absolute())})
    return experiment.model_copy(update={"privacy": privacy})


def check_trainable(
    model: AdaptedModel,
    roles: Iterable[str],
    trainer: TrainerSection,
    adapter: AdapterConfig,
    *,
    first: Block,
    task: Task,
) -> None:
    """Refuse a model of which the engine cannot train these roles, or the block of the first round.

    Raises:
        InputError: which names the layer and the setting to change.
    """
    block = with_head(frozenset(roles), adapter.train_head)
    check_head_trains(model, head_trains=HEAD in block)
    mode = trainer.grad_sample_mode
    if adapter.system != LORA:
        check_tuner(model, block, first=first, grad_sample_mode=mode, task=task)
        return
    check_supported(model, block, grad_sample_mode=mode)
    if trainer.engine == "fused":
        check_fused(model, block)


def reads_features(model: AdaptedModel, roles: Iterable[str], start: AdapterState) -> bool:
    """Return whether all that trains reads features that no round changes: then they can be cached, one row per text.

    Args:
        model: the whole model.
        roles: all that any round trains.
        start: what the rounds start from.
    """
    is_pooled = isinstance(model.get_base_model(), PooledClassifier)
    zero = not start.side and not any(layer.lora_B.any() for layer in start.factors().values())
    return is_pooled and set(roles) == {HEAD} and zero and not hasattr(model, LAYOUT)


def working_model(
    runtime: RuntimeSection,
    model: AdaptedModel,
    tables: list[Examples],
    *,
    features: bool = False,
    say: Callable[[str], None],
) -> tuple[nn.Module, list[Examples]]:
    """Return what trains and is evaluated, and the texts as it reads them: past its frozen layers if that is cached.

    With `features` (see `reads_features`) those are all layers.
    """
    whole, working = whole_and_working(runtime, model, features=features)
    if not runtime.cache_prefix:
        return working, tables
    store = state_store(runtime, say=say)
    found = "" if store.folder is None else f", or come from {store.folder}"
    say(f"{sum(map(len, tables)):,} rows pass the frozen layers once{found}")
    return working, [past_frozen(whole, t, features, num_threads=runtime.num_workers, store=store) for t in tables]


def past_frozen(whole: nn.Module, table: Examples, features: bool, *, num_threads: int, store: TableStore) -> Examples:
    """Return examples with what the frozen layers make of them.

    Raises:
        InputError: for examples of a kind that passes no prefix.
    """
    if isinstance(table, EncodedImages):
        encode = encode_picture_features if features else encode_picture_prefix
        return encode(whole, table, num_threads=num_threads, store=store)
    if isinstance(table, TokenisedText):
        run = encode_features if features else encode_prefix
        return run(whole, table, num_threads=num_threads, store=store)
    if isinstance(table, TokenisedTurns):
        return encode_token_prefix(whole, table, num_threads=num_threads, store=store)
    raise InputError("Expected runtime.cache_prefix=false for a task without texts or pictures, got true")


def whole_and_working(
    runtime: RuntimeSection, model: AdaptedModel, *, features: bool = False
) -> tuple[nn.Module, nn.Module]:
    """Return the model as it computes, and what of it trains: the same, or the part above its cached prefix."""
    model.to(runtime.device)
    use_library(model, library_of(runtime.matmul))
    whole: nn.Module = with_bfloat16_base(model) if runtime.base_dtype == "bfloat16" else model
    if not runtime.cache_prefix:
        return whole, whole
    if features:
        return whole, without_encoder(whole)
    if model.main_input_name == "pixel_values":
        return whole, without_picture_prefix(whole)
    return whole, without_token_prefix(whole) if reads_tokens_in_order(model) else without_prefix(whole)


def state_store(runtime: RuntimeSection, *, say: Callable[[str], None]) -> TableStore:
    """Return where the states of texts past the frozen layers stay."""
    # Which of the places it is changes no bit.
    memory = free_memory() if runtime.memory_gb is None else int(runtime.memory_gb * 1e9)
    folder = None if runtime.cache_dir is None else Path(runtime.cache_dir).expanduser()
    return TableStore(folder, max_bytes=memory // 2 or None, say=say)


def local_training(
    trainer: TrainerSection, rule: ClientRule, task: Task | None = None, *, num_rounds: int = 1
) -> LocalTraining:
    """Return what each client does in a round; `rule` is the method's, and the losses are the task's.

    `num_rounds` is the run's, over which the rate follows its schedule.
    """
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
        divisor=trainer.number_divisor(),
        sampler=PoissonSampler(trainer.sample_rate),
        rule=rule,
        rates=RateSchedule(trainer.lr_schedule, trainer.warmup_rounds, num_rounds),
        **({} if task is None else {"loss": task.losses}),
    )


def with_found_rates(experiment: Experiment, *, seed: int) -> Experiment:
    """Return the experiment with the numbers that a run of it will find for what is auto (`fedlr.config.auto_rates`).

    Raises:
        InputError: the data cannot be read, or no noise reaches the budget.
    """
    if provisional(experiment) is experiment:
        return experiment
    num_rows = num_rows_of(experiment, *load_examples(experiment, seed=seed))
    return resolved_rates(experiment, num_rows=num_rows, server_step=build_method(experiment).server_step)


def private_mechanism(
    experiment: Experiment, calibrated: Mechanism | None = None
) -> tuple[PrivacyBudget | None, Mechanism | None]:
    """Return the budget and the mechanism whose noise lasts for every participation a client may have.

    One that another process of the run has `calibrated` is believed: the ledger counts what is spent.
    """
    privacy, trainer = experiment.privacy, experiment.trainer
    if privacy.epsilon is None:
        return None, None
    budget = PrivacyBudget(privacy.epsilon, privacy.delta)
    if calibrated is not None:
        return budget, calibrated
    noise_multiplier = noise_multiplier_of(experiment)
    assert noise_multiplier is not None
    mechanism = Mechanism(
        noise_multiplier=noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        sample_rate=trainer.sample_rate,
        divisor=trainer.number_divisor(),
        release_noise=privacy.release_noise,
    )
    if privacy.noise_multiplier is not None:  # what was calibrated lasts for all rounds
        event = PoissonSampler(mechanism.sample_rate).dp_event(mechanism.noise_multiplier, rows=privacy.rows_of_unit)
        one_round = epsilon([(event, trainer.num_steps)], budget.delta, accountant=privacy.accountant)
        if one_round > budget.epsilon:
            raise InputError(
                "Expected a privacy.noise_multiplier with which one round stays within epsilon "
                f"{budget.epsilon:g}, got {noise_multiplier:g}, which spends {one_round:.3g}; null finds the least "
                "that lasts the whole run"
            )
    return budget, mechanism


def trained_roles(experiment: Experiment, method: Method) -> frozenset[str]:
    """Return all that any round of an experiment trains."""
    return frozenset(roles_of(with_head(frozenset(method.block_schedule.roles), experiment.adapter.train_head)))


def frozen_head_note(experiment: Experiment, base: BaseModel, roles: Iterable[str]) -> str | None:
    """Say that a private run has a random head that never trains; None where that is not so, or all is random."""
    if not experiment.privacy.is_private or HEAD in roles or not base.head_is_drawn or base.made is not None:
        return None
    return (
        "the head is random and never trains, and under privacy such a run can stay at chance: set "
        "adapter.train_head=true, and model.head_std=0 to start it from zero"
    )


def notes(
    experiment: Experiment,
    data: Table,
    held_out: Table,
    encoded: Examples,
    test: Examples,
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
    if experiment.tracking.evaluate_on == "test" and len(held_out) < (experiment.data.num_test or 0):
        found.append(
            f"{len(held_out)} rows are held out, fewer than data.num_test={experiment.data.num_test}: equal texts stay "
            "together"
        )
    for table in (data,) if held_out.source == data.source and experiment.data.test_split is None else (data, held_out):
        if table.num_dropped:
            found.append(f"{table.num_dropped} bad rows of {table.source} were left out (data.on_bad_row=drop)")
    if data.num_held_out:
        found.append(
            f"{data.num_held_out} rows of {data.source} are left out of training, as their texts are in the test table"
        )
    if cut := encoded.num_truncated + test.num_truncated:
        total = len(data) + len(held_out)
        most = experiment.task.section().get("max_response")
        answers = f", or their answers to {most} (task.max_response)" if most else ""
        found.append(
            f"{cut} of {total} texts were cut to {experiment.data.max_length} tokens (data.max_length){answers}"
        )
    if experiment.runtime.base_dtype == "bfloat16" and experiment.privacy.is_private:
        found.append(
            "over a bfloat16 base one example can change how others round, by hundredths of the clip bound; epsilon "
            "does not count that (docs/privacy.md, the last bits)"
        )
    on_cpu = experiment.runtime.device == "cpu"
    if on_cpu and experiment.runtime.base_dtype == "bfloat16" and (slow := bfloat16_note()):
        found.append(slow)
    return tuple(found)
