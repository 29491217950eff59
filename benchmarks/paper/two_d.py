"""The paper's 2-D classification table: the family's members on three sets, over the depth.

    python benchmarks/paper/two_d.py --jobs 2

A net is `Layers` on four features and a linear readout, trained jointly. All initial points of all
seeds of all sets train at once, as one stacked net under `torch.func.vmap`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence

import torch
from record import add_options, chosen, count, fill, grid
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from hdnn_dist.data import Part, epoch_order, load_features, load_labels
from hdnn_dist.model import Layers
from hdnn_dist.spec import DataSpec

SETS = ("swiss_roll", "double_circles", "double_moons")
# h = T / layers. Without the factor Kᵀ (J Kᵀ = I) the layers' force is smaller, and needs longer.
T = {"MS1": 6.0, "MS2": 6.0, "MS3": 0.7, "H1-J1": 0.7, "H1-J2": 0.7, "H2": 0.7}
MODELS = tuple(T)
BATCH = 125
# x enters the first entry of p, y the last one of q: of two conjugate pairs (p_k, q_k), each
# coordinate has one to itself. In one and the same pair they do markedly worse.
COLUMNS = (0, 3)
SIZE = 2.0  # standard deviation of what enters
DEVIATIONS = (1.0, 2.0)  # of K and of b at the start


class Net(nn.Module):
    """`x -> y_0 = x in two of four features, else 0 -> layers -> W y + c`."""

    def __init__(self, model: str, layers: int, h: float) -> None:
        super().__init__()
        member, _, J = model.partition("-")
        self.hamiltonian = Layers(member, 4, layers, h, J=J or None)
        self.readout = nn.Linear(4, 2)
        for name, weight in self.hamiltonian.named_parameters():
            nn.init.normal_(weight, std=DEVIATIONS[name.startswith("b")])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `(B, 2)` of points `(B, 2)`, and the regulariser before its α."""
        y = x.new_zeros(len(x), 4).index_copy(1, torch.tensor(COLUMNS), x)
        return self.readout(self.hamiltonian(y)), self.hamiltonian.regulariser()


def load(name: str, part: Part) -> tuple[Tensor, Tensor]:
    """Points `(4000, 2)` of standard deviation 2 in training, and classes `(4000,)`."""
    spec = DataSpec(name=name)  # type: ignore[arg-type]
    scale = SIZE / float(load_features(spec, "train", (0, 1)).std())
    x, labels = load_features(spec, part, (0, 1)), load_labels(spec, part)
    return scale * torch.from_numpy(x), torch.from_numpy(labels)


def train(key: str, o: Namespace) -> dict[str, list[float]]:
    """Test accuracy in percent by set, one for each seed, of "MODEL LAYERS"."""
    model, depth = key.split()
    layers = int(depth)
    starts = [
        (name, seed, k) for name in o.sets for seed in range(o.seeds) for k in range(o.starts)
    ]
    nets = []
    for _, seed, k in starts:
        torch.manual_seed(1000 * k + seed)
        nets.append(Net(model, layers, T[model] / layers))
    stacked, constants = stack_module_state(nets)  # type: ignore[arg-type]
    weights = {name: w.detach() for name, w in stacked.items()}
    net = vmap(lambda w, c, x: functional_call(nets[0], (w, c), (x,)))

    def losses(w: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        score, roughness = net(w, constants, x)
        entropy = F.cross_entropy(score.flatten(0, 1), label.flatten(), reduction="none")
        return entropy.view(label.shape).mean(1) + o.alpha * roughness

    parts = {part: [load(name, part) for name, _, _ in starts] for part in ("train", "test")}
    x, label = (torch.stack(z) for z in zip(*parts["train"], strict=True))
    # The sum has each net's own gradient. Traced once into plain operations: on tensors this small,
    # vmap's and autograd's own work would take three quarters of the time.
    gradient = make_fx(grad(lambda *a: losses(*a).sum()))(weights, x[:, :BATCH], label[:, :BATCH])

    readout = [w for name, w in weights.items() if name.startswith("readout")]
    layered = [w for name, w in weights.items() if not name.startswith("readout")]
    adam = torch.optim.Adam(
        [{"params": layered}, {"params": readout, "weight_decay": 1e-4}], lr=o.lr, foreach=True
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, o.epochs * (x.shape[1] // BATCH))
    row = torch.arange(len(starts))[:, None]
    for epoch in range(o.epochs):
        orders = [torch.from_numpy(epoch_order(seed, epoch, x.shape[1])) for _, seed, _ in starts]
        for batch in torch.stack(orders).split(BATCH, 1):
            for name, g in gradient(weights, x[row, batch], label[row, batch]).items():
                weights[name].grad = g
            adam.step()
            cosine.step()
    with torch.no_grad():
        best = losses(weights, x, label).view(len(o.sets), o.seeds, o.starts).argmin(2)
        x, label = (torch.stack(z) for z in zip(*parts["test"], strict=True))
        right = (net(weights, constants, x)[0].argmax(-1) == label).double().mean(1) * 100
    chosen = right.view(len(o.sets), o.seeds, o.starts).gather(2, best[..., None])[..., 0]
    return dict(zip(o.sets, chosen.tolist(), strict=True))


def table(cells: Mapping[str, dict[str, list[float]]]) -> str:
    """Test accuracy in percent, a table a set."""
    depths = {int(key.split()[1]) for key in cells}
    lines = []
    for name in SETS:
        if any(name in cell for cell in cells.values()):
            lines += [f"### {name}", ""]
            lines += grid(MODELS, depths, lambda m, n, s=name: cells.get(f"{m} {n}", {}).get(s))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and write `two_d.json` and `two_d.md`."""
    parser = ArgumentParser(description="the 2-D sets over the depth")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--layers", nargs="+", type=count, default=(4, 8, 16, 32, 64))
    parser.add_argument("--seeds", type=count, default=5)
    parser.add_argument("--starts", type=count, default=3, help="initial points a seed")
    parser.add_argument("--epochs", type=count, default=50)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--alpha", type=float, default=5e-4)
    add_options(parser)
    o = parser.parse_args(argv)
    settings = chosen(o, "sets", "seeds", "starts", "epochs", "lr", "alpha") | {
        "batch": BATCH,
        "T": T,
        "features of x and y": COLUMNS,
        "deviation of the inputs": SIZE,
        "deviation of K and b at the start": DEVIATIONS,
    }
    keys = [f"{model} {n}" for n in o.layers for model in o.models]
    fill(parser, o, "two_d", settings, keys, train, table)


if __name__ == "__main__":
    main()
