"""Gradients at the first layer, over the depth: H2 against an MLP and a ResNet of equal size.

    python benchmarks/paper/depth.py --jobs 2

Encoder, layers and linear readout on scikit-learn's digits, in float64. Measured is, on a batch,
`‖∂L/∂y_0‖ / ‖∂L/∂y_N‖`, at the initial point and after some steps of Adam: how much of the gradient
at the last layer reaches the first.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from record import add_options, chosen, count, fill, grid
from torch import Tensor, nn
from torch.nn import functional as F

from hdnn_dist.baselines import MLP, ResNet
from hdnn_dist.data import epoch_order, load_features, load_labels
from hdnn_dist.model import Layers
from hdnn_dist.spec import DataSpec

MODELS = ("MLP", "ResNet", "H2", "ResNet-T", "H2-T")  # -T: h = T/layers in place of a constant h
BATCH = 128


class Net(nn.Module):
    """`x -> y_0 = E x + e -> layers -> W y_N + c`."""

    def __init__(self, model: str, layers: int, o: Namespace) -> None:
        super().__init__()
        self.encoder, self.readout = nn.Linear(64, o.features), nn.Linear(o.features, 10)
        h = o.T / layers if model.endswith("-T") else o.h
        self.layers: Layers | MLP
        if model.startswith("H2"):
            self.layers = Layers("H2", o.features, layers, h)
        elif model.startswith("ResNet"):
            self.layers = ResNet(o.features, layers, h)
        else:
            self.layers = MLP(o.features, layers)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores, and the states `y_0 … y_N`."""
        states = self.layers.propagate(self.encoder(x))
        return self.readout(states[-1]), states


def ratio(net: Net, x: Tensor, labels: Tensor) -> float:
    """`‖∂L/∂y_0‖ / ‖∂L/∂y_N‖` on a batch."""
    scores, states = net(x)
    first, last = torch.autograd.grad(F.cross_entropy(scores, labels), [states[0], states[-1]])
    return (first.norm() / last.norm()).item()


def measure(key: str, o: Namespace) -> dict[str, list[float]]:
    """Of "MODEL LAYERS": the ratio before and after training, and the training accuracy in %."""
    model, layers = key.split()
    spec = DataSpec(name="digits")
    x = torch.from_numpy(load_features(spec, "train", range(64))).double()
    labels = torch.from_numpy(load_labels(spec, "train"))
    found: dict[str, list[float]] = {"initial": [], "trained": [], "accuracy": []}
    for seed in range(o.seeds):
        torch.manual_seed(seed)
        net = Net(model, int(layers), o).double()
        found["initial"].append(ratio(net, x[:BATCH], labels[:BATCH]))
        adam = torch.optim.Adam(net.parameters(), lr=o.lr)
        for step in range(o.steps):
            epoch, k = divmod(step, len(x) // BATCH)
            batch = torch.from_numpy(epoch_order(seed, epoch, len(x)))[k * BATCH : (k + 1) * BATCH]
            adam.zero_grad()
            F.cross_entropy(net(x[batch])[0], labels[batch]).backward()
            adam.step()
        found["trained"].append(ratio(net, x[:BATCH], labels[:BATCH]))
        with torch.no_grad():
            right = net(x)[0].argmax(1) == labels
        found["accuracy"].append(100 * right.double().mean().item())
    return found


def table(cells: Mapping[str, dict[str, list[float]]]) -> str:
    """Three tables: log10 of the ratio before and after training, and the accuracy."""
    depths = {int(key.split()[1]) for key in cells}

    def log10(model: str, n: int, when: str) -> list[float]:
        return [math.log10(max(x, 1e-300)) for x in cells.get(f"{model} {n}", {}).get(when, [])]

    return "\n".join(
        [
            *("### log10 of the ratio at the initial point", ""),
            *grid(MODELS, depths, partial(log10, when="initial")),
            *("### log10 of the ratio after training", ""),
            *grid(MODELS, depths, partial(log10, when="trained")),
            *("### training accuracy in percent", ""),
            *grid(MODELS, depths, lambda m, n: cells.get(f"{m} {n}", {}).get("accuracy")),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and write `depth.json` and `depth.md`."""
    parser = ArgumentParser(description="the gradient at the first layer, over the depth")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--layers", nargs="+", type=count, default=(4, 16, 64, 256, 1024))
    parser.add_argument("--features", type=count, default=16)
    parser.add_argument("--h", type=float, default=0.1)
    parser.add_argument("--T", type=float, default=4.0)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--steps", type=count, default=100)
    parser.add_argument("--seeds", type=count, default=3)
    add_options(parser)
    o = parser.parse_args(argv)
    keys = [f"{model} {n}" for n in o.layers for model in o.models]
    settings = chosen(o, "features", "h", "T", "lr", "steps", "seeds") | {"batch": BATCH}
    fill(parser, o, "depth", settings, keys, measure, table)


if __name__ == "__main__":
    main()
