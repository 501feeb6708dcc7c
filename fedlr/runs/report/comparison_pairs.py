"""Runs against those of one method, pair by pair: the mean difference in accuracy and its paired interval.

A pair is two runs of one task and one seed: the same split, clients, cohorts and starting weights, so most of what
differs from seed to seed cancels in the difference. What makes a task has to agree: data, partition, model, size of the
federation, and all of privacy but the clip. What makes an arm may differ, and is told: method, adapter, trainer, clip,
runtime, the server's momentum, how many models are averaged. Where a task holds several arms of the reference (two
learning rates, say), a run is paired with the one that agrees with it in what they differ in.

Source of the interval: Student 1908; the differences of n seeds are n values, whatever the runs have in common.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedlr.errors import InputError
from fedlr.runs.report.comparison_arms import Interval, group_name, label_of, mean_interval, settings_of
from fedlr.runs.report.run_files import Run

ARM_SECTIONS = ("method", "adapter", "trainer", "runtime")  # of a configuration; the rest of it makes the task
ARM_KEYS = (
    "privacy.max_grad_norm",
    "server_momentum",
    "server_lr_schedule",
    "server_warmup_rounds",
    "average_last",
    "release",
    "patience",
)
MOST_NAMED = 3  # runs in a message

Settings = Mapping[str, str]


@dataclass(frozen=True)
class PairedArm:
    """One arm in one task, against the reference.

    Args:
        label: the method, and what else sets it apart from the reference or from its namesakes.
        task: the data, and what else sets the task apart from other tasks of the same privacy; may be empty.
        privacy: as in `group_name`.
        seeds: of the pairs, ascending.
        own: final accuracy by pair, in the order of `seeds`; a seed that was run twice counts with its mean.
        reference: that of the partners.
    """

    label: str
    task: str
    privacy: str
    seeds: tuple[int, ...]
    own: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def differences(self) -> list[float]:
        """Accuracy over the partner's, a pair: positive where the arm is better."""
        return [mine - theirs for mine, theirs in zip(self.own, self.reference, strict=True)]

    @property
    def interval(self) -> Interval:
        """The mean difference with its 95 % confidence interval; no interval of one pair."""
        return mean_interval(self.differences)


@dataclass(frozen=True)
class _Told:
    """A run with its configuration, split into what makes its task and what makes its arm."""

    run: Run
    task: Settings
    arm: Settings

    @property
    def seed(self) -> int:
        if self.run.summary.seed is None:
            raise InputError(f"Expected runs with a seed to pair them by, got one of {self.run.summary.method} without")
        return self.run.summary.seed


@dataclass(frozen=True)
class _Sides:
    """The runs of one task: those of the reference, the arms of other methods, and for each arm its partners."""

    against: str
    references: Sequence[_Told]
    arms: Sequence[Sequence[_Told]]
    partners: Sequence[Sequence[_Told]]


@dataclass(frozen=True)
class TaskArms:
    """All arms of one task at one level of privacy, by label: what may stand in one column of a table."""

    task: str
    privacy: str
    by_label: Mapping[str, Sequence[Run]]


def arms_by_task(runs: Iterable[Run]) -> list[TaskArms]:
    """Return the arms of every task; one arm has one label in all of them."""
    tasks: dict[str, list[_Told]] = defaultdict(list)
    arms: dict[str, Settings] = {}
    for run in runs:
        told = _told(run)
        tasks[_key(told.task)].append(told)
        arms[_key(told.arm)] = told.arm
    labels = {}
    for key, arm in arms.items():
        apart = _differing([other for other in arms.values() if other["method"] == arm["method"]])
        labels[key] = label_of(arm["method"], arm, sorted(apart))
    names = _task_names({key: members[0] for key, members in tasks.items()})
    found = []
    for key, members in tasks.items():
        by_label: dict[str, list[Run]] = defaultdict(list)
        for told in members:
            by_label[labels[_key(told.arm)]].append(told.run)
        found.append(TaskArms(names[key], group_name(members[0].run), by_label))
    return found


def paired_arms(runs: Iterable[Run], *, against: str) -> list[PairedArm]:
    """Return every arm of another method in every task, paired by seed with the runs of `against`.

    Sorted by task, label and privacy.

    Raises:
        InputError: there is no run of `against` or of another method, `against` has several configurations, a run has
            no seed, or no partner; the message names what is missing.
    """
    tasks: dict[str, list[_Told]] = defaultdict(list)
    for run in runs:
        told = _told(run)
        tasks[_key(told.task)].append(told)
    everything = [told for members in tasks.values() for told in members]
    methods = sorted({told.run.summary.method for told in everything})
    if against not in methods or len(methods) < 2:
        raise InputError(
            f"Expected runs of {against!r} and of another method to pair with --against {against}, "
            f"got only {', '.join(methods) or 'none'}"
        )
    names = _task_names({key: members[0] for key, members in tasks.items()})
    sides = {key: _sides(members, against=against) for key, members in tasks.items()}
    if missing := [
        f"{text}{names[key] and f', {names[key]}'}" for key, side in sides.items() for text in _missing(side)
    ]:
        more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        raise InputError(
            f"Expected pairs that share seed, data, partition, model, federation and privacy, got "
            f"{'; '.join(missing[:MOST_NAMED])}{more}; run what is missing, or leave its partner out"
        )
    found = [arm for key, side in sides.items() for arm in _arms_of_task(side, task=names[key])]
    return sorted(found, key=lambda arm: (arm.task, arm.label, arm.privacy))


def _sides(members: Sequence[_Told], *, against: str) -> _Sides:
    references = [told for told in members if told.run.summary.method == against]
    apart = _differing([told.arm for told in references])
    arms: dict[str, list[_Told]] = defaultdict(list)
    for told in members:
        if told.run.summary.method != against:
            arms[_key(told.arm)].append(told)
    if own := sorted(filter(_is_method, apart)):
        raise InputError(
            f"Expected one configuration of {against} to pair with, got runs that differ in "
            f"{', '.join(own[:MOST_NAMED])}; compare with one at a time"
        )
    partners = [
        [one for one in references if all(one.arm.get(k) == arm[0].arm.get(k) for k in apart)] for arm in arms.values()
    ]
    return _Sides(against, references, list(arms.values()), partners)


def _missing(sides: _Sides) -> list[str]:
    """Name each run without a partner: what is left out of a mean must not be left out in silence."""
    missing = []
    for arm, partners in zip(sides.arms, sides.partners, strict=True):
        missing += [(sides.against, told) for told in _without(arm, partners)]
        missing += [(arm[0].run.summary.method, told) for told in _without(partners, arm)]
    paired = {id(told) for partners in sides.partners for told in partners}
    missing += [("other method", told) for told in sides.references if id(told) not in paired]
    return [
        f"no {method} for {told.run.summary.method}, seed {told.seed}, {group_name(told.run)}"
        for method, told in missing
    ]


def _arms_of_task(sides: _Sides, *, task: str) -> list[PairedArm]:
    namesakes, apart = [arm[0] for arm in sides.arms], _differing([told.arm for told in sides.references])
    return [
        _paired(arm, partners, task=task, label=_label(arm[0], partners[0], namesakes, apart))
        for arm, partners in zip(sides.arms, sides.partners, strict=True)
    ]


def _without(some: Iterable[_Told], others: Iterable[_Told]) -> list[_Told]:
    seeds = {told.seed for told in others}
    return [told for told in some if told.seed not in seeds]


def _paired(arm: Sequence[_Told], partners: Sequence[_Told], *, task: str, label: str) -> PairedArm:
    own, reference = _by_seed(arm), _by_seed(partners)
    return PairedArm(
        label,
        task,
        group_name(arm[0].run),
        tuple(own),
        tuple(own.values()),
        tuple(reference[seed] for seed in own),
    )


def _by_seed(members: Iterable[_Told]) -> dict[int, float]:
    """Return the mean accuracy of each seed, ascending."""
    found: dict[int, list[float]] = defaultdict(list)
    for told in members:
        found[told.seed].append(told.run.summary.final_score)
    return {seed: fmean(found[seed]) for seed in sorted(found)}


def _told(run: Run) -> _Told:
    everything = settings_of(run)
    is_arm = {key: key.partition(".")[0] in ARM_SECTIONS or key in ARM_KEYS for key in everything}
    return _Told(
        run,
        {key: value for key, value in everything.items() if not is_arm[key]} | {"privacy": group_name(run)},
        {key: value for key, value in everything.items() if is_arm[key]} | {"method": run.summary.method},
    )


def _label(told: _Told, partner: _Told, namesakes: Sequence[_Told], apart: Iterable[str]) -> str:
    """Return the method, with what it differs in from its partner, and its partners and namesakes from each other."""
    same = [one.arm for one in namesakes if one.run.summary.method == told.run.summary.method]
    differ = {key for key in _differing([told.arm, partner.arm]) if not _is_method(key)}
    return label_of(
        told.run.summary.method, told.arm, sorted(differ | set(apart) | set(filter(_is_method, _differing(same))))
    )


def _task_names(tasks: Mapping[str, _Told]) -> dict[str, str]:
    """Return what sets each task apart from the others, privacy aside; nothing where they share all of it."""
    plain = {
        key: {k: v for k, v in told.task.items() if k != "privacy" and k != "privacy.epsilon"}
        for key, told in tasks.items()
    }
    apart = sorted(_differing(list(plain.values())))
    return {key: label_of("", told, apart).strip(" ()") for key, told in plain.items()}


def _is_method(key: str) -> bool:
    return key.partition(".")[0] == "method"


def _differing(some: Sequence[Settings]) -> set[str]:
    return {key for key in {k for one in some for k in one} if len({one.get(key) for one in some}) > 1}


def _key(settings: Settings) -> str:
    return repr(sorted(settings.items()))
