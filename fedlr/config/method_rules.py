"""What a method, as built from its choices, cannot do with the rest of a configuration."""

from collections.abc import Iterator

from fedlr.adapters.state import HEAD, LORA_A, LORA_B
from fedlr.config.choice import Choice
from fedlr.config.language_rules import CAUSAL_LM
from fedlr.config.rule import rule
from fedlr.errors import InputError
from fedlr.methods.layer_choice import StrongestLayers
from fedlr.methods.method import Always
from fedlr.models.adapter_config import WITH_SIDE
from fedlr.models.tuners.blocks import LORA


@rule("server_momentum", "adapter.train_head", "method")
def momentum_moves(c: Choice) -> Iterator[str]:
    """A momentum of the server moves something that lasts from round to round."""
    e = c.experiment
    if e.server_momentum and not e.adapter.train_head and c.method.momentum_roles == {HEAD}:
        yield (
            f"Expected adapter.train_head=true with server_momentum for method={c.method.name}, got false: its factors "
            "have no coordinates that last from round to round, so that the head alone could have a momentum; set "
            "server_momentum=0"
        )


@rule("release", "method.personal")
def one_model_to_release(c: Choice) -> Iterator[str]:
    """The best round is kept of a model that is the server's as a whole."""
    if c.experiment.release == "best" and c.method.personal:
        yield (
            f"Expected release=last for method={c.method.name}, which leaves a part of the model with each client, got "
            "best: what clients keep is of the last round"
        )


@rule("average_last", "method", "adapter.system")
def models_to_average(c: Choice) -> Iterator[str]:
    """The mean of the last rounds is taken of adapters of one form over one base."""
    e, method = c.experiment, c.method
    for what, why in (
        (method.folds, "folds what it learns into the base"),
        (method.dynamic_ranks, "changes ranks from round to round"),
        (method.personal, "leaves a part of the model with each client"),
        (e.adapter.system != LORA, f"trains {e.adapter.system}, of which the mean of parameters is another model"),
    ):
        if e.average_last != 1 and what:
            yield f"Expected average_last=1 for method={method.name}, which {why}, got {e.average_last}"


@rule("runtime.base_dtype", "method.folds")
def folds_in_float32(c: Choice) -> Iterator[str]:
    """What is added to the base weights round by round would be rounded away in bfloat16."""
    if c.method.folds and (dtype := c.experiment.runtime.base_dtype) != "float32":
        yield (
            f"Expected runtime.base_dtype=float32 for method={c.method.name}, which adds to the base model's weights, "
            f"got {dtype}: it would round most of that away"
        )


@rule("runtime.num_processes", "method.personal", "method.client")
def memory_in_one_process(c: Choice) -> Iterator[str]:
    """Clients that remember earlier rounds live in one process."""
    num_processes = c.experiment.runtime.num_processes
    if (c.method.personal or c.rule.remembers) and num_processes > 1:
        yield (
            f"Expected runtime.num_processes=1 for method={c.method.name}, whose clients remember earlier rounds, got "
            f"{num_processes}"
        )


@rule("method.block_schedule", "adapter.client_ranks", "method.personal")
def personal_factors(c: Choice) -> Iterator[str]:
    """Factors that stay with a client train in every round, with one rank."""
    method = c.method
    if method.personal and not isinstance(method.block_schedule, Always):
        yield f"Expected method.block_schedule=always with method.personal, got another for method={method.name}"
    if method.personal and (c.experiment.adapter.has_client_ranks or method.prunes):
        yield f"Expected adapter.client_ranks=null with method.personal, got ranks for method={method.name}"


@rule("method.client", "trainer.after_noise", "method.block_schedule")
def block_of_rule(c: Choice) -> Iterator[str]:
    """A rule of the clients trains the factors that it is made for; LoRA+ both."""
    roles = frozenset(c.method.block_schedule.roles)
    try:
        c.rule.active(0, roles)
    except InputError as error:
        yield str(error)
    if c.rule.needs_both_factors and not {LORA_A, LORA_B} <= roles:
        yield (
            "Expected a method that trains lora_A and lora_B for trainer.after_noise, such as fedit, got "
            f"{c.method.name}: where one of them trains LoRA+ is another trainer.optimizer.lr and nothing else"
        )


@rule("trainer.engine", "trainer.num_steps", "method.client")
def factors_in_turn(c: Choice) -> Iterator[str]:
    """Factors that train in turn within a round need the fused engine and two steps."""
    trainer, name = c.experiment.trainer, c.method.name
    if c.rule.alternates and trainer.engine != "fused":
        yield f"Expected trainer.engine=fused for method={name}, got {trainer.engine}"
    if c.rule.alternates and trainer.num_steps < 2:
        yield f"Expected trainer.num_steps >= 2 for method={name}, which trains its factors in turn, got 1"


@rule("adapter.client_ranks", "method.aggregate", "trainer.after_noise")
def mixed_ranks(c: Choice) -> Iterator[str]:
    """Clients of different ranks need a method that aggregates them; a rule after the noise needs both factors then."""
    if not c.experiment.adapter.has_client_ranks:
        return
    if not c.method.mixed_ranks:
        yield (
            "Expected a method that aggregates mixed ranks for adapter.client_ranks, such as flexlora, got "
            f"{c.method.name}"
        )
    if c.experiment.trainer.after_noise is not None and len(set(c.method.block_schedule.roles)) < 2:
        yield "Expected adapter.client_ranks=null with trainer.after_noise where one factor trains"


@rule("adapter.train_head", "method.block_schedule", "task")
def head_that_trains(c: Choice) -> Iterator[str]:
    """A method that trains the head has one to train; that of a language model stays frozen."""
    if HEAD not in c.method.block_schedule.roles:
        return
    if c.experiment.task.target == CAUSAL_LM:
        yield (
            f"Expected a method that trains LoRA with task=causal_lm, such as fedsvd, got {c.method.name}: the head of "
            "a language model stays frozen"
        )
    if not c.experiment.adapter.train_head:
        yield f"Expected adapter.train_head=true for method={c.method.name}, which trains the head, got false"


@rule("adapter.init_lora_weights", "method")
def ranked_start(c: Choice) -> Iterator[str]:
    """A method that ranks layers or cuts ranks begins with an adapter that has nothing of the base."""
    method, start = c.method, c.experiment.adapter.init_lora_weights
    reads_product = method.dynamic_ranks or isinstance(method.block_schedule, StrongestLayers)
    if (method.prunes or reads_product) and start in WITH_SIDE:
        yield (
            f"Expected adapter.init_lora_weights=true or principal for method={method.name}, got {start}: what it "
            "takes out of the base would be ranked with what was learnt, and cut"
        )


@rule("trainer.engine", "adapter.client_ranks", "method")
def engine_of_ranks(c: Choice) -> Iterator[str]:
    """Clients of different ranks train in the fused engine."""
    engine = c.experiment.trainer.engine
    if (c.experiment.adapter.has_client_ranks or c.method.prunes) and engine != "fused":
        yield (
            "Expected trainer.engine=fused for clients of different ranks (adapter.client_ranks, hetlora), got "
            f"{engine}"
        )
