"""A run's report as one page of HTML: no network, no script, style and plots inline, one file for phone and paper.

`write_html` takes what `Report.as_dict` gives and report.json holds. This module turns it into words and figures,
`plots.py` into geometry, and `report.html.jinja` holds all markup; Jinja escapes every value, and the page forbids
itself to load or to run anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..files import write_text
from .plots import Axis, Plot, Tick, curve, drawable, spectrum
from .report import calibration_facts

__all__ = ["write_html"]

_PHASES = {"load": "Load", "init": "Initialise", "train": "Train", "evaluate": "Evaluate", "save": "Save"}
_CURVES = (
    ("Entropy of the policy", "entropy"),
    ("KL to the reference", "kl"),
    ("Tokens of a completion", "completions/mean_length"),
    ("Training loss", "loss"),
    ("Learning rate", "learning_rate"),
)
_NAMED = 3  # changes of one kind that the summary names; the table has them all


def write_html(report: Mapping[str, Any], path: str | Path) -> None:
    """Write the page for `report` to `path`, by atomic rename.

    Args:
        report: `Report.as_dict()`, or report.json as it was read. What it lacks is left out of the page.
        path: of the HTML file.
    """
    rows = [_score(row) for row in report.get("measurements") or ()]
    heldout = report.get("heldout_loss")
    page = _template().render(
        report=report,
        summary=_summary(rows, report),
        groups=_by_role(rows, _heldout_score(heldout) if heldout else None),
        scales=_scales(rows),
        facts=_facts(report),
        calibration=calibration_facts(report.get("calibration") or {}),
        training=_training_plots(report),
        terms=_term_plots(report.get("regularizers") or {}),
        spectrum=spectrum("Singular values of what the adapter adds", report.get("singular_values") or {}),
        phases=_phases(report.get("seconds") or {}),
    )
    # a path that is not valid Unicode reaches Python as lone surrogates, which UTF-8 cannot hold
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = _duration
    return environment.get_template("report.html.jinja")


# -- scores ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Score:
    """A measurement (a perplexity or a fraction) in words; `gain` > 0 is better, 0 where no difference is shown."""

    name: str
    metric: str
    role: str
    detail: str
    before: float
    after: float
    shown: tuple[str, str, str]
    gain: float

    @property
    def sentence(self) -> str:
        """ "exact match on facts fell from 100.0% to 48.5%"."""
        return f"{self.metric} on {self.name} {_moved(self.before, self.after, *self.shown[:2])}"


def _score(row: Mapping[str, Any]) -> _Score:
    metric, before, after = row["metric"], float(row["before"]), float(row["after"])
    share = metric != "perplexity"
    if share:
        shown = (f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points")
    else:
        shown = (f"{before:,.2f}", f"{after:,.2f}", f"{after - before:+,.2f}")
    detail = f"{metric}, {row['rows']:,} rows"
    if not share and row.get("forgetting") is not None:
        detail += f", {row['forgetting']:+.3f} nats a token".replace("-", "−")
    return _Score(
        name=row["name"],
        metric=metric,
        role=row["role"],
        detail=detail,
        before=before,
        after=after,
        shown=(shown[0], shown[1], shown[2].replace("-", "−")),
        gain=0.0 if shown[0] == shown[1] else (after - before) * (1 if share else -1),
    )


def _heldout_score(losses: Mapping[str, float]) -> _Score:
    before, after = losses["before"], losses["after"]
    shown = (f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}".replace("-", "−"))
    detail = "mean training loss"
    return _Score("held-out rows", "loss", "heldout", detail, before, after, shown, before - after)


def _by_role(rows: Sequence[_Score], heldout: _Score | None) -> list[tuple[str, list[_Score]]]:
    """The table: what should rise, what should not change, and the held-out loss; empty groups are left out."""
    groups = [
        ("Tasks: should improve", [row for row in rows if row.role == "task"]),
        ("Forgetting: should not change", [row for row in rows if row.role == "forgetting"]),
        ("Held-out data: should fall", [heldout] if heldout else []),
    ]
    return [(heading, members) for heading, members in groups if members]


def _summary(rows: Sequence[_Score], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run learned and forgot, as (heading, sentence) pairs."""
    groups: dict[str, list[_Score]] = {"Learned": [], "Not learned": [], "Forgotten": [], "Kept": []}
    for row in rows:
        if row.role == "task":
            groups["Learned" if row.gain > 0 else "Not learned"].append(row)
        else:
            groups["Kept" if row.gain >= 0 else "Forgotten"].append(row)  # a score that is no number is not kept
    summary = [(heading, _listed(members)) for heading, members in groups.items() if members]
    heldout = report.get("heldout_loss")
    if not summary and heldout:
        score = _heldout_score(heldout)
        summary = [("Held-out loss", f"it {_moved(score.before, score.after, *score.shown[:2])}.")]
    if not summary:
        ending = f" to a mean loss of {report['train_loss']:.3f}" if "train_loss" in report else ""
        summary = [("Trained", f"{report.get('steps', 0):,} steps{ending}; nothing was measured before and after.")]
    return summary


def _listed(rows: Sequence[_Score]) -> str:
    more = f"; and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else ""
    return "; ".join(row.sentence for row in rows[:_NAMED]) + more + "."


def _moved(before: float, after: float, shown_before: str, shown_after: str) -> str:
    if shown_before == shown_after:
        return f"stayed at {shown_after}"
    verb = "rose" if after > before else "fell" if after < before else "went"
    return f"{verb} from {shown_before} to {shown_after}"


@dataclass(frozen=True)
class _Scale:
    """Scores of one metric on one axis; each row is (score, place before, place after), in percent."""

    heading: str
    rows: list[tuple[_Score, float, float]]
    ticks: list[Tick]


def _scales(rows: Sequence[_Score]) -> list[_Scale]:
    """One axis a metric: 0 to 100%, but perplexity from 1 and logarithmic, so that a length is a loss."""
    scales: list[_Scale] = []
    for metric in dict.fromkeys(row.metric for row in rows):
        members = [row for row in rows if row.metric == metric and len(drawable([(row.before, row.after)]))]
        if metric != "perplexity":
            heading, axis = f"{metric[:1].upper()}{metric[1:]}, higher is better", Axis(0.0, 1.0)
            ticks = [Tick(place, f"{place:.0f}%") for place in (0, 25, 50, 75, 100)]
        else:
            highest = max((value for row in members for value in (row.before, row.after)), default=1.0)
            heading, axis = "Perplexity, lower is better (log scale)", Axis(1.0, max(highest * 1.05, 1.5), log=True)
            ticks = list(axis.ticks(4))
        if members:
            rows_on_axis = [(row, axis.place(row.before), axis.place(row.after)) for row in members]
            scales.append(_Scale(heading, rows_on_axis, ticks))
    return scales


# -- training, cost -------------------------------------------------------------------------------------------


def _training_plots(report: Mapping[str, Any]) -> list[Plot]:
    lines = report.get("losses") or ()
    rewards = [key for key in dict.fromkeys(key for line in lines for key in line) if key.startswith("rewards/")]
    parts = [(f"Reward {key.split('/', 1)[1].removesuffix('/mean')}", key) for key in rewards] if rewards[1:] else []
    plots = [
        curve(name, [(line["step"], line[key]) for line in lines if key in line])
        for name, key in (("Reward", "reward"), *parts, *_CURVES)
    ]
    return [plot for plot in plots if plot]


def _term_plots(terms: Mapping[str, Sequence[Sequence[float]]]) -> list[Plot]:
    """One small plot a regulariser; the more there are, the coarser, so that the page stays small."""
    bins = max(20, min(150, 3000 // max(len(terms), 1)))
    plots = [curve(name, points, bins=bins) for name, points in terms.items()]
    return [plot for plot in plots if plot]


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The run at a glance: at most four figures."""
    facts = []
    if "steps" in report:
        facts.append(("steps", f"{report['steps']:,}"))
    if "total" in (report.get("seconds") or {}):
        facts.append(("in all", _duration(report["seconds"]["total"])))
    if report.get("total_parameters"):
        facts.append(("parameters trained", f"{report['trainable_parameters'] / report['total_parameters']:.2%}"))
    if "rank" in report:
        facts.append(("rank of the adapter", f"{report['rank']:,}"))
    return facts


def _phases(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(phase, seconds, percent of the whole), and what no phase accounts for."""
    total = seconds.get("total") or sum(seconds.values())
    if not total:
        return []
    split = {_PHASES.get(name, name): value for name, value in seconds.items() if name != "total"}
    order = {label: place for place, label in enumerate(_PHASES.values())}
    phases = sorted(split.items(), key=lambda item: order.get(item[0], len(order)))
    rest = total - sum(split.values())
    if rest > 0.005 * total:
        phases.append(("Rest", rest))
    return [(label, value, 100 * value / total) for label, value in phases]


def _duration(seconds: float) -> str:
    """ "17.9 s", "2 min 3 s" or "1 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"
