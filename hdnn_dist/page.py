"""Runs as one HTML page that needs nothing else to be read, with its figures as PNG beside it.

`hdnn_dist.figures` and `hdnn_dist.drawing` draw, `page.html` is the page's template. Several runs
stand side by side.
"""

from __future__ import annotations

import base64
import io
import math
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import Environment, StrictUndefined
from matplotlib.image import imsave
from pydantic import TypeAdapter, ValidationError

from hdnn_dist import __version__, drawing, figures
from hdnn_dist.agent import scores_of
from hdnn_dist.api import open_run
from hdnn_dist.check import Report, examine, this_machine
from hdnn_dist.checkpoint import latest_checkpoint
from hdnn_dist.console import duration, scores, size
from hdnn_dist.data import (
    classes_of,
    load_features,
    load_labels,
    load_targets,
    target_moments,
)
from hdnn_dist.errors import UserError, on_a_line
from hdnn_dist.figures import Chart, Curve
from hdnn_dist.job import Job
from hdnn_dist.metrics import read_metrics
from hdnn_dist.reader import dump_spec
from hdnn_dist.report import of_agents
from hdnn_dist.run import check_can_be_made, differences, reopen
from hdnn_dist.storage import Place, Where, place, write
from hdnn_dist.trainer import Summary, read_summary
from hdnn_dist.worker import Times

MOST = 8  # runs side by side
MANY = 24  # keys in which specs differ, more of which are folded up
BSM_SAMPLES = 4
_TIMES = TypeAdapter(list[Times])  # as records have them


@dataclass(frozen=True)
class Wrong:
    """A test sample to which the agents gave its class little probability.

    Attributes:
        index: in the test set.
        label, taken: what its class is called, and the one that it is taken for.
        share, believed: the probabilities of these.
        picture: as a PNG data URI; None for what is no image.
        values: of its features, where it is no image.
    """

    index: int
    label: str
    taken: str
    share: float
    believed: float
    picture: str | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Fit:
    """What was predicted of the test set's targets, `(B, C)` in their units.

    Attributes:
        true: what they are.
        predicted: what the agents say.
        rmse: of standardised errors, by agent where each reads out its own, else by target.
    """

    true: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.float64]
    rmse: dict[str, float]


@dataclass(frozen=True)
class Share:
    """Where an agent was, and what a training step was to it.

    Attributes:
        actor: its number.
        node: its machine; empty for one process.
        seconds: of `figures.PARTS` in a step (see `Times.a_step`).
    """

    actor: int
    node: str
    seconds: tuple[float, float, float]


@dataclass(frozen=True)
class Shown:
    """A run as the page shows it.

    Attributes:
        number: from 1, in the order given.
        run: where it is.
        job: of its latest checkpoint.
        step: that this has taken.
        state: the digest of what its states belong to.
        summary: None if the run is not at its end.
        told: what can be said of the job (see `hdnn_dist.check`).
        records: its metrics.
        loss, scores: of the checkpoint, on the test set (see `hdnn_dist.agent.scores_of`).
        counts: test samples by class and by the class they were taken for; None of targets.
        worst: those whose class was least believed.
        fit: of targets.
        bsm: see `hdnn_dist.report.of_agents`; None if it was not measured.
        shares: by agent, if there is a record of it.
    """

    number: int
    run: str
    job: Job
    step: int
    state: str
    summary: Summary | None
    told: Report
    records: list[dict[str, Any]]
    loss: float
    scores: dict[str, float]
    counts: npt.NDArray[np.int64] | None
    worst: list[Wrong]
    fit: Fit | None
    bsm: dict[str, Any] | None
    shares: dict[str, Share]

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        return f"{self.job.topology.name} learns {self.job.data.name}"

    @property
    def label(self) -> str:
        """For legends and headings, where several runs are shown."""
        return f"{self.number}: {on_a_line(self.run.rstrip('/').rpartition('/')[2])[:40]}"

    @property
    def spec(self) -> str:
        """The resolved spec."""
        return dump_spec(self.job.spec)

    @property
    def regrouped(self) -> list[str]:
        """When agents left or joined."""
        return [
            f"step {record['step']}: left {_few(record.get('left'))}; "
            f"joined {_few(record.get('joined'))}"
            for record in self.records
            if record.get("kind") == "agents"
        ]


def write_page(
    runs: Sequence[Where],
    *,
    out: Where | None = None,
    worst: int = 12,
    bsm: bool = True,
    overrides: Sequence[str] = (),
    local: bool = False,
    address: str | None = None,
) -> Place:
    """Write the page of some runs, and its figures as PNG files.

    The agents classify the test set, or predict its targets, and with `bsm` measure their
    sensitivities as for `analyze`. The labels of the test set, and whole inputs of the
    worst-classified samples, are read here and are on the page.

    Args:
        runs: run directories, at most `MOST`.
        out: the folder; default: `report` in the run directory, or where there are several, here.
        worst: how many of the worst-classified samples are shown; 0 reads no input.
        bsm: whether backward sensitivities are measured.
        overrides: as for `hdnn_dist.open_run`.
        local: as for `hdnn_dist.open_run`.
        address: as for `hdnn_dist.open_run`.

    Returns:
        The page.

    Raises:
        UserError: no runs or too many, or the folder cannot be made.
        CheckpointError: a run or its checkpoint cannot be used.
    """
    if not 1 <= len(runs) <= MOST:
        raise UserError(f"{len(runs)} runs to compare", f"give 1 to {MOST}")
    places = [place(run) for run in runs]
    for run in places:
        reopen(run, overrides)  # all are looked at before the first is opened
    folder = place(out) if out is not None else _default(places)
    check_can_be_made(folder, "--out")
    shown = [
        _look(k, run, worst, bsm, overrides, local, address) for k, run in enumerate(places, 1)
    ]
    sections = _sections(shown)
    for _, charts, _ in sections:
        for chart in charts:
            write(folder / f"{chart.name}.png", chart.png)
    page = folder / "report.html"
    write(page, _render(shown, sections).encode())
    return page


def _default(runs: Sequence[Place]) -> Place:
    return runs[0] / "report" if len(runs) == 1 else place("report")


# --- from run directories to numbers -------------------------------------------------------------


def _look(
    number: int,
    run: Place,
    worst: int,
    bsm: bool,
    overrides: Sequence[str],
    local: bool,
    address: str | None,
) -> Shown:
    with open_run(run, overrides=overrides, local=local, address=address) as (runner, step):
        job = runner.job
        predicted = runner.predict("test").astype(np.float64)
        measured = of_agents(runner, min(BSM_SAMPLES, job.data.test)) if bsm else None
    records = read_metrics(run)
    verdict = (
        _of_targets(job, predicted) if job.data.targets else _of_classes(job, predicted, worst)
    )
    return Shown(
        number=number,
        run=str(run),
        job=job,
        step=step,
        state=latest_checkpoint(run)[1].state,
        summary=read_summary(run, step),
        told=examine(job, [this_machine()]),
        records=records,
        bsm=measured,
        shares=_shares(records, job),
        **verdict,
    )


def _of_classes(job: Job, probabilities: npt.NDArray[np.float64], worst: int) -> dict[str, Any]:
    labels = load_labels(job.spec.data, "test")
    taken = probabilities.argmax(1)
    believed = probabilities[np.arange(len(labels)), labels]
    counts = np.zeros((job.data.classes, job.data.classes), np.int64)
    np.add.at(counts, (labels, taken), 1)
    least = np.argsort(believed, kind="stable")[:worst]
    return {
        "loss": float(-np.log(np.maximum(believed, 1e-45)).mean()),
        "scores": {"accuracy": float((taken == labels).mean())},
        "counts": counts,
        "worst": list(_wrong(job, least, labels, taken, probabilities)) if worst else [],
        "fit": None,
    }


def _of_targets(job: Job, predicted: npt.NDArray[np.float64]) -> dict[str, Any]:
    names, architecture = job.data.targets, job.architecture
    mean, std = target_moments(job.spec.data, names)
    standard = load_targets(job.spec.data, "test", names).astype(np.float64)
    true = mean + std * standard
    square = ((predicted - true) / std) ** 2
    loss, variance = float(square.mean()), float((standard**2).mean())
    if architecture.own is None:
        rmse = {name: float(square[:, k].mean() ** 0.5) for k, name in enumerate(names)}
    else:
        rmse = {
            architecture.names[i]: float(square[:, list(own)].mean() ** 0.5)
            for i, own in enumerate(architecture.own)
            if own
        }
    squares = float(((predicted - true) ** 2).mean())
    return {
        "loss": loss,
        "scores": scores_of(loss, None, squares, variance),
        "counts": None,
        "worst": [],
        "fit": Fit(true, predicted, rmse),
    }


def _wrong(
    job: Job,
    least: npt.NDArray[np.intp],
    labels: npt.NDArray[np.int64],
    taken: npt.NDArray[np.intp],
    probabilities: npt.NDArray[np.float64],
) -> Iterator[Wrong]:
    image, classes = job.data.image, classes_of(job.spec.data)
    x_BF = load_features(job.spec.data, "test", range(job.data.features))
    for k in least:
        yield Wrong(
            index=int(k),
            label=classes[labels[k]],
            taken=classes[taken[k]],
            share=float(probabilities[k, labels[k]]),
            believed=float(probabilities[k, taken[k]]),
            picture=None if image is None else _picture(x_BF[k].reshape(image)),
            values=() if image is not None else tuple(float(v) for v in x_BF[k]),
        )


def _picture(x_HW: npt.NDArray[np.float32]) -> str:
    content = io.BytesIO()
    imsave(content, x_HW, cmap="gray", format="png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _few(names: object) -> str:
    return ", ".join(map(str, names)) if isinstance(names, list) and names else "nobody"


def _shares(records: Sequence[dict[str, Any]], job: Job) -> dict[str, Share]:
    """Where the agents were last, and what the steps that they took there came to."""
    runs = [found for record in records if (found := _times_of(record))]
    last = [own.agents for own in runs[-1]] if runs else []
    if {name for agents in last for name in agents} != set(job.topology.names):
        return {}
    shares: dict[str, Share] = {}
    for k, agents in enumerate(last):
        own = [times for actors in runs for times in actors if times.agents == agents]
        whole = Times(
            agents,
            steps=sum(times.steps for times in own),
            total=sum(times.total for times in own),
            compute=tuple(map(sum, zip(*(times.compute for times in own), strict=True))),
            wait=sum(times.wait for times in own),
        )
        for name, seconds in zip(agents, whole.a_step(), strict=True):
            shares.setdefault(name, Share(k, own[-1].node, seconds))  # of copies, the first one's
    return shares


def _times_of(record: dict[str, Any]) -> list[Times]:
    """The times of a record; none if it is no whole record of them."""
    if record.get("kind") != "times":
        return []
    try:
        found = _TIMES.validate_python(record.get("actors"))
    except ValidationError:
        return []
    whole = all(
        len(own.compute) == len(own.agents)
        and all(0 <= s < math.inf for s in (own.total, own.wait, *own.compute))
        and 0 < own.steps < 1e9
        for own in found
    )
    return found if whole else []


def _points(run: Shown, kind: str, key: str) -> tuple[tuple[int, float], ...]:
    """A number of a run's records by step; null is no number."""
    values = ((r["step"], r.get(key)) for r in run.records if r.get("kind") == kind)
    return tuple(
        (step, math.nan if value is None else value)
        for step, value in values
        if (value is None or isinstance(value, float)) and 0 < step <= run.job.steps
    )


# --- from numbers to figures ---------------------------------------------------------------------

Section = tuple[str, list[Chart], list[str]]


def _sections(shown: Sequence[Shown]) -> list[Section]:
    """Heading, charts and remarks of each section."""
    gradients, without = _of_each("gradients", shown, _gradients)
    sensitivities, unmeasured = _of_each("sensitivities", shown, _sensitivities)
    return [
        ("Agents and what they exchange", *_of_each("topology", shown, _agents)),
        ("Training", _training(shown), []),
        ("Gradients and sensitivities", gradients + sensitivities, without + unmeasured),
        ("Where the time goes", *_of_each("times", shown, _times)),
        _verdicts(shown),
    ]


def _verdicts(shown: Sequence[Shown]) -> Section:
    classes = any(run.counts is not None for run in shown)
    made = [
        _of_each(what, shown, draw)
        for what, draw in (("confusion", _confusion), ("fit", _fit), ("errors", _errors))
    ]
    charts = [chart for drawn, _ in made for chart in drawn]
    return "Right and wrong" if classes else "Predicted and true", charts, []


def _of_each(
    what: str, shown: Sequence[Shown], draw: Callable[[str, Shown], Chart | str | None]
) -> tuple[list[Chart], list[str]]:
    """A chart of each run that can have it, by its name, or the remark that stands for it."""
    charts, remarks = [], []
    for run in shown:
        alone = len(shown) == 1
        made = draw(what if alone else f"{what}-{run.number}", run)
        if made is None:
            continue
        if isinstance(made, str):
            remarks.append(made if alone else f"{run.label}: {made}")
        else:
            charts.append(made if alone else replace(made, title=f"{made.title}, {run.label}"))
    return charts, remarks


def _agents(name: str, run: Shown) -> Chart | str:
    try:
        hosts = [run.shares[agent].actor for agent in run.job.topology.names if run.shares]
        return drawing.topology(run.job, hosts or None, name)
    except UserError as error:
        return f"The graph is not drawn: {error}."


def _training(shown: Sequence[Shown]) -> list[Chart]:
    told = {name for run in shown for name in run.scores}

    def curves(key: str) -> list[Curve]:
        return [
            Curve(
                run.number - 1,
                f"{run.number} {what}" if len(shown) > 1 else what,
                _points(run, kind, key),
                kind == "eval",
            )
            for run in shown
            if key == "loss" or key in run.scores
            for kind, what in (("train", "batches"), ("eval", "test"))
        ]

    loss = "loss" if len(told) > 2 else "mean square" if "rmse" in told else "cross-entropy"
    charts = [figures.curves("loss", "Loss", loss, curves("loss"), logarithmic=True)]
    if "accuracy" in told:
        what = "share of right answers"
        charts.append(figures.curves("accuracy", "Accuracy", what, curves("accuracy")))
    if "rmse" in told:
        what = "RMSE in the targets' units"
        charts.append(figures.curves("rmse", "Error", what, curves("rmse"), logarithmic=True))
    return charts


def _gradients(name: str, run: Shown) -> Chart | str:
    records = [
        (r["epoch"], [math.nan if n is None else float(n) for n in r["norms"]])
        for r in run.records
        if r.get("kind") == "gradients" and r["norms"]
    ]
    return figures.gradients(name, records) if records else "There is no record of the gradients."


def _sensitivities(name: str, run: Shown) -> Chart | str:
    if run.bsm is None:
        return "Backward sensitivities were not measured."
    [network] = run.bsm["networks"]
    return figures.sensitivities(
        name, network["norms"], network["log10_bounds"], run.bsm["samples"], network["exact"]
    )


def _times(name: str, run: Shown) -> Chart | str:
    if not run.shares:
        return "There is no record of the agents' time, nor of who shared an actor."
    return figures.times(name, [*run.shares], [share.seconds for share in run.shares.values()])


def _confusion(name: str, run: Shown) -> Chart | None:
    if run.counts is None:
        return None
    return figures.confusion(name, run.counts, classes_of(run.job.spec.data))


def _fit(name: str, run: Shown) -> Chart | None:
    if run.fit is None:
        return None
    return figures.fit(name, run.fit.true, run.fit.predicted, run.scores["r2"])


def _errors(name: str, run: Shown) -> Chart | None:
    if run.fit is None:
        return None
    return figures.errors(name, [*run.fit.rmse], [*run.fit.rmse.values()])


# --- the page ------------------------------------------------------------------------------------


def _facts(run: Shown) -> list[tuple[str, str]]:
    """The figures of a run, in words."""
    job, told, summary = run.job, run.told, run.summary
    ends = "" if run.step == job.steps else f" of {job.steps:,}"
    facts = [
        *(_fact(f"test {said}") for said in scores(run.scores)),
        ("test loss", f"{run.loss:.4f}"),
        ("steps", f"{run.step:,}{ends}"),
        ("model", f"{told.model}, {told.depth} layers, {told.parameters:,} parameters"),
        ("agents", f"{len(told.agents)}, {told.edges} edges"),
        ("sent a step between agents", size(job.bytes_per_step)),
        ("rounds a step", f"{len(job.plan.training_step)}"),
    ]
    if told.replicas > 1:
        facts.append(("sent a step between copies", size(job.bytes_of_sums)))
    if job.absent:
        facts.append(("absent", ", ".join(job.absent)))
    if summary is None:
        return facts
    bests = {"accuracy": summary.best_test_accuracy, "r2": summary.best_test_r2}
    best = {name: score for name, score in bests.items() if score is not None}
    return [
        *facts,
        *(_fact(f"best test {said}") for said in scores(best)),
        ("wall time", duration(summary.seconds)),
        ("of it training", duration(summary.training_seconds)),
        ("samples a second", f"{summary.samples_per_second:,.0f}"),
        ("sent in all", size(summary.bytes_sent)),
        ("ran as", summary.placement),
        ("restarts", f"{summary.restarts}"),
    ]


def _fact(said: str) -> tuple[str, str]:
    name, _, value = said.rpartition(" ")
    return name, value


def _render(shown: Sequence[Shown], sections: Sequence[Section]) -> str:
    facts = [dict(_facts(run)) for run in shown]
    labels = list(dict.fromkeys(name for own in facts for name in own))
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files("hdnn_dist").joinpath("page.html").read_text())
    return template.render(
        theme=figures.theme(),
        runs=shown,
        facts=[(name, [own.get(name, "–") for own in facts]) for name in labels],
        differences=differences([run.job.spec for run in shown]),
        many=MANY,
        sections=sections,
        size=size,
        quote=shlex.quote,
        sent=[_sent(run.told) for run in shown],
        versions=f"hdnn_dist {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
    )


def _sent(told: Report) -> dict[str, int]:
    """Bytes that each agent sends in a training step."""
    sent = {agent.name: 0 for agent in told.agents}
    for link in told.traffic:
        sent[link.source] += link.bytes
    return sent
