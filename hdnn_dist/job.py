"""A job: a spec whose parts have been shown to fit one another, with all that follows from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import torch

from hdnn_dist.architecture import Architecture
from hdnn_dist.data import DataInfo, View, describe, split_features, split_targets
from hdnn_dist.errors import SpecError, UserError, did_you_mean
from hdnn_dist.exchange import Plan, Round
from hdnn_dist.family import FAMILY
from hdnn_dist.hamiltonian import Activation, activation_of
from hdnn_dist.reader import Source, read_spec, spec_from_dict
from hdnn_dist.sparsity import given_X, interconnection, patterns_of
from hdnn_dist.spec import IndexSplit, Spec
from hdnn_dist.storage import Where, place
from hdnn_dist.topology import Topology, Tree, resolve

MAX_BLOCKS = 10_000_000  # of K, over all layers


@dataclass(frozen=True)
class Job:
    """Everything known before the first actor starts, the same in every process.

    Attributes:
        spec: resolved: all agents and edges written out.
        topology: who may talk to whom.
        data: sizes of the data set.
        views: per agent, what it sees of a sample.
        architecture: the network on the graph.
        plan: the rounds of a training step.
        absent: names of the spec's agents that do not take part, in the spec's order; all other
            attributes but `spec` are without them.
    """

    spec: Spec
    topology: Topology
    data: DataInfo
    views: tuple[View, ...]
    architecture: Architecture
    plan: Plan
    absent: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        spec: Where | Mapping[str, Any] | None = None,
        overrides: Sequence[str] = (),
    ) -> Job:
        """Read a spec and fit its parts together.

        Args:
            spec: a YAML file, or what one would hold as a mapping, whose "topology" may also be a
                `Topology` or a networkx graph; None is the embedded default (8 agents, digits).
            overrides: `"section.key=value"`, as for `--set`; for a file.

        Raises:
            SpecError: with the place in the file.
            UserError: overrides for a mapping, or a single string of them.
        """
        if isinstance(overrides, str) or (overrides and isinstance(spec, Mapping)):
            raise UserError(
                f"overrides {overrides!r} given",
                "give a list of 'section.key=value', and a spec file to change",
            )
        if isinstance(spec, Mapping):
            return cls.of(spec_from_dict({**spec, **_written_out(spec.get("topology"))}))
        file = None if spec is None else place(spec)
        written, source = read_spec(file, overrides)
        base = file.parent if isinstance(file, Path) else None
        return cls.of(written, base=base, source=source)

    @classmethod
    def of(cls, spec: Spec, base: Path | None = None, source: Source | None = None) -> Job:
        """Fit the parts of a spec together.

        Args:
            spec: any valid spec.
            base: where the graph files it names are found.
            source: tells the place in the file for errors.

        Raises:
            SpecError: the graph, the data and the model do not fit one another.
        """
        try:
            return cls._fit(_with_absolute_folder(resolve(spec, base), base))
        except SpecError as error:
            if error.where is None and source is not None:
                error.where = source.locate(error.loc)
            raise

    @classmethod
    def _fit(cls, spec: Spec) -> Job:
        topology = Topology.from_spec(spec.topology)
        blocks = spec.model.layers * (len(topology.agents) + len(topology.edges))
        if blocks > MAX_BLOCKS:
            raise SpecError(
                ("model", "layers"),
                f"{spec.model.layers} layers on this graph have {blocks} blocks of K",
                f"stay within {MAX_BLOCKS}: use fewer layers, agents or edges",
            )
        data = describe(spec.data)
        batch, copies = min(spec.training.batch_size, data.train), spec.cluster.replicas
        if copies > batch:
            raise SpecError(
                ("cluster", "replicas"),
                f"{copies} copies cannot share a batch of {batch} samples",
                f"use at most {batch}, or a larger training.batch_size",
            )
        views = split_features(spec.data, data, topology.names)
        own = split_targets(spec.data, data, topology.names)
        readers, tree = _readout(spec, topology, own)
        _check_distortion(spec, data)
        _check_views(spec, topology, views)
        J, X = interconnection(topology, spec), given_X(topology, spec)
        enters = spec.data.split.enter if isinstance(spec.data.split, IndexSplit) else {}
        architecture = Architecture(
            names=topology.names,
            patterns=patterns_of(topology, spec, J, X),
            columns=tuple(view.columns for view in views),
            features=data.features,
            outputs=data.outputs,
            readers=readers,
            tree=tree,
            own=own,
            member=FAMILY[spec.model.name](spec.model.h, _activation(spec)),
            encoder=spec.model.encoder,
            enter=tuple(enters.get(name, "p") for name in topology.names),
            train_X=spec.model.train_J,
            seed=spec.training.seed,
            J=J,
            X=X,
        )
        recompute = spec.training.activations == "recompute"
        if recompute and not architecture.member.invertible:
            raise SpecError(
                ("training", "activations"),
                f"the forward Euler step of {spec.model.name} has no closed inverse to recompute "
                "states by",
                "set activations to store, or model.name to H2, MS1 or MS3",
            )
        plan = Plan.of(architecture, _norm_tree(spec, topology, tree.root), recompute)
        return cls(spec, topology, data, views, architecture, plan)

    def without(self, absent: Iterable[str]) -> Job:
        """The job of the same spec in which these agents, and no others, do not take part.

        The others keep what they see, hold and compute; only the blocks between them and those
        that are absent are gone. The root stays the spec's, as it alone holds the labels; where
        agents read out for themselves, their targets are gone with them.

        Raises:
            UserError: an agent is not the spec's, or those that are left cannot go on.
        """
        whole = Job.of(self.spec) if self.absent else self
        names, gone = whole.topology.names, set(absent)
        for name in sorted(gone - set(names)):
            raise UserError(f"there is no agent {name!r}", did_you_mean(name, names))
        if not gone:
            return whole
        leaving = ", ".join(name for name in names if name in gone)
        root, own = names[whole.root], whole.architecture.own
        if root in gone and own is None:
            raise UserError(
                f"{root!r} is the root of the readout, which alone holds the labels",
                "keep it, or train a new run with another model.readout.root",
            )
        kept = tuple(i for i, name in enumerate(names) if name not in gone)
        topology = whole.topology.without(gone)
        readers = tuple(
            topology.index(names[r]) for r in whole.architecture.readers if names[r] not in gone
        )
        if not readers or not any(whole.views[i].columns for i in kept):
            what = "sees any input" if readers else "contributes to the scores"
            raise UserError(f"without {leaving} no agent is left that {what}", "keep one that does")
        try:
            tree = (
                topology.spanning_tree(topology.index(root), readers)
                if own is None
                else _no_tree(topology)
            )
            norm_tree = _norm_tree(self.spec, topology, tree.root)
        except SpecError as error:
            raise UserError(
                f"without {leaving}: {error.problem}", "keep one that connects them"
            ) from None
        architecture = whole.architecture.keep(kept, readers, tree)
        return replace(
            whole,
            topology=topology,
            data=whole.data if own is None else _without_targets(whole.data, own, kept),
            views=tuple(whole.views[i] for i in kept),
            architecture=architecture,
            plan=Plan.of(architecture, norm_tree, whole.plan.recompute),
            absent=tuple(name for name in names if name in gone),
        )

    def among(self, agents: Iterable[str]) -> Job:
        """The job of the same spec in which these agents, and no others, take part.

        Raises:
            UserError: as `without`.
        """
        return self.without(set(self.names) - set(agents))

    @property
    def names(self) -> tuple[str, ...]:
        """All agents of the spec, absent ones too."""
        return Topology.from_spec(self.spec.topology).names

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and states."""
        return torch.float64 if self.spec.training.dtype == "float64" else torch.float32

    @property
    def message_dtype(self) -> torch.dtype:
        """In which numbers travel of which there is one a sample."""
        others = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return others.get(self.spec.training.messages, self.dtype)

    @property
    def root(self) -> int:
        """The agent that holds the labels, unless agents read out for themselves; sums norms."""
        return self.architecture.tree.root

    @property
    def batch(self) -> int:
        """Samples a step: the batch size, or the whole training set if that is smaller."""
        return min(self.spec.training.batch_size, self.data.train)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training set; what is left over differs from epoch to epoch."""
        return self.data.train // self.batch

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.spec.training.epochs * self.steps_per_epoch

    def traffic(self, rounds: Iterable[Round]) -> dict[tuple[int, int], int]:
        """Bytes from agent to agent that some rounds of a training step move."""
        return self._traffic(rounds, self.batch, self.spec.cluster.replicas)

    def traffic_of(self, rounds: Iterable[Round], samples: int) -> dict[tuple[int, int], int]:
        """The same of one copy of the agents, which takes so many samples."""
        return self._traffic(rounds, samples, 1)

    def _traffic(
        self, rounds: Iterable[Round], samples: int, copies: int
    ) -> dict[tuple[int, int], int]:
        sizes = self.message_dtype.itemsize, self.dtype.itemsize
        return self.plan.traffic(rounds, samples, *sizes, copies)

    @cached_property
    def bytes_per_step(self) -> int:
        """What the plan moves between agents in a training step, over all copies of them."""
        return sum(self.traffic(self.plan.training_step).values())

    @cached_property
    def bytes_of_sums(self) -> int:
        """What the copies of all agents send one another in a training step.

        They sum gradients, and the loss and scores where they are told, in rings: with R copies
        every number is sent 2 (R - 1) times.
        """
        agents = range(len(self.topology.agents))
        tallies = (3 if self.data.targets else 2) * sum(map(self.architecture.finishes, agents))
        numbers = tallies + sum(self.architecture.count(i, zeros=True) for i in agents)
        return 2 * (self.spec.cluster.replicas - 1) * numbers * self.dtype.itemsize

    @cached_property
    def parameters(self) -> int:
        """How many numbers all agents train."""
        return sum(map(self.architecture.count, range(len(self.topology.agents))))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over topology, plan, views and training: equal for actors that can co-operate."""
        parts = (
            self.topology.digest(),
            self.plan.digest(),
            repr(self.views),
            self.spec.model.model_dump_json(),
            self.spec.data.model_dump_json(exclude={"dir"}),
            self.spec.training.model_dump_json(),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _written_out(topology: object) -> dict[str, Any]:
    """A topology, or a graph, as the section of a spec; nothing for what is one already."""
    if isinstance(topology, nx.Graph):
        topology = Topology.from_graph(topology)
    if not isinstance(topology, Topology):
        return {}
    names = topology.names
    edges = [[names[l], names[i]] for l, i in topology.edges if topology.directed or l < i]
    agents = [agent.model_dump() for agent in topology.agents]
    links = "two-way" if topology.two_way else "one-way"
    section = {"name": topology.name, "agents": agents, "edges": edges, "links": links}
    return {"topology": section | {"directed": topology.directed}}


def _without_targets(data: DataInfo, own: Sequence[Sequence[int]], kept: Sequence[int]) -> DataInfo:
    left = sorted(k for i in kept for k in own[i])
    return replace(data, targets=tuple(data.targets[k] for k in left))


def _with_absolute_folder(spec: Spec, base: Path | None) -> Spec:
    """`data.dir` from the folder of the spec: actors and resumed runs work elsewhere."""
    if spec.data.dir is None:
        return spec
    folder = ((base or Path()) / os.path.expanduser(spec.data.dir)).absolute()
    return spec.model_copy(update={"data": spec.data.model_copy(update={"dir": str(folder)})})


def _readout(
    spec: Spec, topology: Topology, own: Sequence[Sequence[int]] | None
) -> tuple[tuple[int, ...], Tree]:
    """Who contributes to the scores, and the tree that sums them; with `own` outputs none does."""
    readout = spec.model.readout
    loc = ("model", "readout")
    if own is not None:
        if readout.agents != "all" or readout.root is not None:
            key = "root" if readout.agents == "all" else "agents"
            raise SpecError(
                (*loc, key),
                "data.targets are given by agent, and each reads out its own by itself",
                f"leave {key} out, or give data.targets as a list for a root to read out",
            )
        return _readers(own), _no_tree(topology)

    def index(name: str, *place: str | int) -> int:
        try:
            return topology.index(name)
        except SpecError as error:
            raise SpecError((*loc, *place), error.problem, error.mend) from None

    if readout.agents == "all":
        readers = tuple(range(len(topology.agents)))
    elif not readout.agents:
        raise SpecError(
            (*loc, "agents"), "no agent contributes to the scores", "name at least one, or say all"
        )
    else:
        readers = tuple(index(name, "agents", k) for k, name in enumerate(readout.agents))
        for k, reader in enumerate(readers):
            if reader in readers[:k]:
                raise SpecError(
                    (*loc, "agents", k), f"{readout.agents[k]!r} is named twice", "name it once"
                )
    if readout.root is not None:
        root = index(readout.root, "root")
    else:
        root = topology.centre() if readout.agents == "all" else readers[0]
    return readers, topology.spanning_tree(root, readers)


def _readers(own: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(i for i, outputs in enumerate(own) if outputs)


def _no_tree(topology: Topology) -> Tree:
    """A root that sums no scores, but may norms."""
    root = topology.centre()
    return Tree(root, {}, {root: 0})


def _norm_tree(spec: Spec, topology: Topology, root: int) -> Tree | None:
    """The tree that a norm over all agents is summed up, if one is asked for."""
    if spec.training.clip_norm is None and spec.training.on_nonfinite != "skip":
        return None
    key = "on_nonfinite" if spec.training.clip_norm is None else "clip_norm"
    try:
        return topology.spanning_tree(root)
    except SpecError as error:
        raise SpecError(
            ("training", key),
            f"the norm is summed over all agents, but {error.problem}",
            f"connect them or leave {key} out",
        ) from None


def _activation(spec: Spec) -> Activation:
    try:
        return activation_of(spec.model.activation)
    except UserError as error:
        raise SpecError(("model", "activation"), error.problem, error.mend) from None


def _check_views(spec: Spec, topology: Topology, views: Sequence[View]) -> None:
    """What the data asks of the model, and one part of the model of another."""
    if spec.model.train_J and spec.model.name != "H2":
        raise SpecError(
            ("model", "train_J"),
            f"train_J trains the X of H2, which {spec.model.name} does not have",
            "leave train_J out, or set model.name to H2",
        )
    split = spec.data.split
    if isinstance(split, IndexSplit) and split.enter and spec.model.encoder != "pad":
        raise SpecError(
            ("data", "split", "enter"),
            "entry states are for the encoder pad, but model.encoder is linear, which fills both",
            "set model.encoder to pad or leave enter out",
        )
    for name, d, view in zip(topology.names, topology.sizes, views, strict=True):
        seen = len(view.columns)
        if spec.model.encoder == "pad" and seen > d:
            raise SpecError(
                ("model", "encoder"),
                f"pad copies the {seen} features of agent {name!r} into a state of size d = {d}",
                f"give {name!r} d >= {seen}, fewer features, or use the encoder linear",
            )
        if spec.training.shift and seen and view.image is None:
            raise SpecError(
                ("training", "shift"),
                f"what agent {name!r} sees is not a rectangle of an image and cannot be shifted",
                "use data.split kind patches or stripes, or set shift to 0",
            )


def _check_distortion(spec: Spec, data: DataInfo) -> None:
    if spec.training.distort is None:
        return
    if data.image is None:
        raise SpecError(
            ("training", "distort"),
            f"{data.name} is not a set of images, which alone can be distorted",
            "leave distort out, or set data.name to digits or mnist",
        )
    if spec.training.shift:
        raise SpecError(
            ("training", "shift"),
            "shift moves each agent's part by itself, and distort the whole image",
            "set shift to 0 and use training.distort.shift, or leave distort out",
        )
