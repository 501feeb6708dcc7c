"""What hostile clients do to a federation under each rule: accuracy, and honest clients that are left out. No clock.

Real sentences, a frozen encoder and a head that trains (`method=head`), clients that all take part in every round. The
hostile ones are a public draw (`fedlr.simulations.attacks`), and know all that honest clients send. Every rule that is
told how many they are is told the largest share of the table, however many there are. With privacy each client noises
its own steps as ever, calibrated for one run; rules see noised updates, and cost no epsilon. Nobody is charged for the
many runs over the same public rows: nothing of them is released.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.methods.aggregate.centered_clipping import CenteredClipping
from fedlr.methods.aggregate.coordinate_median import CoordinateMedian
from fedlr.methods.aggregate.geometric_median import GeometricMedian
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.multi_krum import MultiKrum
from fedlr.methods.aggregate.trimmed_mean import TrimmedMean
from fedlr.methods.method import Aggregator
from fedlr.rounds.evaluate import Evaluator
from fedlr.rounds.outlying import MAX_UPDATE_RATIO
from fedlr.rounds.round import ClientPool, RoundDiagnostics, ServerState
from fedlr.simulations.attacks.bad_clients import bad_clients
from fedlr.simulations.attacks.labels import with_flipped_labels
from fedlr.simulations.attacks.library import ATTACKS
from fedlr.simulations.attacks.pool import AttackedPool
from fedlr.simulations.audit.probe import Unmetered
from fedlr.simulations.bench.outcome import Measure, Outcome
from fedlr.simulations.bench.robust_table import CLEAN, IID, PRIVATE, SKEWED, Played, table
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.choosing import evaluator_of
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.rounds import rounds_of
from fedlr.simulations.runtime import pool_here
from fedlr.streams import Purpose, stream

SENTENCES = Path(".assets/vader.csv")
SHARES = (0.1, 0.2, 0.3)
OF_PRIVATE_RUNS = 0.2  # hostile clients, with privacy
ALPHA = 0.3  # of the Dirichlet, where clients are skewed
ONE_FACTOR = ("gauge",)  # attacks that are none where a head alone trains
HALF = 0.5  # of an equal share, below which an update counts as left out


@dataclass(frozen=True)
class Rule:
    """An aggregator, and the bound on updates before it."""

    aggregate: Aggregator
    max_update_ratio: float | None = MAX_UPDATE_RATIO


@dataclass(frozen=True)
class Setting:
    """One federation of the table."""

    name: str
    words: tuple[str, ...]
    shares: tuple[float, ...]


def rules(num_malicious: int) -> dict[str, Rule]:
    """Return the rules of the table by name; the first has no bound on updates, and is the control."""
    return {
        "mean, no bound": Rule(weighted_mean, None),
        "mean": Rule(weighted_mean),
        "median": Rule(CoordinateMedian()),
        "trimmed mean": Rule(TrimmedMean(num_malicious)),
        "multi-Krum": Rule(MultiKrum(num_malicious)),
        "geometric median": Rule(GeometricMedian()),
        "centered clipping": Rule(CenteredClipping()),
    }


def run(settings: Settings) -> Outcome:
    """Play every attack against every rule."""
    num_clients = settings.pick(tiny=5, quick=10, full=20)
    seeds = range(settings.seed, settings.seed + settings.pick(tiny=1, quick=1, full=3))
    played: list[Played] = []
    for seed in seeds:
        for setting in _settings(settings, num_clients=num_clients, seed=seed):
            federation = assemble(compose_experiment(list(setting.words)), seed=seed)
            settings.say(f"  {setting.name}, seed {seed}: {len(federation.clients)} clients")
            for one in play(federation, setting, tiny=settings.size == "tiny"):
                played.append(replace(one, seed=seed))
    settings.say(table(played))
    return Outcome(
        "robust",
        measures=_measures(played),
        setting={
            "clients": num_clients,
            "seeds": list(seeds),
            "alpha": ALPHA,
            "overrides": _words(settings, num_clients),
        },
        raw={"played": [asdict(one) for one in played]},
    )


def play(federation: Federation, setting: Setting, *, tiny: bool = False) -> Iterator[Played]:
    """Yield how every rule fares against every attack, and without one."""
    e = federation.experiment
    told = rules(round(max(SHARES) * e.num_clients) if not tiny else 1)
    attacks = ("replacement",) if tiny else [name for name in ATTACKS if name not in ONE_FACTOR]
    arms = [(CLEAN, 0.0), *((attack, share) for attack in attacks for share in setting.shares)]
    evaluator = evaluator_of(federation)
    with ExitStack() as stack:
        pools: dict[tuple[int, ...], ClientPool] = {}
        for attack, share in arms:
            bad = bad_clients(seed=federation.seed, num_clients=e.num_clients, share=share)
            flipped = tuple(sorted(bad)) if attack != CLEAN and ATTACKS[attack].flips_labels else ()
            if flipped not in pools:
                num_labels = len(federation.label_names)
                clients = with_flipped_labels(federation.clients, flipped, num_labels=num_labels)
                ledger = None if federation.budget is None else Unmetered()
                pools[flipped] = stack.enter_context(closing(pool_here(replace(federation, clients=clients), ledger)))
            for name, rule in told.items():
                found = one_run(federation, pools[flipped], evaluator, rule, attack=attack, bad=bad)
                yield replace(found, setting=setting.name, rule=name, share=share)


def one_run(
    federation: Federation, pool: ClientPool, evaluator: Evaluator, rule: Rule, *, attack: str, bad: frozenset[int]
) -> Played:
    """Train under one rule and one attack; return the last model's accuracy and who was left out."""
    e, start = federation.experiment, federation.start.adapter
    craft = ATTACKS[attack].craft if attack != CLEAN else None
    attacked = AttackedPool(pool, craft=craft, bad=bad, enrolled=start, seed=federation.seed)
    trained = replace(
        federation,
        method=replace(federation.method, aggregate=rule.aggregate),
        experiment=e.model_copy(update={"max_update_ratio": rule.max_update_ratio}),
    )
    before, state = federation.start, federation.start
    honest, lost, hostile, stopped = 0, 0, 0, 0
    for state, diagnostics in rounds_of(trained, federation.start, attacked):
        out = left_out(rule.aggregate, before, attacked, diagnostics)
        asked = {update.client_id for update in attacked.sent}
        honest, lost = honest + len(asked - bad), lost + len(out - bad)
        hostile, stopped = hostile + len(asked & bad), stopped + len(out & bad)
        before = state
    evaluation, _ = evaluator.score(state)
    return Played(
        attack=attack,
        accuracy=evaluation.accuracy,
        honest_left_out=lost / honest if honest else 0.0,
        hostile_left_out=stopped / hostile if hostile else None,
    )


def left_out(
    aggregate: Aggregator, before: ServerState, pool: AttackedPool, diagnostics: RoundDiagnostics
) -> frozenset[int]:
    """Return the clients whose updates had no say in a round, or less than half of an equal one: those that the round
    rejected, and those to whom a rule that weighs updates gave so little. Rules of single numbers weigh no update."""
    used = [update for update in pool.sent if update.client_id in diagnostics.trained]
    out = {update.client_id for update in pool.sent} - set(diagnostics.trained)
    weigh = getattr(aggregate, "coefficients", None)
    if used and weigh is not None:
        weights = weigh(before.adapter, used)
        equal = sum(weights) / len(weights)
        out |= {u.client_id for u, weight in zip(used, weights, strict=True) if weight < HALF * equal}
    return frozenset(out)


def _settings(settings: Settings, *, num_clients: int, seed: int) -> list[Setting]:
    words = (*_words(settings, num_clients), f"seed={seed}")
    if settings.size != "tiny":
        words = (*words, f"data.path={_sentences(settings)}", f"runtime.cache_dir={settings.scratch / 'features'}")
    skewed = ("partition=dirichlet", f"partition.alpha={ALPHA}")
    private = ("privacy.epsilon=6.0", "privacy.accountant=rdp", "privacy.max_grad_norm=0.5")
    shares = (0.2,) if settings.size == "tiny" else SHARES
    found = [
        Setting(IID, (*words, "name=iid", "partition=iid", "privacy=none"), shares),
        Setting(SKEWED, (*words, "name=skewed", *skewed, "privacy=none"), shares),
        Setting(PRIVATE, (*words, "name=private", *skewed, *private), (OF_PRIVATE_RUNS,)),
    ]
    return found[:1] if settings.size == "tiny" else found


def _words(settings: Settings, num_clients: int) -> tuple[str, ...]:
    num_rounds = settings.pick(tiny=1, quick=8, full=12)
    shared = (
        "method=head",
        f"num_clients={num_clients}",
        f"cohort_size={num_clients}",
        f"num_rounds={num_rounds}",
        f"privacy.max_participations={num_rounds}",
        "trainer.sample_rate=1.0",
        "trainer.num_steps=1",
        "trainer.check_parity=false",
        "adapter.train_head=true",
    )
    if settings.size == "tiny":
        toy = ("model=tiny", "data=synthetic", "data.num_examples=120", "data.num_test=40", "trainer.optimizer.lr=1.0")
        return (*toy, "trainer.divisor=16", *shared)
    num_rows = settings.pick(tiny=0, quick=1500, full=6000)
    trained = (f"trainer.divisor={num_rows / num_clients:g}", "trainer.optimizer.lr=16.0")
    return ("data=vader", "data.num_test=500", "runtime.cache_prefix=true", *trained, *shared)


def _sentences(settings: Settings) -> Path:
    """Write a public draw of the sentences, so that the encoder reads no more of them than are needed."""
    if not SENTENCES.is_file():
        raise InputError(f"Expected {SENTENCES}, got no such file; fetch it: python -m fedlr.simulations.assets")
    with SENTENCES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    number = settings.pick(tiny=0, quick=2000, full=6500)
    chosen = stream(0, Purpose.DATA).permutation(len(rows))[:number]
    path = settings.scratch / "sentences.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[place] for place in sorted(chosen))
    return path


def _measures(played: Sequence[Played]) -> tuple[Measure, ...]:
    """Return, of each setting and rule, the accuracy without an attack and the lowest over attacks and shares."""
    groups: dict[tuple[str, str], list[Played]] = {}
    for one in played:
        groups.setdefault((one.setting, one.rule), []).append(one)
    measures = []
    for (setting, rule), runs in groups.items():
        clean = tuple(one.accuracy for one in runs if one.attack == CLEAN)
        worst: Mapping[int, float] = {
            seed: min(one.accuracy for one in runs if one.seed == seed) for seed in {one.seed for one in runs}
        }
        measures.append(Measure(f"robust {setting} / {rule}", f"{setting}, {rule}: accuracy, no attack", clean))
        text = f"{setting}, {rule}: accuracy, worst attack"
        measures.append(Measure(f"robust worst {setting} / {rule}", text, tuple(worst.values())))
    return tuple(measures)
