"""What the registry says of one tuner: how it is built, what trains, what is shipped, what averaging does to it.

A *tuner* is a way to write the update of a frozen layer with few trained tensors. Its trained tensors are split into
*blocks*. How the layer depends on them decides what averaging trained tensors over clients does:

    linear       the mean of the tensors gives the mean of the layers, all blocks together
    multilinear  so it does while one block trains and the others are shared, for every block
    nonlinear    neither; single blocks may still be exact alone, and are named

Tensors are addressed by the end of their dotted name (`lora_A.default.weight`, with `*` for one part of it or more):
never by a substring.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from peft import PeftConfig

from fedlr.errors import InputError
from fedlr.models.starts.tuner_starts import Start
from fedlr.models.tuners.layer_means import Folded, InOwnForm

Form = Literal["linear", "multilinear", "nonlinear"]
Path = Literal["hooks", "vmap", "copies", "loop"]
Network = Literal["linear", "convolution", "tokens"]
Patterns = tuple[str, ...]


@dataclass(frozen=True)
class Tuner:
    """One system that a client can train, as PEFT builds it.

    Attributes:
        title: its name in the literature.
        config: the class of its PEFT configuration.
        options: what makes it this system; a caller cannot change them.
        sizes: ranks, block sizes and counts that fit the measuring networks; a caller chooses others.
        blocks: the trained tensors, by the name of their block; the first has a gradient at the start, if any has.
        form: see the module's docstring.
        exact: the blocks that are exact alone; of a linear or multilinear tuner all.
        path: how it gets per-example gradients: see `fedlr.training.tuner_gradients`.
        frozen: tensors that PEFT would train and this system does not.
        ships: frozen tensors that a client cannot make by itself: drawn from an unseeded generator, made from data, or
            of an SVD whose signs are free. The server sends them once, before round 0.
        rebuilt: frozen tensors that every client makes alike, and from what.
        held: classes of modules that stay in eval mode, because they draw random numbers in train mode.
        start: how the server builds the model from a public batch, where the system is that start.
        client_options: what a client that has no public batch builds with instead.
        network: what it is measured on.
        reads_task: whether its forward pass takes `task_ids` (N,) besides the input.
        source: authors and year.
        note: what a user must know besides.
        layer_mean: how a server averages its layers and writes the mean back; None: it cannot, or need not.
    """

    title: str
    config: Callable[..., PeftConfig]
    blocks: Mapping[str, Patterns]
    form: Form
    path: Path
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    exact: frozenset[str] = frozenset()
    frozen: Patterns = ()
    ships: Patterns = ()
    rebuilt: str = ""
    held: frozenset[str] = frozenset()
    start: Start | None = None
    client_options: Mapping[str, Any] = field(default_factory=dict)
    network: Network = "linear"
    reads_task: bool = False
    note: str = ""
    layer_mean: Folded | InOwnForm | None = None

    def exact_alone(self) -> frozenset[str]:
        """Return the blocks that averaging leaves exact while they train alone."""
        return self.exact if self.form == "nonlinear" else frozenset(self.blocks)

    def block_of(self, name: str) -> str | None:
        """Return the block of a parameter by its dotted name; None if it does not train.

        Raises:
            ValueError: if two blocks claim it.
        """
        found = [block for block, patterns in self.blocks.items() if matches(name, patterns)]
        if len(found) > 1 or (found and matches(name, self.frozen)):
            raise ValueError(f"Expected blocks that do not overlap, got {name} in {[*found, 'frozen']}")
        return found[0] if found else None

    def peft_config(self, *, client: bool = False, **arguments: Any) -> PeftConfig:
        """Return the PEFT configuration; `arguments` are sizes and targets.

        Raises:
            InputError: if an argument would make it another system.
        """
        taken = sorted(arguments.keys() & self.options.keys())
        if taken:
            raise InputError(f"Expected other arguments for {self.title}, got {taken[0]}, which defines it")
        mine = {**self.options, **(self.client_options if client else {})}
        return self.config(**{**mine, **self.sizes, **arguments})


def matches(name: str, patterns: Patterns) -> bool:
    """Say whether a dotted name ends in one of the patterns.

    >>> matches("model.first.lora_A.default.weight", ("lora_A.default.weight",))
    True
    >>> matches("model.first.not_lora_A.default.weight", ("lora_A.default.weight",))
    False
    """
    return any(fnmatchcase(f".{name}", f"*.{pattern}") for pattern in patterns)
