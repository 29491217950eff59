"""The regulariser's effect on the gradients' upper bound: `python benchmarks/paper/regulariser.py`.

H2 with 16 layers and 4 features on the double circles, trained with
`α h/2 Σ_j (‖K_{j+1} - K_j‖² + ‖b_{j+1} - b_j‖²)` for some α. Written is `results/regulariser.md`:
the bound on `‖M_N‖` from the weights, the largest `‖M_N‖` measured on 100 test samples, and the
accuracy, over the seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdnn_dist.analysis import log_bounds, sensitivities
from hdnn_dist.data import epoch_order, load_features, load_labels
from hdnn_dist.model import Layers
from hdnn_dist.spec import DataSpec

ALPHAS = (0.0, 5e-4, 5e-3, 5e-2)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    default = Path(__file__).parent / "results" / "regulariser.md"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = [
        f"H2, {LAYERS} layers, {FEATURES} features, h = {H}, double circles 4000/4000, "
        f"Adam {LR} (cosine), batch {BATCH},",
        f"{arguments.epochs} epochs, no weight decay; mean ± standard deviation over "
        f"{arguments.seeds} seeds.",
        "",
        "| α | upper bound on ‖M_N‖, log10 | largest ‖M_N‖ measured, log10 | test accuracy, % |",
        "|---|---|---|---|",
    ]
    for alpha in ALPHAS:
        rows = torch.tensor(
            [measure(*train(alpha, seed, arguments.epochs)) for seed in range(arguments.seeds)]
        )
        cells = [
            f"{m:.2f} ± {s:.2f}"
            for m, s in zip(rows.mean(0), rows.std(0, correction=0), strict=True)
        ]
        lines.append(f"| {alpha:g} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
