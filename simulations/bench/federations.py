"""The federations that benchmarks train: MiniLM over real sentences, in the words of `fedlr simulate`."""

from fedlr.simulations.bench.settings import Settings

NUM_TRAINING = 19_459 - 1_000  # sentences of configs/data/vader.yaml, without those held out
MAX_GRAD_NORM, LR, DIVISOR = 0.1, 1.0, 8.0
UPPER_THIRD = "adapter.layers=[4,5]"
FIRST_TOKEN = ("model.pooling=null", "model.head_std=0.1")  # the network that the rivals load
OPACUS = ("trainer.engine=opacus", "trainer.grad_sample_mode=hooks", "runtime.num_workers=1")


def overrides(
    settings: Settings, *, num_clients: int, num_steps: int, batch: float, is_toy: bool | None = None
) -> list[str]:
    """Return the overrides of a private federation whose clients draw `batch` examples a step on average.

    Sentences are shared out evenly. SGD, so that the difference of two adapters is that of their clipped sums. The
    budget is wide: a benchmark runs one round after another. A tiny benchmark has a toy model and made-up sentences,
    unless `is_toy` is false.
    """
    tiny = settings.size == "tiny" if is_toy is None else is_toy
    num_training = 20 * num_clients if tiny else NUM_TRAINING
    rate = min(1.0, batch / (num_training / num_clients))
    words = [
        "name=bench",
        "method=ffa_lora",
        "partition=iid",
        f"seed={settings.seed}",
        f"num_clients={num_clients}",
        f"cohort_size={num_clients}",
        "num_rounds=1000",
        "privacy.epsilon=1e6",
        "privacy.noise_multiplier=1.0",
        f"privacy.max_grad_norm={MAX_GRAD_NORM}",
        "privacy.accountant=rdp",
        f"trainer.num_steps={num_steps}",
        f"trainer.sample_rate={rate:.6f}",
        f"trainer.divisor={DIVISOR}",
        f"trainer.optimizer.lr={LR}",
        "adapter.train_head=false",  # as the rivals' heads
        "tracking.run_alone=false",
        "tracking.run_no_privacy=false",
    ]
    if not tiny:
        return ["model=minilm", *FIRST_TOKEN, "adapter.lora_alpha=8", "data=vader", *words]
    toy = [f"data.num_examples={num_training + 8}", "data.num_test=8"]
    return ["model=tiny", "data=synthetic", "adapter.rank=4", "adapter.lora_alpha=4", *toy, *words]


def ours(settings: Settings, *more: str) -> list[str]:
    """Return what makes a federation ours: the fused engine, one thread a core."""
    del settings
    return ["trainer.engine=fused", "runtime.num_workers=2", *more]
