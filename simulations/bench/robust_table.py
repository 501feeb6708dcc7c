"""The table and the picture of `fedlr bench robust`, from what was played."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from fedlr.runs.report.picture import Picture, drawn
from fedlr.runs.report.svg import SERIES, colour, legend
from fedlr.simulations.bench.outcome import Outcome

CLEAN = "none"
IID, SKEWED, PRIVATE = "iid", "skewed", "skewed, epsilon 6"
ALL = -1.0  # in place of a share: the worst over all


@dataclass(frozen=True)
class Played:
    """One run: the setting, who attacked how, under which rule, and what came of it."""

    attack: str
    accuracy: float
    honest_left_out: float  # share of the honest updates, over all rounds
    hostile_left_out: float | None  # of the hostile ones; None: there were none
    setting: str = ""
    rule: str = ""
    share: float = 0.0  # of clients, hostile
    seed: int = 0


def read_played(outcome: Outcome) -> list[Played]:
    """Return the runs of a result."""
    return [Played(**one) for one in outcome.raw.get("played", [])]


def table(played: Sequence[Played]) -> str:
    """Return one block of aligned text for each setting: accuracy in percent by attack and share, a column a rule, and
    below it the honest updates that were left out."""
    blocks = []
    for setting in dict.fromkeys(one.setting for one in played):
        rows = setting_rows([one for one in played if one.setting == setting])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        blocks.append("\n".join([f"{setting}: accuracy in percent", *lines]))
    return "\n\n".join(blocks)


def table_markdown(played: Sequence[Played]) -> str:
    """Return the same blocks as Markdown."""
    blocks = []
    for setting in dict.fromkeys(one.setting for one in played):
        head, *rows = setting_rows([one for one in played if one.setting == setting])
        lines = [head, tuple("---" for _ in head), *rows]
        table_lines = "\n".join("| " + " | ".join(row) + " |" for row in lines)
        blocks.append(f"**{setting[:1].upper()}{setting[1:]}**, accuracy in percent:\n\n{table_lines}")
    return "\n\n".join(blocks)


def setting_rows(played: Sequence[Played]) -> list[tuple[str, ...]]:
    """Return the header and the rows of one setting; means over seeds."""
    names = list(dict.fromkeys(one.rule for one in played))
    rows = [("attack", "hostile", *names)]
    for attack, share in dict.fromkeys((one.attack, one.share) for one in played):
        runs = [one for one in played if (one.attack, one.share) == (attack, share)]
        rows.append((attack, f"{share:.0%}", *(f"{100 * accuracy_of(runs, name):.1f}" for name in names)))
    worst = [min(100 * accuracy_of_arm(played, name, arm) for arm in arms(played)) for name in names]
    rows.append(("worst", "", *(f"{value:.1f}" for value in worst)))
    rows.append(("honest left out", "0%", *(_percent(played, name, attacked=False) for name in names)))
    rows.append(("honest left out", "attacked", *(_percent(played, name, attacked=True) for name in names)))
    return rows


def arms(played: Sequence[Played]) -> list[tuple[str, float]]:
    """Return the attacks with their shares, in the order in which they were played."""
    return list(dict.fromkeys((one.attack, one.share) for one in played))


def accuracy_of_arm(played: Sequence[Played], rule: str, arm: tuple[str, float]) -> float:
    """Return the mean accuracy of a rule against one attack and share."""
    return accuracy_of([one for one in played if (one.attack, one.share) == arm], rule)


def accuracy_of(played: Sequence[Played], rule: str) -> float:
    """Return the mean accuracy of a rule's runs."""
    return fmean(one.accuracy for one in played if one.rule == rule)


def _percent(played: Sequence[Played], rule: str, *, attacked: bool) -> str:
    """Return the honest updates that were left out; nothing for rules that weigh no update, if none was rejected."""
    found = [one.honest_left_out for one in played if one.rule == rule and (one.attack != CLEAN) == attacked]
    return f"{100 * fmean(found):.1f}"


def robust_picture(outcome: Outcome) -> Picture:
    """One panel a setting, one line a rule: its accuracy under the attack that is worst for it, by hostile share."""
    played = read_played(outcome)
    settings = [s for s in (IID, SKEWED) if any(one.setting == s for one in played)]
    names = list(dict.fromkeys(one.rule for one in played))
    markers = ("x", "o", "s", "^", "D", "v", "P")

    def paint(figure: Figure) -> None:
        panels: Any = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
        for axes, setting in zip(panels, settings, strict=True):
            runs = [one for one in played if one.setting == setting]
            shares = sorted({one.share for one in runs})
            for number, name in enumerate(names):
                worst = [min(accuracy_of_arm(runs, name, arm) for arm in arms(runs) if arm[1] == s) for s in shares]
                axes.plot(
                    [100 * share for share in shares],
                    [100 * value for value in worst],
                    color=colour("grey" if number == 0 else SERIES[number - 1]),
                    linestyle="--" if number == 0 else "-",
                    marker=markers[number % len(markers)],
                    label=name,
                )
            axes.set_title(f"Clients {setting}")
            axes.set_xticks([100 * share for share in shares])
            axes.set_xlabel("hostile clients, %")
        panels[0].set_ylabel("accuracy under the worst attack, %")
        legend(figure, panels[0], columns=4)

    title = "What hostile clients can do, by rule"
    caption = "A line is the accuracy of one rule under the attack that is worst for it; at 0 % nobody attacks."
    if not settings:
        return Picture("robustness", title, "Nothing was measured.")
    return drawn("robustness", title, caption, paint, is_wide=True, height_in=4.2)
