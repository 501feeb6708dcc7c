"""From an experiment to what a server needs: the model that it evaluates and exports, the method, and the terms.

Nobody's training examples are here: of the data that a configuration names, the server keeps the held-out part.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fedlr.adapters.state import num_values
from fedlr.config.auto_rates import provisional, resolved_rates
from fedlr.config.build import build, build_method, naming
from fedlr.config.runtime_rules import check_aggregate, check_runtime
from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.flower.terms import Terms
from fedlr.methods.method import Method
from fedlr.models.base_delta import SideWeights
from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.models.peft_state import read_adapter
from fedlr.models.reading import check_reading, read_texts
from fedlr.models.starts.starts import start_of
from fedlr.models.tuners.attach import attach
from fedlr.privacy.mechanism import Mechanism
from fedlr.rounds.evaluate import Evaluator
from fedlr.rounds.round import ServerState, initial_state, task_of
from fedlr.runs.prepare import (
    check_trainable,
    frozen_head_note,
    load_held_out,
    local_training,
    private_mechanism,
    reads_features,
    trained_roles,
    working_model,
)
from fedlr.runs.recorder import held_out_labels
from fedlr.runs.verdict import HeldOut
from fedlr.tasks.losses import training_loss
from fedlr.training.moves import check_moves
from fedlr.training.noise import update_noise
from fedlr.training.threads import torch_threads


@dataclass(frozen=True)
class Served:
    """Everything a server's run needs, built and checked; nothing has been asked of anybody, or written."""

    experiment: Experiment
    seed: int  # of the public randomness: cohorts, starting weights
    base: BaseModel
    model: AdaptedModel
    working: nn.Module
    method: Method
    mechanism: Mechanism | None
    start: ServerState
    origin: str | None  # a sentence, where the start was made from public examples
    terms: Terms
    evaluator: Evaluator
    held_out: HeldOut
    noise_sd: float | None  # in one number of a client's update, where it is known (fedlr.training.noise)

    @property
    def num_trained_values(self) -> int:
        """How many numbers a client trains in the first round."""
        block = task_of(self.start, self.method, train_head=self.experiment.adapter.train_head).block
        return num_values(self.start.adapter.select(block).values())


def assemble(
    experiment: Experiment, *, seed: int, experiment_id: str, say: Callable[[str], None] = lambda line: None
) -> Served:
    """Load the model and the held-out examples, attach the adapter, calibrate the noise, write the terms.

    Raises:
        InputError: for anything that could not run as configured.
    """
    check_served(experiment)
    with torch_threads(1):
        method = build_method(experiment)
        check_runtime(experiment, method, local_training(provisional(experiment).trainer, method.client).rule)
        held_out, num_rows = load_held_out(experiment, seed=seed)
        experiment = resolved_rates(experiment, num_rows=num_rows, server_step=method.server_step)
        method = build_method(experiment)
        training = local_training(experiment.trainer, method.client)
        training_loss(experiment.data.label_weights, held_out.label_names)  # devices make it; wrong names are told here
        _, mechanism = private_mechanism(experiment)
        base: BaseModel = build(experiment.model.section(), "model", label_names=held_out.label_names, seed=seed)
        with naming("data", "max_length"):
            check_reading(base, max_length=experiment.data.max_length, has_pairs=held_out.pairs is not None)
        model = attach(base, experiment.adapter, seed=seed)
        method = method.bound(model)
        first = method.block_schedule(0, read_adapter(model))
        check_trainable(model, method.block_schedule.roles, experiment.trainer, experiment.adapter, first=first)
        with naming("data", "max_length"):
            test = read_texts(held_out, base, max_length=experiment.data.max_length)
        begun = start_of(
            experiment.adapter,
            base,
            model,
            private=experiment.data.section(),
            max_length=experiment.data.max_length,
            seed=seed,
        )
        start = initial_state(begun.adapter, method)
        check_aggregate(start, method, experiment, weights=(1.0,) * experiment.num_clients)
        first = task_of(start, method, train_head=experiment.adapter.train_head).block
        roles = trained_roles(experiment, method)
        faint = check_moves(model, start.adapter, first, max_grad_norm=mechanism.max_grad_norm if mechanism else None)
        for note in (faint, frozen_head_note(experiment, base, roles)):
            if note:
                say(f"note: {note}")
        features = reads_features(model, roles, start.adapter)
        working, (test,) = working_model(experiment.runtime, model, [test], features=features, say=say)
    terms = Terms.of(
        experiment,
        mechanism,
        experiment_id=experiment_id,
        seed=seed,
        model_sha256=base.fingerprint,
        label_names=held_out.label_names,
        pairs=held_out.pairs is not None,
    )
    evaluator = Evaluator(working, test, side=SideWeights(working), num_threads=experiment.runtime.num_workers)
    return Served(
        experiment=experiment,
        seed=seed,
        base=base,
        model=model,
        working=working,
        method=method,
        mechanism=mechanism,
        start=start,
        origin=begun.origin,
        terms=terms,
        evaluator=evaluator,
        held_out=held_out_labels(test.labels, held_out.label_names),
        noise_sd=update_noise(training, mechanism),
    )


def check_served(experiment: Experiment) -> None:
    """Refuse what a server cannot do for devices.

    Raises:
        InputError: which names the key.
    """
    e = experiment
    if e.weighting != "uniform":
        raise InputError(
            f"Expected weighting=uniform with runtime={e.runtime.kind}, got {e.weighting}: the server knows no sizes, "
            "and does not take a client's word"
        )
    for key in ("run_no_privacy", "run_alone"):
        if getattr(e.tracking, key):
            raise InputError(
                f"Expected tracking.{key}=false with runtime={e.runtime.kind}, got true: baselines are a simulation's"
            )
    if e.runtime.base_dtype != "float32":
        raise InputError(
            f"Expected runtime.base_dtype=float32 with runtime={e.runtime.kind}, got {e.runtime.base_dtype}: devices "
            "compute in float32"
        )
