"""The exchange plan: which message goes from whom to whom in which round. Pure data.

A *round* is a set of messages that can all be under way at once, each along one link. Its
*adjoint* is the same messages turned round, and that is the whole of distributed backpropagation:
what was received becomes a cotangent to send, what arrives is added. With `K[i, l] ≠ 0` for an
edge `l → i`::

    states   l → i   q^l                    agent i forms Σ_l Kq[i, l] q^l
    pull     i → l   Kq[i, l]ᵀ s^i          agent l sums;      pull   = states.adjoint
    mix      l → i   z^l                    agent i forms Σ_l X[i, l] z^l, or with J for X
    mix*     i → l   X[i, l]ᵀ z^i           agent l sums;      mix*   = mix.adjoint
    collect  child → parent                 a parent sums the scores of its subtree; none where
                                            agents read out for themselves
    spread   parent → child                 the cotangent of the scores; spread = collect.adjoint

A round without messages is not run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from hdnn_dist.architecture import Architecture
from hdnn_dist.errors import SpecError
from hdnn_dist.family import Update
from hdnn_dist.sparsity import BlockPattern
from hdnn_dist.topology import Tree

Item = TypeVar("Item")


@dataclass(frozen=True)
class Message:
    """`rows` numbers per sample from agent `source` to agent `target`."""

    source: int
    target: int
    rows: int


@dataclass(frozen=True, eq=False)
class Round:
    """Messages that travel at once. Compared by identity: a plan holds each of its rounds once.

    Attributes:
        name: what they are, for people.
        messages: at most one per ordered pair of agents, sorted.
        per_sample: whether a message has a column per sample of the batch, or one in all.
    """

    name: str
    messages: tuple[Message, ...]
    per_sample: bool = True
    _turned: Round | None = field(default=None, repr=False)

    @classmethod
    def along(cls, name: str, pattern: BlockPattern, sizes: Sequence[int]) -> Round:
        """Everybody gets the states that its row of the pattern names: `l → i`, `sizes[l]` rows."""
        messages = (Message(l, i, sizes[l]) for i, l in pattern.entries if i != l)
        return cls(name, tuple(sorted(messages, key=lambda m: (m.source, m.target))))

    @cached_property
    def adjoint(self) -> Round:
        """The same messages from target to source."""
        if self._turned is not None:
            return self._turned
        turned = (Message(m.target, m.source, m.rows) for m in self.messages)
        name = self.name.removesuffix("*") if self.name.endswith("*") else self.name + "*"
        return Round(
            name,
            tuple(sorted(turned, key=lambda m: (m.source, m.target))),
            self.per_sample,
            _turned=self,
        )

    @cached_property
    def outbound(self) -> dict[int, tuple[Message, ...]]:
        """Per agent, what it sends."""
        return _grouped((m.source, m) for m in self.messages)

    @cached_property
    def inbound(self) -> dict[int, tuple[Message, ...]]:
        """Per agent, what it receives."""
        return _grouped((m.target, m) for m in self.messages)

    @cached_property
    def agents(self) -> frozenset[int]:
        """Who takes part: sends something, or receives something."""
        return frozenset(self.outbound.keys() | self.inbound.keys())

    def columns(self, batch: int) -> int:
        """Columns of a message: the batch, or one."""
        return batch if self.per_sample else 1

    def travels_as(self, per_sample: Item, single: Item) -> Item:
        """Of two types of number, that of the round: of one a sample, or of one in all."""
        return per_sample if self.per_sample else single

    def numbers(self, batch: int) -> int:
        """How many numbers the round moves."""
        return sum(m.rows for m in self.messages) * self.columns(batch)


def _grouped(pairs: Iterable[tuple[int, Item]]) -> dict[int, tuple[Item, ...]]:
    groups: dict[int, list[Item]] = {}
    for agent, item in pairs:
        groups.setdefault(agent, []).append(item)
    return {agent: tuple(items) for agent, items in groups.items()}


@dataclass(frozen=True)
class Plan:
    """All rounds of a training step, computed once.

    Every process walks its sequences from end to end; an agent takes part in those of the rounds
    in which it sends or receives, so that a step costs its messages, however many rounds it has.

    Attributes:
        updates: the half steps of a layer.
        states: per layer, the round that brings the states of `T[j]`; its adjoint pulls back.
        mix: the round along `R`.
        collect: the rounds up the readout tree, the deepest level first.
        norm: the rounds that sum one number over all agents, likewise; empty without clipping.
        recompute: whether the backward pass takes each half step back before its adjoint.
        interconnect: the rounds of `J y`, with the one `J` of all layers.
    """

    updates: tuple[Update, ...]
    states: tuple[Round, ...]
    mix: Round
    collect: tuple[Round, ...]
    norm: tuple[Round, ...] = ()
    recompute: bool = False
    interconnect: tuple[Round, ...] = ()

    @classmethod
    def of(
        cls, architecture: Architecture, norm_tree: Tree | None = None, recompute: bool = False
    ) -> Plan:
        """The plan of an architecture.

        Args:
            architecture: patterns, sizes, readout tree.
            norm_tree: a spanning tree over all agents if the gradient norm is to be clipped.
            recompute: see the attribute.

        Raises:
            SpecError: a message would use a link that the topology does not have.
        """
        patterns, sizes = architecture.patterns, architecture.sizes
        along_T = {T: Round.along("states", T, sizes) for T in dict.fromkeys(patterns.T)}
        mix = Round.along("mix", patterns.R, sizes)
        interconnect: tuple[Round, ...] = ()
        if architecture.coupling == ("X",):
            interconnect = mix.adjoint, mix
        elif architecture.J is not None and architecture.J.dim() == 2:
            interconnect = (mix,)
        plan = cls(
            updates=architecture.member.updates,
            states=tuple(along_T[T] for T in patterns.T),
            mix=mix,
            collect=_up(architecture.tree, "collect", architecture.outputs, per_sample=True),
            norm=_up(norm_tree, "norm", 1, per_sample=False) if norm_tree else (),
            recompute=recompute,
            interconnect=_run(*interconnect),
        )
        for phase in dict.fromkeys(plan.training_step):
            for m in phase.messages:
                if (m.target, m.source) not in patterns.S:
                    source, target = architecture.names[m.source], architecture.names[m.target]
                    raise SpecError(
                        ("topology", "links"),
                        f"training sends a message ({phase.name}) from {source!r} to {target!r}, "
                        "but no link leads that way",
                        f"add the edge [{source}, {target}] or set topology.links: two-way",
                    )
        return plan

    @property
    def depth(self) -> int:
        """How many layers."""
        return len(self.states)

    def half_step(self, layer: int, update: Update) -> tuple[Round, ...]:
        """The rounds of an update (forward): the argument of `σ`, pull, coupling."""
        states, mix = self.states[layer], self.mix
        pull = (states.adjoint,) if update.pull else ()
        coupling = {"": (), "J": (mix,), "X": (mix,), "XT": (mix.adjoint,)}
        return (*self.argument(layer, update), *_run(*pull, *coupling[update.coupling]))

    def argument(self, layer: int, update: Update) -> tuple[Round, ...]:
        """The rounds of the argument of `σ`."""
        states = self.states[layer]
        rounds = {"K": (states,), "-KT": (states.adjoint,), "K-KT": (states, states.adjoint)}
        return _run(*rounds[update.argument])

    @cached_property
    def layers(self) -> tuple[Round, ...]:
        """The rounds from the first state to the last."""
        layers = range(self.depth)
        return tuple(r for j in layers for u in self.updates for r in self.half_step(j, u))

    @cached_property
    def forward(self) -> tuple[Round, ...]:
        """The rounds from the inputs to the scores at the root."""
        return (*self.layers, *_run(*self.collect))

    @cached_property
    def backward(self) -> tuple[Round, ...]:
        """The adjoint of each round of `forward`, in reverse.

        With `recompute` the rounds of a half step are run once more before their adjoints.
        """
        return (*(phase.adjoint for phase in reversed(_run(*self.collect))), *self.pull_back)

    @cached_property
    def pull_back(self) -> tuple[Round, ...]:
        """The rounds of `backward` through the layers."""
        rounds: list[Round] = []
        for j in reversed(range(self.depth)):
            for update in reversed(self.updates):
                half_step = self.half_step(j, update)
                rounds += half_step if self.recompute else ()
                rounds += (phase.adjoint for phase in reversed(half_step))
        return tuple(rounds)

    @cached_property
    def differentiation(self) -> tuple[Round, ...]:
        """The rounds from the inputs to the gradients."""
        return (*self.forward, *self.backward)

    @cached_property
    def clipping(self) -> tuple[Round, ...]:
        """The rounds that tell everybody the norm of all gradients, if it is asked for."""
        norm = _run(*self.norm)
        return (*norm, *(phase.adjoint for phase in reversed(norm)))

    @cached_property
    def training_step(self) -> tuple[Round, ...]:
        """Every round of one optimiser step, in the order in which it runs."""
        return (*self.differentiation, *self.clipping)

    def analysis(self, energy: bool) -> tuple[Round, ...]:
        """The rounds of the analysis of one sample: `J M` of each cotangent, and the energies."""
        layers = range(self.depth)
        products = self.interconnect * (self.depth + 1)
        arguments = (r for j in layers for u in self.updates for r in self.argument(j, u))
        return (*self.layers, *self.pull_back, *products, *(arguments if energy else ()))

    @cached_property
    def collect_of(self) -> dict[int, tuple[Round, ...]]:
        """Per agent, the rounds of `collect` in which it takes part."""
        return _grouped((i, phase) for phase in self.collect for i in phase.agents)

    @cached_property
    def norm_of(self) -> dict[int, tuple[Round, ...]]:
        """Per agent, the rounds of `norm` in which it takes part."""
        return _grouped((i, phase) for phase in self.norm for i in phase.agents)

    def traffic(
        self,
        rounds: Iterable[Round],
        batch: int,
        itemsize: int,
        single: int | None = None,
        copies: int = 1,
    ) -> dict[tuple[int, int], int]:
        """Bytes from agent to agent that the given rounds move.

        Args:
            rounds: of the plan.
            batch: samples in all.
            itemsize: bytes of a number.
            single: bytes of one that there is not one of per sample, if they are others.
            copies: of the agents, which share the samples.
        """
        sent: dict[tuple[int, int], int] = {}
        for phase, times in Counter(rounds).items():
            bytes_ = phase.travels_as(itemsize, itemsize if single is None else single)
            columns = batch if phase.per_sample else copies
            for m in phase.messages:
                size = m.rows * columns * bytes_ * times
                sent[m.source, m.target] = sent.get((m.source, m.target), 0) + size
        return sent

    def digest(self) -> str:
        """SHA-256 of the sequence of rounds: equal for actors that can work together."""
        kinds = {phase: k for k, phase in enumerate(dict.fromkeys(self.training_step))}
        text = repr((list(kinds), [kinds[phase] for phase in self.training_step]))
        return hashlib.sha256(text.encode()).hexdigest()


def _run(*rounds: Round) -> tuple[Round, ...]:
    """Those that have messages."""
    return tuple(phase for phase in rounds if phase.messages)


def _up(tree: Tree, name: str, rows: int, per_sample: bool) -> tuple[Round, ...]:
    return tuple(
        Round(
            name,
            tuple(
                sorted((Message(c, p, rows) for c, p in level), key=lambda m: (m.source, m.target))
            ),
            per_sample,
        )
        for level in tree.levels
    )
