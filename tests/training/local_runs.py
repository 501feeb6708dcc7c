"""What the tests of local training share: one client's steps, with every release kept.

A check takes the module under test, `fedlr.training.local` or a mutant of it; a release is the gradient that
a step hands to its optimizer, as one vector.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from fedlr.adapters.state import Block, Slot
from fedlr.models.peft_state import read_adapter, train_only, write_adapter
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler
from fedlr.streams import SeededRandomness
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import class_losses
from fedlr.tasks.tokenise import TokenisedText
from fedlr.training.gradients import Gradients, HookGradients
from fedlr.training.local import LocalTraining
from tests.training.small_models import A_AND_B, among_others, client_data, small_model

SIGMA, BOUND, DIVISOR = 1.3, 0.5, 7.0


class KeepingSGD(torch.optim.SGD):
    """Plain SGD that also keeps each gradient it is given."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, kept: list[Tensor], lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.kept = kept

    def step(self) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        self.kept.append(torch.cat([g.flatten() for g in gradients]).clone())
        super().step()


@dataclass
class Bench:
    """A small model with its engine, set back to the same adapter before every run."""

    block: Block = A_AND_B
    make_engine: Callable[..., Gradients] = HookGradients
    architecture: str = "bert"
    loss: Callable = class_losses
    model: nn.Module = field(init=False)
    engine: Gradients = field(init=False)
    trained: dict[Slot, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.model = small_model(self.architecture)
        self.trained = train_only(self.model, self.block)
        self.engine = self.make_engine(self.model, self.trained, loss=self.loss)
        self.start = read_adapter(self.model)

    def reset(self) -> None:
        write_adapter(self.model, self.start.tensors)

    def releases(
        self,
        local: ModuleType,
        data: TokenisedText,
        *,
        num_steps: int = 1,
        sample_rate: float = 1.0,
        token_budget: int = 64,
        client_id: int = 0,
        round_index: int = 0,
        seed: int = 11,
        lr: float = 0.0,
        mechanism: Mechanism | None | str = "default",
        randomness: object = None,
    ) -> list[Tensor]:
        """Train one client from the start and return what each of its steps released."""
        self.reset()
        kept: list[Tensor] = []
        training = LocalTraining(
            num_steps=num_steps,
            optimizer=lambda parameters: KeepingSGD(parameters, kept=kept, lr=lr),
            token_budget=token_budget,
            divisor=DIVISOR,
            sampler=PoissonSampler(sample_rate),
        )
        if mechanism == "default":
            mechanism = Mechanism(SIGMA, BOUND, sample_rate, DIVISOR)
        self.num_steps = local.train_client(
            self.model,
            self.engine,
            among_others(data),
            training=training,
            mechanism=mechanism,
            randomness=randomness or SeededRandomness(seed),
            client_id=client_id,
            round_index=round_index,
            trained=self.trained,
        )
        return kept


def silent_data(num_rows: int) -> TokenisedText:
    """Return rows whose gradient is exactly zero: none of them is scored."""
    return client_data([[5, 6, 7]] * num_rows, [-100] * num_rows)


class RowCounts:
    """Stands where an engine does and reports which rows were summed: entry i of its one tensor counts row i.

    Row i holds the token i. It clips nothing because a count is what is looked at.
    """

    def __init__(self, slot: Slot, num_rows: int) -> None:
        self.slot, self.num_rows = slot, num_rows

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        return {self.slot: torch.bincount(batch.inputs["input_ids"][:, 0], minlength=self.num_rows).float()}

    def close(self) -> None:
        pass
