"""From an experiment to what a server needs: the model that it evaluates and exports, the method, and the terms.

Nobody's training examples are here: of the data that a configuration names, the server keeps the held-out part.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedlr.adapters.state import num_values
from fedlr.config.auto_rates import resolved_rates
from fedlr.config.ledger_rules import BASELINES
from fedlr.config.rule import Rules, rule
from fedlr.config.schema import Experiment
from fedlr.flower.task_terms import TASKS, terms_of_task
from fedlr.flower.terms import Terms
from fedlr.methods.method import Method
from fedlr.models.base_delta import SideWeights
from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.privacy.mechanism import Mechanism
from fedlr.rounds.evaluate import Evaluator
from fedlr.rounds.round import ServerState, request_of
from fedlr.runs.assemble import assemble as assemble_parts
from fedlr.runs.assemble import check_parts
from fedlr.runs.prepare import private_mechanism, with_library, working_model
from fedlr.runs.recorder import held_out_labels
from fedlr.runs.tables import load_held_out
from fedlr.runs.verdict import HeldOut
from fedlr.tasks.evaluation import Metric
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
    earlier: Mapping[str, Any] | None  # of the run whose adapter is the start, if one is
    terms: Terms
    evaluator: Evaluator
    held_out: HeldOut
    metric: Metric  # of the task
    noise_sd: float | None  # in one number of a client's update, where it is known (fedlr.training.noise)

    @property
    def num_trained_values(self) -> int:
        """How many numbers a client trains in the first round."""
        block = request_of(self.start, self.method, train_head=self.experiment.adapter.train_head).block
        return num_values(self.start.adapter.select(block).values())


def assemble(
    experiment: Experiment, *, seed: int, experiment_id: str, say: Callable[[str], None] = lambda line: None
) -> Served:
    """Load the model and the held-out examples, attach the adapter, calibrate the noise, write the terms.

    Raises:
        InputError: for anything that could not run as configured.
    """
    OF_DEVICES.check(experiment)
    with torch_threads(1):
        method = check_parts(experiment)
        experiment = with_library(experiment)
        held_out, num_rows = load_held_out(experiment, seed=seed)
        experiment = resolved_rates(experiment, num_rows=num_rows, server_step=method.server_step)
        _, mechanism = private_mechanism(experiment)
        weights = (1.0,) * experiment.num_clients
        parts = assemble_parts(experiment, (held_out,), seed=seed, mechanism=mechanism, weights=weights)
        for note in parts.notes:
            say(f"note: {note}")
        working, (test,) = working_model(
            experiment.runtime, parts.model, list(parts.examples), features=parts.reads_features, say=say
        )
    terms = Terms.of(
        experiment,
        mechanism,
        experiment_id=experiment_id,
        seed=seed,
        model_sha256=parts.base.fingerprint,
        label_names=held_out.label_names,
        pairs=getattr(held_out, "pairs", None) is not None,
        task=terms_of_task(parts.task, parts.base, held_out),
    )
    evaluator = Evaluator(
        working, test, task=parts.task, side=SideWeights(working), num_threads=experiment.runtime.num_workers
    )
    return Served(
        experiment=experiment,
        seed=seed,
        base=parts.base,
        model=parts.model,
        working=working,
        method=parts.method,
        mechanism=mechanism,
        start=parts.start,
        origin=parts.origin,
        earlier=parts.earlier,
        terms=terms,
        evaluator=evaluator,
        held_out=held_out_labels(test.labels, held_out.label_names),
        metric=parts.task.metric,
        noise_sd=update_noise(parts.training, mechanism),
    )


@rule("task", "runtime")
def task_of_devices(e: Experiment) -> Iterator[str]:
    """Devices have the code of the tasks that come with fedlr, and no other."""
    if e.task.target not in TASKS:
        yield (
            f"Expected task to be one of {', '.join(TASKS)} with runtime={e.runtime.kind}, got {e.task.target}: "
            "devices have no other code; set runtime=local"
        )


@rule("weighting", "runtime")
def weights_of_devices(e: Experiment) -> Iterator[str]:
    """A server knows no sizes of devices, and does not take their word: they have equal weights."""
    if e.weighting != "uniform":
        yield (
            f"Expected weighting=uniform with runtime={e.runtime.kind}, got {e.weighting}: the server knows no sizes, "
            "and does not take a client's word"
        )


@rule(*(f"tracking.{key}" for key in BASELINES), "runtime")
def no_baselines(e: Experiment) -> Iterator[str]:
    """Baselines are a simulation's."""
    for key in BASELINES:
        if getattr(e.tracking, key):
            yield f"Expected tracking.{key}=false with runtime={e.runtime.kind}, got true: baselines are a simulation's"


@rule("runtime.base_dtype", "runtime")
def base_of_devices(e: Experiment) -> Iterator[str]:
    """Devices compute in float32."""
    if e.runtime.base_dtype != "float32":
        yield (
            f"Expected runtime.base_dtype=float32 with runtime={e.runtime.kind}, got {e.runtime.base_dtype}: devices "
            "compute in float32"
        )


OF_DEVICES: Rules[Experiment] = Rules(
    "A server of devices",
    "Asked by `fedlr server run`, and where a simulation passes its messages through Flower.",
    (task_of_devices, weights_of_devices, no_baselines, base_of_devices),
)
