"""The project's own parts: the only names that a configuration may bring along when somebody else wrote it.

A configuration typed on this machine may name any function of its user's own, and is code as much as a script is. One
that is read (from a run's directory, a checkpoint, the network) is data: a name in it is compared with this table as
text, before anything is imported, and is nothing else than one of these or one that the reader typed himself.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args

from fedlr.config_errors import dotted, shown
from fedlr.errors import InputError

TARGET, PATH = "_target_", "path"
OWN_PARTS = "FEDLR_OWN_PARTS"  # in the environment: names of a user's own, separated by spaces
GET_METHOD = "hydra.utils.get_method"  # names a function that is used as it is, in `path`

OptimizerName = Literal[
    "torch.optim.SGD",
    "torch.optim.Adam",
    "torch.optim.AdamW",
    "torch.optim.Adamax",
    "torch.optim.NAdam",
    "torch.optim.RAdam",
    "torch.optim.Adagrad",
    "torch.optim.Adadelta",
    "torch.optim.RMSprop",
    "torch.optim.Rprop",
    "torch.optim.ASGD",
]
RuleName = Literal[
    "fedlr.client_rule.ClientRule",
    "fedlr.client_rules.alternation.LocalAlternation",
    "fedlr.client_rules.preconditioned.LoraPlus",
    "fedlr.client_rules.preconditioned.ScaledGradient",
    "fedlr.client_rules.proximal.FedProx",
    "fedlr.client_rules.scaffold.ScaffoldClient",
    "fedlr.client_rules.tail.TailPenalty",
]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
RULES: tuple[RuleName, ...] = get_args(RuleName)
# By the section in which they may stand.
PARTS: Mapping[str, tuple[str, ...]] = {
    "data": ("fedlr.data.synthetic.synthetic_text", "fedlr.data.table.load_table"),
    "partition": (
        "fedlr.data.partition.by_group",
        "fedlr.data.partition.dirichlet",
        "fedlr.data.partition.dirichlet_by_label",
        "fedlr.data.partition.iid",
    ),
    "model": ("fedlr.models.pretrained", "fedlr.models.tiny_random"),
    "method": ("fedlr.method.Method",),
    "method.block_schedule": (
        "fedlr.layer_choice.BetterFactor",
        "fedlr.layer_choice.StrongestLayers",
        "fedlr.method.Alternate",
        "fedlr.method.Always",
        "fedlr.tuners.blocks.AllBlocks",
        "fedlr.tuners.blocks.ExactBlocks",
        "fedlr.tuners.blocks.RotatingBlocks",
    ),
    "method.aggregate": (
        "fedlr.aggregate.fair.LoraFair",
        "fedlr.aggregate.fair.LoraFairRidge",
        "fedlr.aggregate.layer_mean.LayerMean",
        "fedlr.aggregate.mean.weighted_mean",
        "fedlr.aggregate.pruning.SelfPruning",
        "fedlr.aggregate.rank.norm_weighted_mean",
        "fedlr.aggregate.rank.svd_redistribution",
        "fedlr.aggregate.residual.ExactResidual",
        "fedlr.aggregate.rotation.FedRot",
        "fedlr.aggregate.server_optimizer.FedAdam",
        "fedlr.aggregate.server_optimizer.FedAvgM",
        "fedlr.aggregate.server_optimizer.FedYogi",
        "fedlr.aggregate.stacking.stack_and_fold",
        "fedlr.aggregate.subspace.FedAsk",
        "fedlr.aggregate.subspace.projected_mean",
        "fedlr.client_rules.scaffold.ScaffoldServer",
        "fedlr.layer_choice.ScoredMean",
    ),
    "method.finalise": (
        "fedlr.aggregate.random_ranks.RandomDirections",
        "fedlr.aggregate.rank_policy.RankBudget",
        "fedlr.aggregate.rank_policy.RankEnergy",
        "fedlr.aggregate.renewal.Renewal",
        "fedlr.method.OrthonormalRows",
        "fedlr.method.SvdRefactor",
        "fedlr.method.keep",
    ),
    "method.broadcast": (
        "fedlr.client_rules.personal.SharedBlock",
        "fedlr.method.full_adapter",
        "fedlr.method.trained_block",
        "fedlr.tuners.blocks.all_blocks",
    ),
    "method.client": RULES,
    "trainer.optimizer": OPTIMIZERS,
    "trainer.after_noise": RULES,
}


def require_registered(tree: Any, *, source: str, own_parts: Collection[str] = (), way_out: str = "") -> None:
    """Refuse a configuration that was read and names anything but the parts of this table; nothing is imported.

    Args:
        tree: plain values, as they were read.
        source: what they were read from, for the error.
        own_parts: names that the reader typed himself, to the letter; each may stand in any section for a part.
        way_out: says how he types one; `{name}` stands for it.

    Raises:
        InputError: for the first other name, at any depth, and for a part where none belongs.
    """
    for where, key, name in named_parts(tree):
        full = dotted(where, key)
        if where not in PARTS:
            raise InputError(f"Expected no name of a function at {full} in {source}, got {shown(name)}")
        if not isinstance(name, str) or (name not in PARTS[where] and name not in own_parts):
            how = way_out.format(name=name) if way_out else ""
            raise InputError(f"Expected {full} in {source} to be a part of fedlr, got {shown(name)}{how}")


def own_parts_of(tree: Any) -> list[str]:
    """Return the names of a tree that this table does not hold: a user's own, if he typed them."""
    return sorted({str(name) for where, _, name in named_parts(tree) if name not in PARTS.get(where, ())})


def named_parts(tree: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield the section, the key and the name of every part that a tree names, in lists and at any depth."""
    found: list[tuple[str, Any]] = [("", tree)]
    while found:  # not by recursion: whoever wrote the tree chose its depth
        where, node = found.pop()
        if isinstance(node, Mapping):
            if TARGET in node:
                is_path = node[TARGET] == GET_METHOD and where.startswith("method.")
                key = PATH if is_path else TARGET
                yield where, key, node.get(key)
            found += [(dotted(where, key), value) for key, value in node.items()]
        elif isinstance(node, list | tuple):
            found += [(dotted(where, index), value) for index, value in enumerate(node)]
