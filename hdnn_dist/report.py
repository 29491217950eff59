"""The analysis of a run, as `hdnn-dist analyze` writes it: `analysis.json` and its figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from hdnn_dist.analysis import (
    BUDGET,
    Sensitivities,
    accumulated,
    block_norms,
    energies,
    from_sums,
    has_one_J,
    log_bound,
    log_bounds,
    probes,
    sensitivities,
)
from hdnn_dist.api import open_run
from hdnn_dist.baselines import MLP, ResNet
from hdnn_dist.checkpoint import write_json
from hdnn_dist.data import epoch_order, load_features, load_labels, load_targets
from hdnn_dist.errors import UserError
from hdnn_dist.job import Job
from hdnn_dist.metrics import read_metrics
from hdnn_dist.model import Layers
from hdnn_dist.optimization import build_optimizer, learning_rate
from hdnn_dist.run import check_can_be_made, reopen
from hdnn_dist.storage import Where, place
from hdnn_dist.trainer import Runner

Baselines = Literal["trained", "initial", "none"]


def analyze(
    run: Where,
    *,
    samples: int = 8,
    baselines: Baselines = "trained",
    overrides: Sequence[str] = (),
    local: bool = False,
    address: str | None = None,
    out: Where | None = None,
) -> dict[str, Any]:
    """Measure what is proved of the family on a run's latest checkpoint.

    The agents measure their own rows (`Agent.sensitivities`) and sums of those leave them, no
    weights as they are (docs/analysis.md says what the sums tell). The upper bound is made of the
    norms of their blocks, which is less tight than one from whole matrices
    (`hdnn_dist.analysis.log_bounds`).

    Args:
        run: the run directory.
        samples: of the test set, from its first.
        baselines: whether an MLP and a ResNet of equal width and depth are measured beside it, as
            trained on the run's data and training section in this process, or as initialised.
        overrides: as for `hdnn_dist.open_run`.
        local: as for `hdnn_dist.open_run`.
        address: as for `hdnn_dist.open_run`.
        out: where `analysis.json` and the figures go; default: `analysis` in the run directory.

    Raises:
        UserError: there are not so many samples, or the folder cannot be made.
        CheckpointError: the run or its checkpoint cannot be used.
    """
    from hdnn_dist.plots import save_figures  # matplotlib takes a second to import

    # What is proved is of exact numbers, and so is what is measured.
    run, overrides = place(run), [*overrides, "training.messages=full"]
    job = reopen(run, overrides)
    if not 1 <= samples <= job.data.test:  # before a cluster is started
        raise UserError(
            f"{samples} samples, but the test set has {job.data.test}", f"take 1 to {job.data.test}"
        )
    folder = run / "analysis" if out is None else place(out)
    check_can_be_made(folder, "--out")
    with open_run(run, overrides=overrides, local=local, address=address) as (runner, step):
        report = of_agents(runner, samples) | {"step": step}
    report["networks"][0]["gradients"] = [
        {"epoch": record["epoch"], "norms": record["norms"]}
        for record in read_metrics(run)
        if record.get("kind") == "gradients"
    ]
    write_json(folder / "analysis.json", report)  # whatever becomes of the baselines
    if baselines != "none":
        report["networks"] += _baselines(job, samples, baselines == "trained")
        write_json(folder / "analysis.json", report)
    report["figures"] = [str(file) for file in save_figures(report, folder)]
    return report


def analyze_layers(layers: Layers, y: Tensor) -> dict[str, Any]:
    """The figures of `analyze` for layers in any other network, in float64.

    Args:
        layers: the module, which is left as it is.
        y: first states `(B, features)`, or images `(B, features, …)` whose pixels are the states.

    Returns:
        `norms`, `defects` (with `J1` where the layers have no `J` of their own), `exact`,
        `log10_bounds` and `energy` (None without the integral of `σ`), by layer and state.

    Raises:
        UserError: `y` is no state of these layers, or there is no `J` for the defect: MS2 of an odd
            size.
    """
    layers.check_states(y)
    member = layers.member
    weights = [{k: w.detach().double() for k, w in layer.items()} for layer in layers.weights()]
    states = member.propagate(y.detach().double().movedim(1, -1).flatten(0, -2), weights)
    one_J = has_one_J(member, getattr(layers, "J", None))
    found = sensitivities(
        [partial(member.step, w=w) for w in weights],
        states[0],
        member.J(weights[0]) if one_J else None,
    )
    known = member.activation.integral is not None
    return _network(member.name, found, log_bounds(member, weights), []) | {
        "energy": energies(member, weights, states).tolist() if known else None
    }


def of_agents(runner: Runner, samples: int) -> dict[str, Any]:
    """What the agents of a run measure of themselves: `analyze` without its baselines.

    Args:
        runner: the agents.
        samples: of the test set, from its first.
    """
    job = runner.job
    architecture, member = job.architecture, job.architecture.member
    N, layers = 2 * architecture.n, architecture.patterns.layers
    # An agent keeps about six numbers a layer of each of its rows, for every cotangent.
    kept = BUDGET // (6 * N * (layers + 1) * job.dtype.itemsize)
    summed = math.isqrt(BUDGET // (2 * 8 * samples * (layers + 1)))  # gram and form in float64
    V = probes(N, min(kept, summed))
    sums = runner.sensitivities(samples, V)
    bounds = [log_bound(member, norms) for norms in block_norms(member, sums.blocks)]
    one_J = has_one_J(member, architecture.J)
    return {
        "samples": samples,
        "J": "the model's" if one_J else "J1, as a yardstick",
        "bound": "from the norms of the agents' blocks",
        "networks": [_network(member.name, from_sums(sums, N), accumulated(bounds), [])],
        "energy": sums.energy.tolist() if sums.energy.numel() else None,
    }


def _network(
    name: str,
    found: Sensitivities,
    log_bounds: Sequence[float],
    gradients: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "name": name,
        "norms": found.norms.tolist(),
        "defects": found.defects.tolist(),
        "exact": found.exact,
        "log10_bounds": [log / math.log(10) for log in log_bounds],
        "gradients": gradients,
    }


# --- baselines ---------------------------------------------------------------------------------


class _Baseline(nn.Module):
    """Encoder, a baseline's layers and readout, with the sizes of the run's model."""

    def __init__(self, job: Job, layers: MLP) -> None:
        super().__init__()
        n = job.architecture.n
        self.encoder = nn.Linear(job.data.features, 2 * n)
        self.layers = layers
        self.readout = nn.Linear(2 * n, job.data.outputs)
        self.criterion = F.mse_loss if job.data.targets else F.cross_entropy

    def loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss of the run's model, and the states `y_0 … y_N` on the way."""
        states = self.layers.propagate(self.encoder(x))
        return self.criterion(self.readout(states[-1]), labels), states


def _baselines(job: Job, samples: int, train: bool) -> list[dict[str, Any]]:
    architecture = job.architecture
    N, depth = 2 * architecture.n, architecture.patterns.layers
    σ = architecture.member.activation
    makers: dict[str, Callable[[], MLP]] = {
        "MLP": lambda: MLP(N, depth, σ),
        "ResNet": lambda: ResNet(N, depth, architecture.h, σ),
    }
    x = _data(job, "test")[0][:samples].double()
    found = []
    for name, make in makers.items():
        with torch.random.fork_rng():
            torch.manual_seed(job.spec.training.seed)
            model = _Baseline(job, make()).to(job.dtype)
        gradients = _fit(model, job) if train else []
        model = model.double().requires_grad_(False)
        layers = model.layers
        steps = [partial(layers.step, j=j) for j in range(depth)]
        found.append(
            _network(
                f"{name} ({_fate(gradients, job) if train else 'initial'})",
                sensitivities(steps, model.encoder(x)),
                accumulated(layers.log_bounds()),
                gradients,
            )
        )
    return found


def _fate(gradients: list[dict[str, Any]], job: Job) -> str:
    """Whether a baseline came to the end of its training."""
    return "trained" if len(gradients) == job.spec.training.epochs else "diverged"


def _fit(model: _Baseline, job: Job) -> list[dict[str, Any]]:
    """The run's training, less its regulariser and its augmentation.

    Returns:
        `‖∂loss/∂y_j‖` at the last step of each epoch, as the run's own metrics have them; of
        fewer epochs if the loss or its gradient is not finite any more.
    """
    gradients = []
    training = job.spec.training
    optimizer = build_optimizer(training.optimizer, model.parameters())
    x, labels = _data(job, "train")
    for step in range(job.steps):
        epoch, k = divmod(step, job.steps_per_epoch)
        if k == 0:
            order = torch.from_numpy(epoch_order(training.seed, epoch, job.data.train))
        index = order[k * job.batch : (k + 1) * job.batch]
        optimizer.zero_grad()
        loss, states = model.loss(x[index], labels[index])
        if not torch.isfinite(loss):
            break
        if k + 1 == job.steps_per_epoch:
            bars = torch.autograd.grad(loss, states, retain_graph=True)
            norms = [bar.norm().item() for bar in bars]
            gradients.append({"epoch": epoch + 1, "norms": norms})
        loss.backward()
        limit = math.inf if training.clip_norm is None else training.clip_norm
        if not torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), limit)):
            break
        lr = learning_rate(
            training.schedule, training.optimizer.lr, step, job.steps, job.steps_per_epoch
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return gradients


def _data(job: Job, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(load_features(job.spec.data, part, range(job.data.features)))
    if job.data.targets:
        targets = torch.from_numpy(load_targets(job.spec.data, part, job.data.targets))
        return x.to(job.dtype), targets.to(job.dtype)
    return x.to(job.dtype), torch.from_numpy(load_labels(job.spec.data, part))


def render(report: dict[str, Any]) -> Table:
    """The short table of a report."""
    table = Table(title=f"{report['samples']} test samples, step {report['step']}")
    for heading in ("", "‖M_N‖ least", "‖M_N‖ largest", "least ‖M_k‖", "bound on ‖M_N‖", "defect"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for network in report["networks"]:
        last = network["norms"][-1]
        table.add_row(
            network["name"] + ("" if network["exact"] else " (estimates from below)"),
            f"{min(last):.4g}",
            f"{max(last):.4g}",
            f"{min(map(min, network['norms'])):.4g}",
            f"10^{network['log10_bounds'][-1]:.2f}",
            f"{max(map(max, network['defects'])):.2g}",
        )
    return table
