"""The paper's 2-D classification table: the family's members on three sets, over the depth.

    python benchmarks/paper/two_d.py

A net is `Layers` on `y_0 = (x, 0)` with 4 features and a linear readout, trained jointly. All seeds
of all sets train at once, as one stacked net under `torch.func.vmap`. Finished cells are kept in
`two_d.json` and not run again, so an interrupted table goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from hdnn_dist.data import Part, epoch_order, load_features, load_labels
from hdnn_dist.model import Layers
from hdnn_dist.spec import DataSpec

SETS = ("swiss_roll", "double_circles", "double_moons")
MODELS = ("MS1", "MS2", "MS3", "H1-J1", "H1-J2", "H2")
BATCH = 125
COLUMNS = (0, 2)  # of y = [p, q]: one coordinate enters p, the other q

Cells = dict[str, dict[str, list[float]]]


class Net(nn.Module):
    """`x -> y_0 = x in two of four features, else 0 -> layers -> W y + c`."""

    def __init__(self, model: str, layers: int, h: float) -> None:
        super().__init__()
        member, _, J = model.partition("-")
        self.hamiltonian = Layers(member, 4, layers, h, J=J or None)
        self.readout = nn.Linear(4, 2)
        for name, weight in self.hamiltonian.named_parameters():
            nn.init.normal_(weight)
            if self.hamiltonian.member.upper and name == "K":
                weight.data.triu_(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `(B, 2)` of points `(B, 2)`, and the regulariser before its α."""
        y = x.new_zeros(len(x), 4).index_copy(1, torch.tensor(COLUMNS), x)
        return self.readout(self.hamiltonian(y)), self.hamiltonian.regulariser()


def load(name: str, part: Part) -> tuple[Tensor, Tensor]:
    """Points `(4000, 2)` and classes `(4000,)` of a part of a set."""
    spec = DataSpec(name=name)  # type: ignore[arg-type]
    return torch.from_numpy(load_features(spec, part, (0, 1))), torch.from_numpy(
        load_labels(spec, part)
    )


def train(model: str, layers: int, o: argparse.Namespace) -> dict[str, list[float]]:
    """Test accuracy in percent by set, one for each seed."""
    torch.set_num_threads(1)
    replicas = [(name, seed) for name in o.sets for seed in range(o.seeds)]
    nets = []
    for _, seed in replicas:
        torch.manual_seed(seed)
        nets.append(Net(model, layers, o.T / layers))
    stacked, constants = stack_module_state(nets)  # type: ignore[arg-type]
    weights = {name: w.detach() for name, w in stacked.items()}
    net = vmap(lambda w, c, x: functional_call(nets[0], (w, c), (x,)))

    def objective(w: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        score, roughness = net(w, constants, x)
        # The sum of the replicas' means: each has the gradient of its own loss.
        loss = F.cross_entropy(score.flatten(0, 1), label.flatten()) * len(replicas)
        return loss + o.alpha * roughness.sum()

    parts = {part: [load(name, part) for name, _ in replicas] for part in ("train", "test")}
    x, label = (torch.stack(z) for z in zip(*parts["train"], strict=True))
    # Traced once into plain operations: on tensors this small, vmap's and autograd's own work
    # would take three quarters of the time.
    gradient = make_fx(grad(objective))(weights, x[:, :BATCH], label[:, :BATCH])

    readout = [w for name, w in weights.items() if name.startswith("readout")]
    layered = [w for name, w in weights.items() if not name.startswith("readout")]
    adam = torch.optim.Adam(
        [{"params": layered}, {"params": readout, "weight_decay": 1e-4}], lr=o.lr, foreach=True
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, o.epochs * (x.shape[1] // BATCH))
    row = torch.arange(len(replicas))[:, None]
    for epoch in range(o.epochs):
        orders = [torch.from_numpy(epoch_order(seed, epoch, x.shape[1])) for _, seed in replicas]
        for batch in torch.stack(orders).split(BATCH, 1):
            for name, g in gradient(weights, x[row, batch], label[row, batch]).items():
                weights[name].grad = g
            adam.step()
            cosine.step()
    x, label = (torch.stack(z) for z in zip(*parts["test"], strict=True))
    with torch.no_grad():
        right = (net(weights, constants, x)[0].argmax(-1) == label).double().mean(1) * 100
    return {name: right[k * o.seeds : (k + 1) * o.seeds].tolist() for k, name in enumerate(o.sets)}


def table(cells: Cells, sets: Sequence[str], models: Sequence[str], depths: Sequence[int]) -> str:
    """Mean ± standard deviation over the seeds, and in brackets the worst; "-": not run."""
    lines = []
    for name in sets:
        lines += [f"### {name}", "", "| layers | " + " | ".join(models) + " |"]
        lines += ["|---:|" + "---|" * len(models)]
        for n in depths:
            seeds = [cells.get(f"{model} {n}", {}).get(name) for model in models]
            row = [f"{mean(r):.1f} ± {pstdev(r):.1f} ({min(r):.1f})" if r else "-" for r in seeds]
            lines.append(f"| {n} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and write `two_d.json` and `two_d.md`."""
    parser = argparse.ArgumentParser(description="the 2-D sets over the depth")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--layers", nargs="+", type=int, default=(4, 8, 16, 32, 64))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--alpha", type=float, default=5e-4)
    parser.add_argument("--T", type=float, default=2.0, help="h = T / layers")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    o = parser.parse_args(argv)
    o.out.mkdir(parents=True, exist_ok=True)
    file = o.out / "two_d.json"
    settings = {name: getattr(o, name) for name in ("sets", "seeds", "epochs", "lr", "alpha", "T")}
    settings["sets"] = list(o.sets)
    record = json.loads(file.read_text()) if file.exists() else {"settings": settings, "cells": {}}
    if record["settings"] != settings:
        parser.error(f"{file} has {record['settings']}, not {settings}: give another --out")
    cells = record["cells"]
    for n in o.layers:
        for model in o.models:
            if f"{model} {n}" in cells:
                continue
            start = time.perf_counter()
            cells[f"{model} {n}"] = train(model, n, o)
            file.write_text(json.dumps(record, indent=1) + "\n")
            (o.out / "two_d.md").write_text(table(cells, o.sets, MODELS, o.layers))
            seconds = time.perf_counter() - start
            means = {name: round(mean(r), 1) for name, r in cells[f"{model} {n}"].items()}
            print(f"{model} {n} layers: {means}, {seconds:.0f} s", flush=True)
    print(table(cells, o.sets, MODELS, o.layers))


if __name__ == "__main__":
    main()
