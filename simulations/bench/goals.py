"""What the engine must reach: one row a goal, in the order in which they are shown."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Goal:
    """A bound on the median of one measure. `key` is that of the measure."""

    key: str
    text: str
    kind: Literal["at most", "at least"]
    bound: float
    unit: str  # written after the number

    def reached(self, value: float) -> bool:
        """Return whether a value is on the right side of the bound; nan never is.

        >>> Goal("speed", "speed", "at least", 2.2, " times").reached(2.2)
        True
        """
        return value <= self.bound if self.kind == "at most" else value >= self.bound


def _times(key: str, text: str, bound: float) -> Goal:
    return Goal(key, text, "at least", bound, " x")


def _share(key: str, text: str, bound: float) -> Goal:
    return Goal(key, text, "at most", bound, "")


def _megabytes(key: str, text: str, bound: float) -> Goal:
    return Goal(key, text, "at most", bound, " MB")


GOALS = (
    _share("step-plain", "private step / plain non-private PEFT step, all sizes", 1.00),
    _share("step-plain-encoder", "the same, 6x384 encoder", 0.65),
    _share("step-plain-vit", "the same, 6x384 ViT", 0.65),
    _share("step-plain-decoder", "the same, 6x384 decoder", 0.55),
    _share("step-hooks", "private step / Opacus hooks, all sizes", 0.93),
    _share("step-ghost", "private step / Opacus ghost clipping, all sizes", 0.62),
    _times("cohort", "cohort of 64, fp32, against two processes one by one", 3.2),
    _times("cohort-bf16", "the same, bf16 base", 5.8),
    _times("cohort-upper", "the same, LoRA in the upper third, bf16, cached prefix", 12.0),
    _times("round-cached", "round of 100 clients, against Flower + Ray, model cached in the actor", 4.0),
    _times("round-twenty", "20 such rounds, against Flower + Ray, model cached in the actor", 6.0),
    _times("round-examples", "the same, against Flower + Ray as in its public examples", 10.0),
    _share("memory", "peak memory of 1,000 clients in a round, frugal settings / of one client", 1.15),
    Goal("overhead", "overhead of a round of 10,000 trivial clients, a client", "at most", 0.3, " ms"),
    _share("overhead-growth", "the same, growth of the time from 1,000 to 10,000 clients / tenfold", 1.10),
    _share("parity", "fused against one by one, same noise, 20 steps: relative difference", 1e-6),
    _megabytes("aggregate-mean", "weighted mean of 1,000 clients, 48 layers of 1024 x 1024: peak memory", 200),
    _megabytes("aggregate-fair", "the same, LoRA-FAIR", 200),
    _megabytes("aggregate-flex", "the same, SVD of the streamed sum", 200),
    _times("aggregate-refactor", "re-factorisation of 1024 x 1024, rank 8, against the SVD of the product", 100.0),
    Goal(
        "federation-overhead",
        "round of three devices over TLS, 1.5 MB each: time besides training",
        "at most",
        4.0,
        " s",
    ),
    _share("federation-ratio", "the same / Flower's own FedAvg of the same arrays", 0.5),
    Goal("federation-loads", "the same: loads of the base model, a device", "at most", 1.0, ""),
    _times("gpu-110m", "GPU: 64 clients, 110 M encoder, against one by one", 10.0),
    _times("gpu-355m", "GPU: 64 clients, 355 M encoder, against one by one", 10.0),
    Goal("gpu-rate", "GPU: share of the measured bf16 matrix rate at batch 32", "at least", 0.35, ""),
)
BY_KEY = {goal.key: goal for goal in GOALS}
