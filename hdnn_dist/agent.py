"""One agent: its own data, weights and optimiser around its node. Still no network here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdnn_dist.analysis import Sums
from hdnn_dist.architecture import Architecture
from hdnn_dist.checkpoint import check_tensors
from hdnn_dist.data import (
    DataInfo,
    Part,
    background,
    epoch_order,
    load_features,
    load_images,
    load_labels,
    load_targets,
    scaled,
    shift_images,
    shifts,
    target_moments,
)
from hdnn_dist.distortion import Distortion
from hdnn_dist.errors import CheckpointError
from hdnn_dist.family import roughness_gradient
from hdnn_dist.job import Job
from hdnn_dist.node import AgentNode, Exchange
from hdnn_dist.optimization import build_optimizer, fits, learning_rate

CPU = torch.device("cpu")
MOST_COUNTED = 64  # classes up to which an evaluation counts which are taken for which


@dataclass(frozen=True)
class StepResult:
    """What is known of a training step where outputs are complete.

    Attributes:
        step: from 1.
        loss: of the batch: mean cross-entropy in nats, or mean square of standardised errors.
        correct: how many of the batch were classified rightly; None of targets.
        samples: size of the batch.
        lr: learning rate.
        grad_norm: of all agents, before clipping; None where it is not asked for.
        squares, variance: of targets, as in `scores_of`.
    """

    step: int
    loss: float
    correct: int | None
    samples: int
    lr: float
    grad_norm: float | None
    squares: float | None = None
    variance: float | None = None

    @property
    def scores(self) -> dict[str, float]:
        """See `scores_of`."""
        accuracy = None if self.correct is None else self.correct / self.samples
        return scores_of(self.loss, accuracy, self.squares, self.variance)


@dataclass(frozen=True)
class Evaluation:
    """Over a data set's part.

    Attributes:
        loss: as in `StepResult`.
        accuracy: share of right answers; None of targets.
        samples: how many.
        squares, variance: of targets, as in `scores_of`.
        confusion: how often samples of each class (rows) were taken for each class (columns); empty
            where there are more than `MOST_COUNTED` classes, and of targets.
    """

    loss: float
    accuracy: float | None
    samples: int
    squares: float | None = None
    variance: float | None = None
    confusion: tuple[tuple[int, ...], ...] = ()

    @property
    def scores(self) -> dict[str, float]:
        """See `scores_of`."""
        return scores_of(self.loss, self.accuracy, self.squares, self.variance)

    @property
    def quality(self) -> float:
        """What is better the larger it is: accuracy, or R²."""
        return [*self.scores.values()][-1]


def counted(data: DataInfo) -> int:
    """Of how many classes an evaluation counts which are taken for which; 0 of targets."""
    return data.classes if not data.targets and data.classes <= MOST_COUNTED else 0


def scores_of(
    loss: float, accuracy: float | None, squares: float | None, variance: float | None
) -> dict[str, float]:
    """How good outputs are, by name: accuracy, or of targets rmse and r2.

    Args:
        loss: of targets the mean square of the errors, each over its target's deviation.
        accuracy: share of right answers; None of targets.
        squares: mean square of the errors in the targets' own units; None of classes.
        variance: what the loss would be of the mean of the training set; None of classes.
    """
    if squares is None or variance is None:
        return {} if accuracy is None else {"accuracy": accuracy}
    rmse = math.sqrt(squares) if squares >= 0 else math.nan
    return {"rmse": rmse, "r2": 1 - loss / variance if variance > 0 else math.nan}


Told = TypeVar("Told", StepResult, Evaluation)


def whole(parts: Sequence[Told]) -> Told:
    """What agents that read out for themselves know, each its part: added; else the root's."""
    first, *others = parts
    if not others:
        return first
    keys = "loss", "squares", "variance"
    return replace(first, **{key: sum(getattr(part, key) for part in parts) for key in keys})


def averaged(results: Sequence[StepResult]) -> Evaluation:
    """The batches of some steps as one: they are of one size. A root is taken of the mean."""

    def mean(numbers: Iterable[float | None]) -> float | None:
        there = [number for number in numbers if number is not None]
        return sum(there) / len(there) if there else None

    return Evaluation(
        loss=sum(r.loss for r in results) / len(results),
        accuracy=mean(None if r.correct is None else r.correct / r.samples for r in results),
        samples=sum(r.samples for r in results),
        squares=mean(r.squares for r in results),
        variance=mean(r.variance for r in results),
    )


@dataclass(frozen=True, order=True)
class Fault:
    """A number that is not finite where an agent first met one in a step; the earliest sorts first.

    Attributes:
        step: from 1; of an evaluation, the last one taken.
        rounds: layers that the step had gone through, forward and then back.
        agent: whose.
        what: the number.
    """

    step: int
    rounds: float
    agent: str
    what: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.what} of agent {self.agent!r} is not finite"


class Agent:
    """Agent `i` of a job.

    Args:
        job: the job.
        i: which agent.
        share: of a step's batch, what this copy of the agent takes; default: all of it.
        device: where weights and states are. Data stay in the host's memory, batches are moved.
    """

    def __init__(
        self,
        job: Job,
        i: int,
        share: slice | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.job, self.i, self.name = job, i, job.topology.names[i]
        self.device = device
        self.share = slice(0, job.batch) if share is None else share
        self.view = job.views[i]
        architecture = job.architecture
        self.is_root = i == job.root
        self.finishes = architecture.finishes(i)  # outputs, and has their labels
        self.weights = {
            name: nn.Parameter(value.to(device), requires_grad=name not in architecture.constants)
            for name, value in architecture.initial(i, job.dtype).items()
        }
        # The node works in place on the parameters' storage; the optimiser sees its gradients.
        self.node = AgentNode(
            architecture, job.plan, i, {n: w.detach() for n, w in self.weights.items()}
        )
        for name, gradient in self.node.gradients.items():
            self.weights[name].grad = gradient
        self.optimizer = build_optimizer(
            job.spec.training.optimizer, [w for w in self.weights.values() if w.requires_grad]
        )
        distort, image = job.spec.training.distort, job.data.image
        self._distortion: Distortion | None = None
        if distort is not None and image is not None and self.view.columns:
            self._distortion = Distortion(distort, image, self.view.columns)
        self._images: Tensor | None = None
        self._features: dict[Part, Tensor] = {}
        self._labels: dict[Part, Tensor] = {}
        self._order: tuple[int, Tensor] | None = None
        self.fault: Fault | None = None  # of the last step or evaluation
        # Of own share of the step under way; always in the same memory, as are gradients:
        self._first_state: int | None = None  # that is not finite
        layers = architecture.patterns.layers
        self._norms = torch.zeros(layers + 1, dtype=torch.float64, device=device)  # ‖∂loss/∂y_j‖
        # Where outputs are complete: loss and right ones, or loss, squares and variance.
        self.tally = torch.zeros(3 if job.data.targets else 2, dtype=job.dtype, device=device)
        self.gradient_squares = torch.empty(0)  # of own rows, at the last step of an epoch

    # --- data: own columns, and the labels of outputs that are complete here -------------------

    def load_data(self) -> None:
        """Read now what a training run needs, not in the first round, for which others wait."""
        if self._distortion is None:
            self.features("train")
        else:
            self.images()
        self.features("test")
        if self.finishes:
            self.labels("train")
            self.labels("test")

    def features(self, part: Part) -> Tensor:
        """Own columns of the training or test set, `(samples, F_i)`; loaded once."""
        if part not in self._features:
            columns = load_features(self.job.spec.data, part, self.view.columns)
            self._features[part] = torch.from_numpy(columns).to(self.job.dtype)
        return self._features[part]

    def images(self) -> Tensor:
        """All pixels of the training images, `(samples, F)`: the one copy of its process."""
        if self._images is None:
            self._images = torch.from_numpy(load_images(self.job.spec.data, "train"))
        return self._images

    def labels(self, part: Part) -> Tensor:
        """The classes `(samples,)`, which only the root may ask for, or own targets `(samples, C)`.

        Targets are standardised.
        """
        assert self.finishes, f"labels are not {self.name}'s"
        spec = self.job.spec.data
        if part not in self._labels:
            if self.job.data.targets:
                targets = torch.from_numpy(load_targets(spec, part, self.targets))
                self._labels[part] = targets.to(self.job.dtype)
            else:
                self._labels[part] = torch.from_numpy(load_labels(spec, part))
        return self._labels[part]

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Of the outputs that are complete here."""
        known = self.job.data.targets
        return tuple(known[k] for k in self.job.architecture.reads_out(self.i))

    @cached_property
    def _units(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of own targets, each `(C, 1)` in float64."""
        moments = target_moments(self.job.spec.data, self.targets)
        mean, std = (torch.from_numpy(m)[:, None].to(self.device) for m in moments)
        return mean, std

    def _batch(self, step: int) -> Tensor:
        """Indices of own share of a step (from 0): the same on every agent, from the seed."""
        epoch, k = divmod(step, self.job.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(self.job.spec.training.seed, epoch, self.job.data.train)
            self._order = epoch, torch.from_numpy(order)
        return self._order[1][k * self.job.batch : (k + 1) * self.job.batch][self.share]

    def _inputs(self, step: int, index: Tensor) -> Tensor:
        """Own part of a batch as columns `(F_i, B)`, distorted or shifted if the spec says so."""
        training, name = self.job.spec.training, self.job.spec.data.name
        if self._distortion is not None:
            place = self.share.start, self.job.batch
            part = self._distortion(self.images()[index], training.seed, step, *place)
            x = torch.from_numpy(scaled(name, part.numpy())).to(self.job.dtype)
            return x.T
        x = self.features("train").index_select(0, index)  # five times as fast as [index]
        if training.shift and self.view.image is not None:
            moves = shifts(training.seed, step, self.job.batch, training.shift)[self.share]
            fill = background(name)
            x = torch.from_numpy(shift_images(x.numpy(), self.view.image, moves, fill))
        return x.T

    def draw(self, step: int) -> list[Tensor]:
        """Own share of a step, which counts from 0: inputs, and the labels if they are here.

        In host memory, whatever the agent computes on.
        """
        index = self._batch(step)
        drawn = [self._inputs(step, index)]
        return [*drawn, self.labels("train")[index]] if self.finishes else drawn

    # --- what an agent does --------------------------------------------------------------------

    def differentiate(self, step: int) -> Exchange[None]:
        """Forward, loss where labels are, backward, on own share of a step, which counts from 0.

        What it leaves in `summands` is to be summed over the copies of the agent before `update`.
        """
        yield from self.propagate(*(x.to(self.device) for x in self.draw(step)), watch=True)
        if self._first_state is not None:  # other copies are to know, whatever the gradients are
            for gradient in self.node.gradients.values():
                gradient.fill_(math.nan)

    def propagate(
        self, x_FB: Tensor, labels_B: Tensor | None = None, *, watch: bool = False
    ) -> Exchange[None]:
        """As `differentiate`, of what `draw` has drawn; never waits for the device by itself.

        Args:
            x_FB: own inputs.
            labels_B: the classes or targets, where outputs are complete.
            watch: whether to look for a state that is not finite, which does wait.
        """
        scores = yield from self.node.forward(x_FB)
        if watch:
            self._first_state = self.node.first_nonfinite_state()
        scores_bar = None
        if labels_B is not None:
            tally, scores_bar = self._compare(scores, labels_B)
            scores_bar /= self.job.batch
            self.tally.copy_(tally)
        self._norms.copy_((yield from self.node.backward(scores_bar)))

    def _compare(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The tally of some samples, and `∂(summed loss)/∂scores`."""
        if self.job.data.targets:
            std = self._units[1].to(scores.dtype)
            return squared_error(scores, labels.T, std, self.job.architecture.outputs)
        loss, correct, bar = cross_entropy(scores, labels)
        return torch.stack([loss, correct.to(loss.dtype)]), bar

    @property
    def summands(self) -> list[Tensor]:
        """What the copies of an agent sum: their gradients, and the tally if there is one."""
        return [*self.node.gradients.values(), *[self.tally] * self.finishes]

    def update(self, step: int) -> Exchange[StepResult | None]:
        """Take the optimiser step that follows from the `summands` of the whole batch.

        An agent with a `fault` keeps its weights, and with `on_nonfinite: skip` all agents do.
        """
        B = self.job.batch
        loss, *rest = self.tally.tolist()
        if (step + 1) % self.job.steps_per_epoch == 0:
            self.gradient_squares = self._norms.square().cpu()
        self._regularise()
        self.fault = self._find_fault(step, self._first_state, self._norms)
        self._first_state = None
        if self.fault is None:
            self.fault = self._loss_fault(step + 1, loss, "the loss")
        norm = yield from self._clip()
        lr = self._set_learning_rate(step)
        if norm is not None and not math.isfinite(norm):
            if self.is_root and self.fault is None:  # it has overflowed in the sum
                self.fault = Fault(step + 1, math.inf, self.name, "the norm of all gradients")
        elif self.fault is None:
            self.optimizer.step()
        if not self.finishes:
            return None
        if self.job.data.targets:
            return StepResult(step + 1, loss / B, None, B, lr, norm, *(sum_ / B for sum_ in rest))
        return StepResult(step + 1, loss / B, int(rest[0]), B, lr, norm)

    def _find_fault(self, step: int, first_state: int | None, norms: Tensor) -> Fault | None:
        """The first number of a step that is not finite, given the cotangents' norms."""
        N = len(norms) - 1
        if first_state is not None:
            return Fault(step + 1, first_state, self.name, f"the state y_{first_state}")
        gradients = self.node.gradients
        if torch.isfinite(nn.utils.get_total_norm(gradients.values())):
            return None
        for j in reversed(range(N + 1)):
            if not torch.isfinite(norms[j]):
                return Fault(step + 1, 2 * N + 1 - j, self.name, f"the cotangent ∂loss/∂y_{j}")
        member = self.job.architecture.member
        for name, gradient in gradients.items():
            if not (finite := torch.isfinite(gradient)).all():
                what = f"the gradient of {name}"
                if name in (*member.matrices, *member.vectors):
                    what += f" in layer {finite.flatten(1).all(1).int().argmin()}"
                return Fault(step + 1, 2 * N + 2, self.name, what)
        return Fault(step + 1, 2 * N + 2, self.name, "the norm of the gradient")

    def _loss_fault(self, step: int, loss: float, what: str) -> Fault | None:
        """A loss that is not finite: met after all layers, and before the way back."""
        if math.isfinite(loss):
            return None
        return Fault(step, self.job.architecture.patterns.layers + 0.5, self.name, what)

    def evaluate(self, part: Part, start: int, stop: int, step: int) -> Exchange[Tensor | None]:
        """The tally of some samples, and `Evaluation.confusion` row by row, in float64.

        None where outputs are not complete.

        A number that is not finite is the agent's `fault`, of the last of the `step` steps taken.
        """
        x_FB = self.features(part)[start:stop].T.to(self.device)
        scores = yield from self.node.forward(x_FB)
        self.fault = None
        if (j := self.node.first_nonfinite_state()) is not None:
            self.fault = Fault(step, j, self.name, f"the {part} set's state y_{j}")
        if not self.finishes:
            return None
        labels_B = self.labels(part)[start:stop].to(self.device)
        tally = self._compare(scores, labels_B)[0].to(CPU, torch.float64)
        if self.fault is None:
            self.fault = self._loss_fault(step, tally[0].item(), f"the {part} set's loss")
        if not (C := counted(self.job.data)):
            return tally
        counts = torch.bincount(C * labels_B + scores.argmax(0), minlength=C**2)
        return torch.cat([tally, counts.to(tally)])

    def predict(self, x_BF: Tensor) -> Exchange[np.ndarray | None]:
        """Class probabilities `(B, C)` of own features of a batch, or targets in their units.

        Of targets that agents read out for themselves own ones alone; None where there are none.
        """
        scores = yield from self.node.forward(x_BF.to(self.device, self.job.dtype).T)
        if not self.finishes:
            return None
        if not self.job.data.targets:
            return scores.T.softmax(1).cpu().numpy()
        mean, std = self._units
        return (mean + std * scores).T.cpu().numpy()

    def sensitivities(self, x_BF: Tensor, V: Tensor) -> Exchange[Sums]:
        """Own part of what the analysis of the run sums (see `hdnn_dist.analysis`).

        Each sample of own features is sent through the layers once for every cotangent.

        Args:
            x_BF: own features of the samples.
            V: the cotangents of `y_N`, `(2n, r)`.
        """
        node, architecture = self.node, self.job.architecture
        r, layers = V.shape[1], architecture.patterns.layers
        own = V[architecture.stacked((self.i,), whole=True)]  # (2d, r)
        own = own.to(self.device, self.job.dtype)
        grams, forms, energies = [], [], []
        for x_F in x_BF.to(self.device, self.job.dtype):
            node.forget()
            energy, states = [], []
            y = node.encode(x_F[:, None].expand(-1, r))
            for layer in range(layers):
                states.append(y)
                y = yield from node.layer(layer, y)
            gram, form = [], []
            cotangents: list[Tensor] = []
            yield from node.pull_back(y, own, lambda _, M: cotangents.append(M))  # noqa: B023
            for M in cotangents:
                JM = yield from node.interconnect(M)
                gram.append(M.double().T @ M.double())
                form.append(M.double().T @ JM.double())
            if node.activation.integral is not None:
                for layer, y in enumerate(states):
                    energy.append((yield from node.energy(layer, y))[0].double())
            grams.append(torch.stack(gram))
            forms.append(torch.stack(form))
            energies.append(torch.stack(energy) if energy else torch.empty(0))
        patterns = architecture.patterns
        blocks = dict.fromkeys(architecture.member.matrices, patterns.K.rows[self.i])
        blocks |= dict.fromkeys(architecture.coupling, patterns.R.rows[self.i])
        return Sums(
            torch.stack(grams, 1).cpu(),
            torch.stack(forms, 1).cpu(),
            torch.stack(energies, 1).cpu(),
            {name: self._block_norms(name, row) for name, row in blocks.items()},
        )

    def _block_norms(self, name: str, row: Sequence[int]) -> Tensor:
        """`‖W[i, l]‖` in row `i` of an otherwise empty `(N, agents, agents)`."""
        architecture, weight = self.job.architecture, self.node.weights[name].double().cpu()
        layers, agents = architecture.patterns.layers, len(architecture.names)
        norms = torch.zeros(layers, agents, agents, dtype=torch.float64)
        columns = weight.split([architecture.sizes[l] for l in row], -1)
        for l, block in zip(row, columns, strict=True):
            norms[:, self.i, l] = torch.linalg.matrix_norm(block, 2)
        return norms

    def _regularise(self) -> None:
        """Add the gradient of `α h/2 Σ_j ‖K_{j+1} - K_j‖² + ‖b_{j+1} - b_j‖²`: all of it local."""
        if not (alpha := self.job.spec.training.alpha):
            return
        member, mask = self.job.architecture.member, self.node.mask
        for name in (*member.matrices, *member.vectors):
            gradient = alpha * roughness_gradient(self.node.weights[name], member.h)
            if mask is not None and name in member.matrices:
                gradient *= mask
            self.node.gradients[name] += gradient

    def _clip(self) -> Exchange[float | None]:
        """Scale the gradient to the norm of `clip_norm`, summed over all agents up a tree."""
        training = self.job.spec.training
        if training.clip_norm is None and training.on_nonfinite != "skip":
            return None
        gradients = self.node.gradients.values()
        square = torch.stack([g.square().sum() for g in gradients]).sum().reshape(1, 1)
        if self.fault is not None:  # others are to know, whatever the gradients are
            square.fill_(math.nan)
        square = yield from self.node.collect(self.job.plan.norm_of, square)
        square = yield from self.node.spread(self.job.plan.norm_of, square)
        norm = square.sqrt().item()
        limit = math.inf if training.clip_norm is None else training.clip_norm
        if limit < norm < math.inf:
            for gradient in gradients:
                gradient *= limit / norm
        return norm

    def _set_learning_rate(self, step: int) -> float:
        training = self.job.spec.training
        lr = learning_rate(
            training.schedule,
            training.optimizer.lr,
            step,
            self.job.steps,
            self.job.steps_per_epoch,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    # --- state ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Weights and optimiser state by name, for a checkpoint, in the host's memory."""
        tensors = {f"weights/{name}": w.detach().cpu() for name, w in self.weights.items()}
        for name, weight in self.weights.items():
            for key, value in self.optimizer.state.get(weight, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value.cpu()
        return tensors

    def initial_state(self) -> dict[str, Tensor]:
        """What `state` gives of an agent that has not trained yet."""
        initial = self.job.architecture.initial(self.i, self.job.dtype)
        return {f"weights/{name}": value for name, value in initial.items()}

    def load_state(self, tensors: Mapping[str, Tensor], writer: Architecture | None = None) -> None:
        """Put back what `state` gave.

        Args:
            tensors: the state.
            writer: the network it is of, where other agents took part in that: blocks that belong
                to agents of both are put back, those that are new get their initial values.

        Raises:
            CheckpointError: names, shapes or types are not this agent's.
        """
        if writer is not None:
            tensors = {
                key: self._carried_over(key, value, writer) for key, value in tensors.items()
            }
        check_tensors(self.name, self.weights, tensors)
        states = {}
        for name, weight in self.weights.items():
            prefix = f"optimizer/{name}/"
            state = {
                k[len(prefix) :]: v.to(self.device, copy=True)
                for k, v in tensors.items()
                if k.startswith(prefix)
            }
            if not fits(state, weight, self.job.spec.training.optimizer):
                raise CheckpointError(
                    f"agent {self.name!r}: what the checkpoint holds as the optimiser's state of "
                    f"{name} is none of {self.job.spec.training.optimizer.name}",
                    "resume with the spec of the run",
                )
            states[weight] = state
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weights/{name}"])
        for weight, state in states.items():
            if state:
                self.optimizer.state[weight] = state
            else:
                self.optimizer.state.pop(weight, None)

    def _carried_over(self, key: str, value: Tensor, writer: Architecture) -> Tensor:
        """A tensor of the state, from a network of other agents to this one."""
        kind, name = key.split("/")[:2]
        architecture = self.job.architecture
        has_neighbours = name in (*architecture.member.matrices, *architecture.coupling)
        if not has_neighbours or value.dim() < 2:  # an optimiser's count of steps has no columns
            return value
        fresh = self.initial_state()[f"weights/{name}"]
        carried = fresh if kind == "weights" else torch.zeros_like(fresh)
        here, there = architecture.common_columns(self.i, name, writer)
        carried[..., here] = value[..., there]
        return carried


def cross_entropy(scores_CB: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, number of right answers, and `∂(summed loss)/∂scores = softmax - onehot`."""
    log_p = scores_CB.log_softmax(0)
    loss = F.nll_loss(log_p.T, labels_B, reduction="sum")
    bar = log_p.exp()
    bar[labels_B, torch.arange(len(labels_B), device=bar.device)] -= 1
    return loss, (scores_CB.argmax(0) == labels_B).sum(), bar


def squared_error(
    scores_CB: Tensor, targets_CB: Tensor, std_C1: Tensor, outputs: int
) -> tuple[Tensor, Tensor]:
    """Sums over samples and targets of standardised errors, and `∂(the first)/∂scores`.

    Args:
        scores_CB: what is told of the targets here.
        targets_CB: what they are.
        std_C1: their deviations.
        outputs: how many targets there are in all, which the sums are divided by.

    Returns:
        The sums of `e²`, of `(std e)²` and of `t²`, `e = scores - targets`; and `2 e / outputs`.
    """
    error = scores_CB - targets_CB
    sums = [part.square().sum() for part in (error, std_C1 * error, targets_CB)]
    return torch.stack(sums) / outputs, 2 * error / outputs
