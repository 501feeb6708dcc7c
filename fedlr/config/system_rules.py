"""What a run cannot do with another adapter than LoRA: methods, engines and runtimes that know LoRA only."""

from collections.abc import Iterator

from fedlr.config.choice import Choice
from fedlr.config.rule import rule
from fedlr.methods.aggregate.layer_mean import LayerMean
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.server_optimizer import FedAdam, FedAvgM, FedYogi
from fedlr.methods.method import keep, trained_block
from fedlr.models.tuners.attach import run_tuner
from fedlr.models.tuners.blocks import LORA, all_blocks, role_of


@rule("method", "adapter.system")
def method_of_system(c: Choice) -> Iterator[str]:
    """Other adapters than LoRA are averaged, parameter by parameter or layer by layer, and nothing else."""
    system, method = c.experiment.adapter.system, c.method
    if system == LORA:
        return
    blocks = {role_of(system, block) for block in run_tuner(system).blocks}
    rules = (LayerMean, FedAdam, FedAvgM, FedYogi)
    means = method.aggregate is weighted_mean or isinstance(method.aggregate, rules)
    sends = method.broadcast in (trained_block, all_blocks)
    plain = method.finalise is keep and not (method.personal or method.folds or method.client.changes)
    if not (set(method.block_schedule.roles) <= blocks and means and sends and plain):
        yield (
            f"Expected method=fedavg or fedavg_rotating or layer_mean for adapter.system={system}, got {method.name}: "
            "it is made for lora_A and lora_B"
        )


@rule("trainer.engine", "trainer.after_noise", "runtime.num_processes", "runtime.base_dtype", "adapter.system")
def engine_of_system(c: Choice) -> Iterator[str]:
    """Other adapters than LoRA train in Opacus' engine, in one process, over a float32 base."""
    e = c.experiment
    for key, got, wanted in (
        ("trainer.engine", e.trainer.engine, "opacus"),
        ("trainer.after_noise", e.trainer.after_noise and "a rule", None),
        ("runtime.num_processes", e.runtime.num_processes, 1),
        ("runtime.base_dtype", e.runtime.base_dtype, "float32"),
    ):
        if e.adapter.system != LORA and got != wanted:
            yield (
                f"Expected {key}={str(wanted).lower()} for adapter.system={e.adapter.system}, got {str(got).lower()}, "
                "which serves LoRA only"
            )
