"""What a run cannot do with another adapter than LoRA: methods, engines and runtimes that know LoRA only."""

from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.methods.aggregate.layer_mean import LayerMean
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.server_optimizer import FedAdam, FedAvgM, FedYogi
from fedlr.methods.method import Method, keep, trained_block
from fedlr.models.tuners.attach import run_tuner
from fedlr.models.tuners.blocks import LORA, all_blocks, role_of


def check_system(experiment: Experiment, method: Method) -> None:
    """Refuse another adapter than LoRA where the method, the engine or the runtime knows LoRA only."""
    system, runtime, name = experiment.adapter.system, experiment.runtime, method.name
    if system == LORA:
        return
    blocks = {role_of(system, block) for block in run_tuner(system).blocks}
    rules = (LayerMean, FedAdam, FedAvgM, FedYogi)
    means = method.aggregate is weighted_mean or isinstance(method.aggregate, rules)
    sends = method.broadcast in (trained_block, all_blocks)
    plain = method.finalise is keep and not (method.personal or method.folds or method.client.changes)
    if not (set(method.block_schedule.roles) <= blocks and means and sends and plain):
        raise InputError(
            f"Expected method=fedavg or fedavg_rotating or layer_mean for adapter.system={system}, got {name}: it is "
            "made for lora_A and lora_B"
        )
    for key, got, wanted in (
        ("trainer.engine", experiment.trainer.engine, "opacus"),
        ("trainer.after_noise", experiment.trainer.after_noise and "a rule", None),
        ("runtime.num_processes", runtime.num_processes, 1),
        ("runtime.base_dtype", runtime.base_dtype, "float32"),
    ):
        if got != wanted:
            raise InputError(
                f"Expected {key}={str(wanted).lower()} for adapter.system={system}, got {str(got).lower()}, which "
                "serves LoRA only"
            )
