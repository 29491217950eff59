"""The regulariser's effect on the gradients' upper bound: `python benchmarks/paper/regulariser.py`.

H2 with 16 layers and 4 features on the double circles, trained with
`α h/2 Σ_j (‖K_{j+1} - K_j‖² + ‖b_{j+1} - b_j‖²)` for some α. Written is `results/regulariser.md`:
the bound on `‖M_N‖` from the weights, the largest `‖M_N‖` measured on 100 test samples, and the
accuracy, over the seeds.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence

import torch
from record import add_options, chosen, count, fill, spread
from torch import Tensor, nn
from torch.nn import functional as F

from hdnn_dist.analysis import log_bounds, sensitivities
from hdnn_dist.data import epoch_order, load_features, load_labels
from hdnn_dist.model import Layers
from hdnn_dist.spec import DataSpec

ALPHAS = (0.0, 5e-4, 5e-3, 5e-2)
COLUMNS = ("upper bound on ‖M_N‖, log10", "largest ‖M_N‖ measured, log10", "test accuracy, %")
LAYERS, FEATURES, H, LR, BATCH = 16, 4, 0.2, 0.05, 125


def load(part: str) -> tuple[Tensor, Tensor]:
    """States `y_0 = (x, 0)` `(4000, 4)` and labels of a part of the double circles."""
    spec = DataSpec(name="double_circles")
    x = torch.from_numpy(load_features(spec, part, range(2)))
    return F.pad(x, (0, FEATURES - 2)), torch.from_numpy(load_labels(spec, part))


def train(alpha: float, seed: int, epochs: int) -> tuple[Layers, nn.Linear]:
    """The layers and the readout after training."""
    torch.manual_seed(seed)
    model, readout = Layers("H2", FEATURES, LAYERS, H), nn.Linear(FEATURES, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *readout.parameters()], lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    y, labels = load("train")
    for epoch in range(epochs):
        order = torch.from_numpy(epoch_order(seed, epoch, len(y)))
        for index in order[: len(y) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(readout(model(y[index])), labels[index])
            (loss + alpha * model.regulariser()).backward()
            optimizer.step()
        schedule.step()
    return model, readout


def measure(model: Layers, readout: nn.Linear) -> tuple[float, float, float]:
    """log10 of the bound, log10 of the largest `‖M_N‖`, accuracy in percent."""
    y, labels = load("test")
    with torch.no_grad():
        accuracy = (readout(model(y)).argmax(1) == labels).double().mean().item()
    model = model.double().requires_grad_(False)
    weights, ln10 = model.weights(), torch.log(torch.tensor(10.0)).item()
    steps = [lambda y, w=w: model.member.step(y, w) for w in weights]
    norms = sensitivities(steps, y[:100].double()).norms[-1]
    bound = log_bounds(model.member, weights)[-1]
    return bound / ln10, norms.max().log10().item(), 100 * accuracy


def seeds(alpha: str, o: Namespace) -> dict[str, list[float]]:
    """What is measured for a weight, over the seeds."""
    rows = [measure(*train(float(alpha), seed, o.epochs)) for seed in range(o.seeds)]
    return dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))


def table(cells: Mapping[str, dict[str, list[float]]]) -> str:
    """Mean ± standard deviation over the seeds, and in brackets the least."""
    lines = ["| α | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for alpha, found in cells.items():
        row = " | ".join(spread(found[column], ".2f") for column in COLUMNS)
        lines.append(f"| {alpha} | {row} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, and write `regulariser.json` and `regulariser.md`."""
    parser = ArgumentParser(description="the regulariser's effect on the upper bound")
    parser.add_argument("--epochs", type=count, default=50)
    parser.add_argument("--seeds", type=count, default=3)
    add_options(parser)
    o = parser.parse_args(argv)
    settings = chosen(o, "epochs", "seeds") | {
        "layers": LAYERS,
        "features": FEATURES,
        "h": H,
        "lr": LR,
        "batch": BATCH,
    }
    fill(parser, o, "regulariser", settings, map(str, ALPHAS), seeds, table)


if __name__ == "__main__":
    main()
