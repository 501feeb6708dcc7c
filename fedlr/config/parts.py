"""The project's own parts: by group, the names that a configuration gives them, and where each is.

A name (`weighted_mean`) is looked up in this table and never imported as it stands, so files may move and a run of
yesterday still resumes. What older releases wrote instead, a dotted path, is in `fedlr.config.old_names`.

A configuration typed on this machine may name any function of its user's own besides, by its dotted path, and is code
as much as a script is. One that is read (from a run's directory, a checkpoint, the network) is data: a name in it is
compared with this table as text, before anything is imported, and is nothing else than one of these or one that the
reader typed himself.
"""

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args

from fedlr.config.old_names import OLD_NAMES, RuleName
from fedlr.errors import InputError
from fedlr.errors.messages import dotted, shown

TARGET, PATH = "_target_", "path"
OWN_PARTS = "FEDLR_OWN_PARTS"  # in the environment: names of a user's own, separated by spaces
GET_METHOD = "hydra.utils.get_method"  # an older way to name a function that is used as it is, in `path`

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
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
RULES: Mapping[str, str] = {
    "fedprox": "fedlr.methods.client_rules.proximal.FedProx",
    "local_alternation": "fedlr.methods.client_rules.alternation.LocalAlternation",
    "lora_plus": "fedlr.methods.client_rules.preconditioned.LoraPlus",
    "plain": "fedlr.methods.client_rules.rule.ClientRule",
    "scaffold": "fedlr.methods.client_rules.scaffold.ScaffoldClient",
    "scaled_gradient": "fedlr.methods.client_rules.preconditioned.ScaledGradient",
    "tail_penalty": "fedlr.methods.client_rules.tail.TailPenalty",
}
CODECS: Mapping[str, str] = {
    "bf16": "fedlr.methods.codecs.rounding.Bfloat16",
    "int8": "fedlr.methods.codecs.rounding.Int8",
    "none": "fedlr.methods.codecs.codec.Exact",
    "projection": "fedlr.methods.codecs.projection.Projection",
    "top_k": "fedlr.methods.codecs.top_k.TopK",
}
# As protocol 1 and the policies of devices write them.
RULES_OF_PROTOCOL: tuple[RuleName, ...] = get_args(RuleName)
# By the section in which they may stand: name, and the function or class.
PARTS: Mapping[str, Mapping[str, str]] = {
    "data": {
        "conversations": "fedlr.data.conversations.load_conversations",
        "images": "fedlr.data.images.load_images",
        "made_up_images": "fedlr.tasks.made_up_images.made_up_images",
        "multilabel_table": "fedlr.data.multilabel.load_multilabel_table",
        "scored_table": "fedlr.data.scored.load_scored_table",
        "synthetic": "fedlr.tasks.synthetic.synthetic_text",
        "synthetic_chat": "fedlr.tasks.synthetic_chat.synthetic_chat",
        "table": "fedlr.data.table.load_table",
    },
    "partition": {
        "by_file": "fedlr.data.partition.by_file",
        "by_group": "fedlr.data.partition.by_group",
        "dirichlet": "fedlr.data.partition.dirichlet",
        "dirichlet_by_label": "fedlr.data.partition.dirichlet_by_label",
        "iid": "fedlr.data.partition.iid",
    },
    "model": {
        "pretrained": "fedlr.models.network.pretrained",
        "pretrained_causal": "fedlr.models.causal.pretrained_causal",
        "pretrained_images": "fedlr.models.vision.pretrained_images",
        "tiny_random": "fedlr.models.network.tiny_random",
        "tiny_random_causal": "fedlr.models.causal.tiny_random_causal",
        "tiny_vit": "fedlr.models.vision.tiny_vit",
    },
    "task": {
        "causal_lm": "fedlr.tasks.causal_lm.causal_lm",
        "image_classification": "fedlr.tasks.image_classification.image_classification",
        "text_classification": "fedlr.tasks.text_classification.text_classification",
        "text_multilabel": "fedlr.tasks.text_multilabel.text_multilabel",
        "text_regression": "fedlr.tasks.text_regression.text_regression",
    },
    "codec": CODECS,
    "method": {
        "method": "fedlr.methods.method.Method",
    },
    "method.block_schedule": {
        "all_blocks": "fedlr.models.tuners.blocks.AllBlocks",
        "alternate": "fedlr.methods.method.Alternate",
        "always": "fedlr.methods.method.Always",
        "better_factor": "fedlr.methods.layer_choice.BetterFactor",
        "exact_blocks": "fedlr.models.tuners.blocks.ExactBlocks",
        "rotating_blocks": "fedlr.models.tuners.blocks.RotatingBlocks",
        "strongest_layers": "fedlr.methods.layer_choice.StrongestLayers",
    },
    "method.aggregate": {
        "centered_clipping": "fedlr.methods.aggregate.centered_clipping.CenteredClipping",
        "coordinate_median": "fedlr.methods.aggregate.coordinate_median.CoordinateMedian",
        "exact_residual": "fedlr.methods.aggregate.residual.ExactResidual",
        "fedadam": "fedlr.methods.aggregate.server_optimizer.FedAdam",
        "fedask": "fedlr.methods.aggregate.subspace.FedAsk",
        "fedavgm": "fedlr.methods.aggregate.server_optimizer.FedAvgM",
        "fedrot": "fedlr.methods.aggregate.rotation.FedRot",
        "fedyogi": "fedlr.methods.aggregate.server_optimizer.FedYogi",
        "geometric_median": "fedlr.methods.aggregate.geometric_median.GeometricMedian",
        "layer_mean": "fedlr.methods.aggregate.layer_mean.LayerMean",
        "lora_fair": "fedlr.methods.aggregate.fair.LoraFair",
        "lora_fair_ridge": "fedlr.methods.aggregate.fair.LoraFairRidge",
        "multi_krum": "fedlr.methods.aggregate.multi_krum.MultiKrum",
        "norm_weighted_mean": "fedlr.methods.aggregate.rank.norm_weighted_mean",
        "projected_mean": "fedlr.methods.aggregate.subspace.projected_mean",
        "scaffold": "fedlr.methods.client_rules.scaffold.ScaffoldServer",
        "scored_mean": "fedlr.methods.layer_choice.ScoredMean",
        "self_pruning": "fedlr.methods.aggregate.pruning.SelfPruning",
        "stack_and_fold": "fedlr.methods.aggregate.stacking.stack_and_fold",
        "svd_redistribution": "fedlr.methods.aggregate.rank.svd_redistribution",
        "trimmed_mean": "fedlr.methods.aggregate.trimmed_mean.TrimmedMean",
        "weighted_mean": "fedlr.methods.aggregate.mean.weighted_mean",
    },
    "method.finalise": {
        "keep": "fedlr.methods.method.keep",
        "orthonormal_rows": "fedlr.methods.method.OrthonormalRows",
        "random_directions": "fedlr.methods.finalise.random_ranks.RandomDirections",
        "rank_budget": "fedlr.methods.finalise.rank_policy.RankBudget",
        "rank_energy": "fedlr.methods.finalise.rank_policy.RankEnergy",
        "renewal": "fedlr.methods.finalise.renewal.Renewal",
        "svd_refactor": "fedlr.methods.method.SvdRefactor",
    },
    "method.broadcast": {
        "all_blocks": "fedlr.models.tuners.blocks.all_blocks",
        "full_adapter": "fedlr.methods.method.full_adapter",
        "shared_block": "fedlr.methods.client_rules.personal.SharedBlock",
        "trained_block": "fedlr.methods.method.trained_block",
    },
    "method.client": RULES,
    "trainer.optimizer": {name: name for name in OPTIMIZERS},
    "trainer.after_noise": RULES,
    "client_rule": RULES,  # method.client, as terms call it
}


def named(tree: Any) -> Any:
    """Return a configuration in which every part of the project stands under its name.

    `aggregate: weighted_mean` is short for `aggregate: {_target_: weighted_mean}`. Dotted paths that older releases
    wrote become names; any other is a user's own and stays.
    """
    return _named(tree, "")


def _named(node: Any, where: str) -> Any:
    if where in PARTS:
        if isinstance(node, str):
            name = name_of(node, where)
            return {TARGET: name} if is_part(name, where) else node
        if isinstance(node, Mapping) and node.get(TARGET) == GET_METHOD and set(node) == {TARGET, PATH}:
            name = name_of(node[PATH], where)
            return {TARGET: name} if is_part(name, where) else node
    if not isinstance(node, Mapping):
        return node
    found = {key: _named(value, dotted(where, key)) for key, value in node.items()}
    return {**found, TARGET: name_of(node[TARGET], where)} if TARGET in node and where in PARTS else found


def section_of(key: str) -> str:
    """Return the section whose part a key names: `method.aggregate` of itself, of its `_target_` and of its `path`."""
    section, _, last = key.rpartition(".")
    return section if last in (TARGET, PATH) else key


def name_of(name: Any, where: str) -> Any:
    """Return the name in a section's group of what an older release may have called otherwise."""
    new = OLD_NAMES.get(name) if isinstance(name, str) else None
    return new if is_part(new, where) else name


def is_part(name: Any, where: str) -> bool:
    """Return whether this is the name of a part of a section's group."""
    return isinstance(name, str) and name in PARTS.get(where, ())


def place_of(name: str, where: str, key: str = "") -> str:
    """Return the dotted path of a part, or of a user's own, which is its name.

    Args:
        name: as a configuration has it.
        where: the section, which says the group.
        key: the full key, for the error.

    Raises:
        InputError: for a name without a dot that the group does not have.

    >>> place_of("iid", "partition")
    'fedlr.data.partition.iid'
    """
    group = PARTS.get(where, {})
    name = name_of(name, where)
    if name in group or "." in name or ":" in name:
        return group.get(name, name)
    near = get_close_matches(name, group, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(group)}, and your own by its dotted path"
    raise InputError(f"Expected {key or where} to name a part, got {name!r}; {hint}")


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
        full = dotted(where, key) if key else where
        if where not in PARTS:
            raise InputError(f"Expected no name of a function at {full} in {source}, got {shown(name)}")
        if not isinstance(name, str) or not (is_part(name_of(name, where), where) or name in own_parts):
            how = way_out.format(name=name) if way_out else ""
            raise InputError(f"Expected {full} in {source} to be a part of fedlr, got {shown(name)}{how}")


def own_parts_of(tree: Any) -> list[str]:
    """Return the names of a tree that this table does not hold: a user's own, if he typed them."""
    found = ((name, is_part(name_of(name, where), where)) for where, _, name in named_parts(tree))
    return sorted({str(name) for name, is_ours in found if not is_ours})


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
        elif where in PARTS and isinstance(node, str):
            yield where, "", node
        elif isinstance(node, list | tuple):
            found += [(dotted(where, index), value) for index, value in enumerate(node)]
