"""The paper's MNIST table: a convolution, layers of the family on every pixel, a linear readout.

    python benchmarks/paper/mnist.py --data-dir FOLDER_OF_THE_IDX_FILES --jobs 2

Against the same net without the layers. Each training image is moved by up to `--shift` pixels.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence

import torch
from record import add_options, chosen, count, fill, grid, spread
from torch import Tensor, nn
from torch.nn import functional as F

from hdnn_dist.data import (
    Part,
    background,
    epoch_order,
    load_features,
    load_labels,
    shift_images,
    shifts,
)
from hdnn_dist.model import Layers
from hdnn_dist.spec import DataSpec

H = {"MS1": 0.4, "H1-J1": 0.4, "H2": 0.4}
MODELS = tuple(H)
CHANNELS, BATCH = 8, 100


class Net(nn.Module):
    """`x -> convolution -> layers on the 8 channels of every pixel -> W y + c`."""

    def __init__(self, model: str, layers: int, o: Namespace) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, CHANNELS, o.kernel, padding=o.kernel // 2)
        self.convolution.weight.data *= 1.5  # so that σ sees more than its linear part
        self.hamiltonian: Layers | None = None
        if layers:
            member, _, J = model.partition("-")
            self.hamiltonian = Layers(member, CHANNELS, layers, H[model], J=J or None)
            for weight in self.hamiltonian.parameters():
                nn.init.normal_(weight)
        self.readout = nn.Linear(CHANNELS * 28 * 28, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores `(B, 10)` of images `(B, 1, 28, 28)`."""
        y = self.convolution(x)
        return self.readout((self.hamiltonian(y) if self.hamiltonian else y).flatten(1))


def load(o: Namespace, part: Part) -> tuple[Tensor, Tensor]:
    """Images `(samples, 1, 28, 28)` and labels of a part of MNIST."""
    spec = DataSpec(name="mnist", dir=o.data_dir, train_samples=o.samples)
    x = torch.from_numpy(load_features(spec, part, range(784)))
    return x.view(-1, 1, 28, 28), torch.from_numpy(load_labels(spec, part))


def batches(
    x: Tensor, labels: Tensor, epoch: int, o: Namespace, seed: int
) -> Iterator[list[Tensor]]:
    """Shifted images and labels, batch by batch."""
    order = torch.from_numpy(epoch_order(seed, epoch, len(x)))
    for k, batch in enumerate(order[: len(x) // BATCH * BATCH].split(BATCH)):
        moves = shifts(seed, epoch * len(x) + k, BATCH, o.shift)
        moved = shift_images(x[batch].flatten(1).numpy(), (28, 28), moves, background("mnist"))
        yield [torch.from_numpy(moved).view(BATCH, 1, 28, 28), labels[batch]]


def train(key: str, o: Namespace) -> float:
    """Test accuracy in percent of "MODEL LAYERS SEED"."""
    model, layers, seed = key.split()
    torch.manual_seed(int(seed))
    net = Net(model, int(layers), o)
    readout = [*net.readout.parameters()]
    others = [w for name, w in net.named_parameters() if not name.startswith("readout")]
    groups = [
        {"params": readout, "weight_decay": o.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    x, labels = load(o, "train")
    steps = o.epochs * (len(x) // BATCH)
    adam = torch.optim.AdamW(groups)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(adam, [o.lr_readout, o.lr], total_steps=steps)
    for epoch in range(o.epochs):
        for image, label in batches(x, labels, epoch, o, int(seed)):
            adam.zero_grad()
            loss = F.cross_entropy(net(image), label)
            if net.hamiltonian is not None:
                loss = loss + o.alpha * net.hamiltonian.regulariser()
            loss.backward()
            adam.step()
            one_cycle.step()
    x, labels = load(o, "test")
    with torch.no_grad():
        right = [
            net(image).argmax(1) == label
            for image, label in zip(x.split(500), labels.split(500), strict=True)
        ]
    return 100 * torch.cat(right).double().mean().item()


def table(cells: Mapping[str, float]) -> str:
    """Mean ± standard deviation over the seeds, and in brackets the worst; "-": not run."""
    seeds: dict[tuple[str, int], list[float]] = {}
    for key, accuracy in cells.items():
        model, layers, _ = key.split()
        seeds.setdefault((model, int(layers)), []).append(accuracy)
    counts = sorted({len(found) for found in seeds.values()})
    lines = [f"Test accuracy in percent, {' to '.join(map(str, counts))} seeds.", ""]
    lines += grid(MODELS, {n for _, n in seeds if n}, lambda m, n: seeds.get((m, n)), ".2f")
    if without := seeds.get(("none", 0)):
        lines += [f"Without layers: {spread(without, '.2f')}."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and write `mnist.json` and `mnist.md`."""
    parser = ArgumentParser(description="MNIST by convolution, H-DNN and linear readout")
    parser.add_argument("--data-dir", required=True, help="folder of the IDX files")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--layers", nargs="+", type=count, default=(1, 2, 4, 8))
    parser.add_argument("--seeds", type=count, default=2)
    parser.add_argument("--samples", type=count, help="of the training set; default: all")
    parser.add_argument("--kernel", type=count, default=5, help="of the convolution, odd")
    parser.add_argument("--epochs", type=count, default=5)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--lr-readout", type=float, default=0.002)
    parser.add_argument("--weight-decay", type=float, default=1.0, help="of the readout")
    parser.add_argument("--alpha", type=float, default=1e-4)
    parser.add_argument("--shift", type=int, default=1, help="pixels")
    add_options(parser)
    o = parser.parse_args(argv)
    names = ("samples", "kernel", "epochs", "lr", "lr_readout", "weight_decay", "alpha", "shift")
    settings = chosen(o, *names) | {"channels": CHANNELS, "batch": BATCH, "h": H}
    seeds = range(o.seeds)
    keys = [f"none 0 {seed}" for seed in seeds]
    keys += [f"{model} {n} {seed}" for seed in seeds for n in o.layers for model in o.models]
    fill(parser, o, "mnist", settings, keys, train, table)


if __name__ == "__main__":
    main()
