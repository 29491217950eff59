"""What a job would do (`hdnn_dist.check`) as lines and tables, for a console of any width."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hdnn_dist.check import Report
from hdnn_dist.console import size
from hdnn_dist.errors import few
from hdnn_dist.sparsity import BlockPattern

DRAWN = 32  # agents up to which patterns are drawn
LISTED = 32  # agents, links or actors up to which all are listed
FASTER = 0.9  # of the time, at which another packing is suggested


def render(report: Report) -> RenderableType:
    """All of a report."""
    return Group(
        *_graph_section(report),
        *_pattern_section(report),
        *_step_section(report),
        *_placement_section(report),
        *_timing_section(report),
        *(Text(f"warning: {warning}", style="yellow") for warning in report.warnings),
    )


def _graph_section(report: Report) -> Iterator[RenderableType]:
    kind = "directed" if report.directed else "undirected"
    if report.directed and not report.two_way:
        kind += ", one-way links"
    yield Text(f"{report.topology} learns {report.data} by {report.model}", style="bold")
    text = f"{len(report.agents)} agents, {report.edges} edges ({kind}), {report.links} links"
    if report.examined:
        text += f", diameter {'infinite' if report.diameter is None else report.diameter}"
    if report.spectral_gap is not None:
        text += f", spectral gap {report.spectral_gap:.4f}"
    yield Text(text)
    if report.replicas > 1:
        least, most = min(report.shares), max(report.shares)
        samples = f"{most}" if least == most else f"{least} or {most}"
        yield Text(f"{report.replicas} copies of all agents, {samples} samples a step each")
    part = report.parameters / report.dense_parameters
    yield Text(
        f"{report.parameters:,} parameters, {part:.1%} of the {report.dense_parameters:,} of the "
        "dense model"
    )
    table = _table("agent", "d", "features", "parameters", "actor", "asks for")
    for agent in report.agents[:LISTED]:
        asks = [f"{agent.cpu:g} CPU"] if agent.cpu is not None else []
        asks += [f"{agent.gpu:g} GPU"] if agent.gpu else []
        asks += [f"{amount:g} {name}" for name, amount in agent.resources.items()]
        asks += [f"{key}={value}" for key, value in agent.labels.items()]
        numbers = (agent.d, agent.features, f"{agent.parameters:,}", agent.actor)
        table.add_row(agent.name, *map(str, numbers), ", ".join(asks))
    yield table
    yield from _rest(len(report.agents), "agents")


def _pattern_section(report: Report) -> Iterator[RenderableType]:
    if len(report.agents) <= DRAWN:
        drawn = (
            Panel(str(BlockPattern(p.rows)), title=p.symbol, box=box.SIMPLE, expand=False)
            for p in report.patterns
        )
        yield Columns(drawn)
    else:
        table = _table("pattern", "density")
        for pattern in report.patterns:
            table.add_row(pattern.symbol, f"{pattern.density:.2%}")
        yield table
    if not report.examined:
        return
    if report.single_exchange:
        yield Text("RᵀTᵀT ≤ S holds: one exchange of neighbours' states would do for a half step")
    else:
        missing = few(f"({i}, {j})" for i, j in report.missing)
        yield Text(
            f"RᵀTᵀT ≤ S fails, at (i, l) = {missing}: i's half step involves l, which is no "
            "neighbour; it takes several rounds of one-hop messages instead"
        )
    crosses = report.layers_to_cross
    needed = "never crosses the graph" if crosses is None else f"crosses the graph in {crosses}"
    yield Text(f"information {needed} of {report.depth} layers")


def _step_section(report: Report) -> Iterator[RenderableType]:
    backward = "twice that, states recomputed" if report.recompute else "the same"
    table = _table(f"one layer, forward (backward: {backward})", "rounds", "bytes")
    for phase in report.layers:
        table.add_row(phase.name, str(phase.rounds), size(phase.bytes))
    yield table
    table = _table("training step", "rounds", "bytes")
    for phase in (phase for phase in report.step if phase.rounds):
        table.add_row(phase.name, str(phase.rounds), size(phase.bytes))
    table.add_section()
    total = sum(phase.bytes for phase in report.step)
    table.add_row("all", str(sum(phase.rounds for phase in report.step)), size(total))
    yield table
    if report.own_targets:
        yield Text(f"{report.own_targets} agents read out their own targets: no scores travel")
    else:
        yield Text(f"scores travel {report.tree_depth} hops to the root {report.root}")
    if busiest := report.busiest:
        yield Text(
            f"busiest link: {busiest.source} → {busiest.target}, {size(busiest.bytes)} a step"
        )
    if 0 < len(report.traffic) <= LISTED:
        table = _table("link", "bytes a step")
        for link in report.traffic:
            table.add_row(f"{link.source} → {link.target}", size(link.bytes))
        yield table


def _placement_section(report: Report) -> Iterator[RenderableType]:
    copies = ["copy"] if report.replicas > 1 else []
    table = _table("actor", *copies, "agents", "asks for", "node")
    for k, actor in enumerate(report.actors[:LISTED]):
        asks = [f"{amount:g} {name}" for name, amount in actor.resources.items()]
        asks += [f"{key}={value}" for key, value in actor.labels.items()]
        copy = [str(actor.copy)] if report.replicas > 1 else []
        table.add_row(str(k), *copy, few(actor.agents), ", ".join(asks), actor.node or "none")
    yield table
    yield from _rest(len(report.actors), "actors")
    for node in report.nodes:
        there = ", ".join(f"{amount:g} {name}" for name, amount in node.resources.items())
        yield Text(f"node {node.name}: {there}")
    yield Text(
        f"{report.crossing_links} of {len(report.traffic)} directed links and "
        f"{size(report.crossing_bytes)} a step pass between actors"
    )
    if report.crossings:
        table = _table("from node", "to node", "edges", "which", "bytes a step")
        for crossing in report.crossings[:LISTED]:
            which = few(f"{l} → {i}" for l, i in crossing.links)
            amounts = str(len(crossing.links)), which, size(crossing.bytes)
            table.add_row(crossing.source, crossing.target, *amounts)
        yield table
        yield from _rest(len(report.crossings), "pairs of nodes")
    elif len(on := {actor.node for actor in report.actors}) == 1 and None not in on:
        yield Text("all of it on one node")


def _timing_section(report: Report) -> Iterator[RenderableType]:
    if not report.timings:
        yield Text("no prediction of the time of a step: run hdnn-dist calibrate once")
        return
    table = _table("predicted step", "actors", "ms", "arithmetic", "latency", "bytes")
    now, *others = report.timings
    for timing in report.timings:
        cost = timing.cost
        parts = (cost.seconds, cost.arithmetic, cost.latency, cost.transfer)
        name = "as the spec has it" if timing is now else f"{timing.agents_per_actor} an actor"
        table.add_row(name, str(timing.actors), *(f"{1e3 * seconds:.3g}" for seconds in parts))
    yield table
    best = others[0]
    if best.cost.seconds < FASTER * now.cost.seconds:
        yield Text(
            f"suggestion: --set cluster.agents_per_actor={best.agents_per_actor} makes a step "
            f"{now.cost.seconds / best.cost.seconds:.1f} times as fast"
        )
    if slow := report.stragglers:
        several = len(slow.actors) > 1
        yield Text(
            f"the others wait for actor{'s' * several} {few(map(str, slow.actors))} "
            f"({few(slow.agents)}): computing takes {'them' if several else 'it'} "
            f"{1e3 * slow.busy:.3g} ms of a step, and the others {1e3 * slow.others:.3g} ms on "
            "average; smaller d or fewer agents there, or faster machines, make up for it"
        )


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, column in enumerate(columns):
        text = k == 0 or column in ("agents", "asks for", "node", "to node", "which")
        table.add_column(column, justify="left" if text else "right")
    return table


def _rest(count: int, what: str) -> Iterator[RenderableType]:
    if count > LISTED:
        yield Text(f"… and {count - LISTED} more {what}")
