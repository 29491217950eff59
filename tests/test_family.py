from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.utils import prune

from hdnn_dist.errors import UserError
from hdnn_dist.family import FAMILY, H1, H2, MS1, roughness, roughness_gradient
from hdnn_dist.hamiltonian import ACTIVATIONS, J1, J2, Activation
from hdnn_dist.model import Layers
from hdnn_dist.testing import assert_close, assert_symplectic

n, LAYERS = 3, 5
TANH = ACTIVATIONS["tanh"]
Numbers = dict[str, np.ndarray]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def random_layers(member: str, layers: int = LAYERS, **options: object) -> Layers:
    torch.manual_seed(1)
    net = Layers(member, 2 * n, layers, h=0.3, **options).double()
    for weight in net.parameters():
        torch.nn.init.normal_(weight)
    return net


# --- the papers' formulas, written once more, for one sample as a column ------------------------


def paper_H1(y: np.ndarray, w: Numbers, h: float) -> np.ndarray:
    return y + h * w["J"] @ w["K"].T @ np.tanh(w["K"] @ y + w["b"])


def paper_H2(y: np.ndarray, w: Numbers, h: float) -> np.ndarray:
    """Galimberti et al.: y⁺ = y + h J Kᵀ σ(K (p⁺, q) + b), J = [[0, -Xᵀ], [X, 0]]."""
    zero, X = np.zeros((n, n)), w["X"]
    J = np.block([[zero, -X.T], [X, zero]])
    K = np.block([[w["Kp"], zero], [zero, w["Kq"]]])
    b = np.concatenate([w["bp"], w["bq"]])
    new_p = (y + h * J @ K.T @ np.tanh(K @ y + b))[:n]
    mixed = np.concatenate([new_p, y[n:]])
    return y + h * J @ K.T @ np.tanh(K @ mixed + b)


def paper_MS1(y: np.ndarray, w: Numbers, h: float) -> np.ndarray:
    p = y[:n] + h * np.tanh(w["K"] @ y[n:] + w["bp"])
    return np.concatenate([p, y[n:] + h * np.tanh(-w["K"].T @ p + w["bq"])])


def paper_MS2(y: np.ndarray, w: Numbers, h: float) -> np.ndarray:
    A = np.triu(w["K"], 1)
    return y + h * np.tanh((A - A.T) @ y + w["b"])


def paper_MS3(y: np.ndarray, w: Numbers, h: float) -> np.ndarray:
    K1, K2 = w["Kq"], w["Kp"]
    p = y[:n] + h * K1.T @ np.tanh(K1 @ y[n:] + w["bq"])
    return np.concatenate([p, y[n:] - h * K2.T @ np.tanh(K2 @ p + w["bp"])])


@pytest.mark.parametrize(
    ("member", "paper", "options"),
    [
        ("H1", paper_H1, {"J": "J1"}),
        ("H1", paper_H1, {"J": "J2"}),
        ("H1", paper_H1, {"J": torch.ones(LAYERS, 6, 6).triu(1).mul(0.5)}),
        ("H2", paper_H2, {"X": torch.eye(n) + 0.3 * torch.ones(n, n).tril()}),
        ("MS1", paper_MS1, {}),
        ("MS2", paper_MS2, {}),
        ("MS3", paper_MS3, {}),
    ],
)
def test_forward_is_what_the_papers_write(
    member: str, paper: Callable[..., np.ndarray], options: dict[str, object]
) -> None:
    if isinstance(options.get("J"), Tensor):
        options = {"J": options["J"] - options["J"].mT}  # type: ignore[attr-defined]
    net = random_layers(member, **options)
    y = draw(2, 2 * n)
    stacked = {name: w.detach().numpy() for name, w in net.named_parameters()}
    stacked |= {name: w.numpy() for name, w in net.named_buffers()}
    rows = []
    for sample in y.numpy():
        for j in range(LAYERS):
            layer = {
                k: w[j] if w.shape[0] == LAYERS and k != "X" else w for k, w in stacked.items()
            }
            sample = paper(sample, layer, 0.3)
        rows.append(sample)
    assert_close(net(y), torch.from_numpy(np.stack(rows)), f"{member}, forward", 1e-13)


# --- members of the general form -----------------------------------------------------------------


@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("options", [{}, {"X": torch.eye(n) + 0.2 * torch.ones(n, n).triu(1)}])
def test_a_short_step_follows_the_general_form(member: str, options: dict[str, Tensor]) -> None:
    # (y⁺ - y)/h -> J Kᵀ σ(K y + b), whatever the scheme and the constraint.
    if options and member != "H2":
        pytest.skip("only H2 has an X")
    w = random_layers(member, **options).weights()[0]
    scheme, y = FAMILY[member](1e-7, TANH), draw(4, 2 * n)
    J, K, b = scheme.J(w), scheme.K(w), scheme.b(w)
    field = torch.tanh(y @ K.mT + b) @ K @ J.mT
    assert_close((scheme.step(y, w) - y) / 1e-7, field, "ẏ", 1e-5)


@pytest.mark.parametrize("member", ["MS1", "MS2"])
def test_J_is_what_the_constraint_makes_it(member: str) -> None:
    w = random_layers(member).weights()[0]
    scheme = FAMILY[member](0.1, TANH)
    assert_close(scheme.J(w) @ scheme.K(w).mT, torch.eye(2 * n), "J Kᵀ", 1e-9)
    assert_close(scheme.K(w), -scheme.K(w).mT, "K is antisymmetric")


def test_MS3_is_H2_with_X_minus_one() -> None:
    w, y = random_layers("MS3").weights()[0], draw(4, 2 * n)
    same = H2(0.3, TANH).step(y, {**w, "X": -torch.eye(n).double()})
    assert_close(FAMILY["MS3"](0.3, TANH).step(y, w), same, "MS3")


def test_MS1_is_forward_euler_taken_half_by_half() -> None:
    # Its Verlet step uses the new p where MS2's forward Euler would use the old one.
    w, y = random_layers("MS1").weights()[0], draw(4, 2 * n)
    scheme = MS1(0.3, TANH)
    K, b = scheme.K(w), scheme.b(w)
    p = (y + 0.3 * torch.tanh(y @ K.mT + b))[:, :n]
    mixed = torch.cat([p, y[:, n:]], 1)
    q = (y + 0.3 * torch.tanh(mixed @ K.mT + b))[:, n:]
    assert_close(scheme.step(y, w), torch.cat([p, q], 1), "MS1")


# --- what is proved ------------------------------------------------------------------------------


def sensitivity(net: Layers) -> Tensor:
    """The BSM `M[a, b] = ∂y_N[b]/∂y_0[a]`."""
    A = jacrev(lambda y: net(y[None])[0])(draw(2 * n))
    return A.mT.detach()


@pytest.mark.parametrize("member", ["H2", "MS3"])
def test_symplectic_at_depth_256(member: str) -> None:
    options = {"X": torch.eye(n) + 0.2 * draw(n, n).float()} if member == "H2" else {}
    net = random_layers(member, 256, **options)
    net.member = FAMILY[member](0.02, TANH)
    assert_symplectic(sensitivity(net), net.member.J(net.weights()[0]), 1e-10)


def test_H1_is_not_symplectic() -> None:
    net = random_layers("H1", 16)
    M, J = sensitivity(net), J1(torch.empty(2 * n, dtype=torch.float64))
    assert (M.mT @ J @ M - J).abs().max() > 0.1


@pytest.mark.parametrize("member", ["H2", "MS1", "MS3"])
def test_the_inverse_undoes_the_step(member: str) -> None:
    net, y = random_layers(member), draw(4, 2 * n)
    for w in net.weights():
        assert_close(net.member.inverse(net.member.step(y, w), w), y, "y")


@pytest.mark.parametrize("member", ["H1", "MS2"])
def test_forward_euler_has_no_inverse(member: str) -> None:
    net = random_layers(member)
    with pytest.raises(NotImplementedError, match=member):
        net.member.inverse(draw(1, 2 * n), net.weights()[0])


def test_the_energy_error_of_small_steps_is_of_first_order() -> None:
    # Symplectic Euler keeps the energy to O(h): halving the step halves the drift.
    w, y0 = random_layers("H2").weights()[0], draw(1, 2 * n)

    def drift(h: float) -> float:
        scheme, y = H2(h, TANH), y0
        for _ in range(round(1 / h)):
            y = scheme.step(y, w)
        return abs(scheme.energy(y, w) - scheme.energy(y0, w)).item()

    assert drift(1e-3) < 0.02 * H2(1e-3, TANH).energy(y0, w).item()
    assert 1.8 < drift(1e-3) / drift(5e-4) < 2.2


# --- as modules ----------------------------------------------------------------------------------


@given(st.sampled_from([*FAMILY]), st.sampled_from([*ACTIVATIONS]))
def test_images_are_vectors_pixel_by_pixel(member: str, activation: str) -> None:
    net = Layers(member, 4, 2, activation=activation)
    y = torch.randn(2, 4, 3, 5)
    pixels = net(y.movedim(1, -1).reshape(-1, 4)).reshape(2, 3, 5, 4).movedim(-1, 1)
    assert_close(net(y), pixels, "images", 1e-5)


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        (("H3", 4, 2), "use one of"),
        (("H2", 5, 2), "add one"),
        (("H2", 4, 2, 0.1, "swish"), "use tanh"),
        (("H2", 4, 2, 0.1, "tanh", "J1"), "use H1"),
        (("H1", 4, 2, 0.1, "tanh", "J3"), "J1, J2"),
        (("H1", 4, 2, 0.1, "tanh", torch.ones(4, 4)), "Jᵀ = -J"),
        (("H1", 4, 2, 0.1, "tanh", torch.zeros(3, 3)), r"\(4, 4\)"),
        (("MS1", 4, 2, 0.1, "tanh", None, torch.eye(2)), "use H2"),
        (("H2", 4, 0), "positive"),
        (("H2", 4, 2, -0.1), "positive"),
        (("H2", 4, 2, 0.1, "tanh", None, torch.eye(3)), r"\(2, 2\)"),
    ],
)
def test_wrong_modules_are_refused(arguments: tuple[object, ...], mend: str) -> None:
    with pytest.raises(UserError, match=mend):
        Layers(*arguments)  # type: ignore[arg-type]


def test_modules_are_copied_saved_and_pruned(tmp_path: Path) -> None:
    net, y = Layers("H2", 4, 2), torch.randn(3, 4)
    torch.save(nn.Sequential(net), tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(loaded(y), net(y))
    assert torch.equal(copy.deepcopy(net)(y), net(y))
    assert repr(net) == "Layers(H2, features=4, layers=2, h=0.1)"
    prune.l1_unstructured(net, "Kp", amount=0.5)
    assert not torch.equal(net(y), loaded(y))


def test_matrices_may_come_as_numpy_or_lists() -> None:
    J, y = np.array([[0.0, 1.0], [-1.0, 0.0]]), torch.randn(3, 2)
    torch.manual_seed(0)
    first = Layers("H1", 2, 1, J=J)
    torch.manual_seed(0)
    assert torch.equal(first(y), Layers("H1", 2, 1, J=J.tolist())(y))
    X = np.array([[2]])
    assert Layers("H2", 2, 1, X=X, train_X=True).X.requires_grad


def test_the_lower_triangle_of_MS2_does_not_count() -> None:
    net = random_layers("MS2")
    y, before, roughness = draw(2, 2 * n), None, net.regulariser()
    before = net(y)
    with torch.no_grad():
        net.K += torch.ones(2 * n, 2 * n).tril()
    assert torch.equal(net(y), before)
    assert torch.equal(net.regulariser(), roughness)


def softsign(**changes: object) -> Activation:
    parts: dict[str, object] = {
        "value": lambda x: x / (1 + x.abs()),
        "slope": lambda s: (1 - s.abs()) ** 2,
        "integral": lambda x: x.abs() - x.abs().log1p(),
    }
    return Activation(**(parts | changes))  # type: ignore[arg-type]


def test_an_activation_of_ones_own() -> None:
    y = draw(3, 4)
    net = Layers("MS1", 4, 2, activation=softsign()).double()
    assert net(y).shape == y.shape
    assert torch.isfinite(net.member.energy(y, net.weights()[0])).all()


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (torch.relu, "is a builtin_function_or_method"),
        (softsign(slope=lambda x: 1 / (1 + x.abs()) ** 2), "slope"),
        (softsign(steepest=0.5), "steepest"),
        (softsign(integral=lambda x: x**2), "integral"),
        (softsign(value=lambda x: x.no_such_thing()), "fails: 'Tensor' object has no"),
    ],
)
def test_an_activation_that_contradicts_itself_is_refused(activation: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Layers("H2", 4, 2, activation=activation)


def test_X_can_be_trained_and_J_cannot() -> None:
    assert "X" in dict(Layers("H2", 4, 2, train_X=True).named_parameters())
    assert "J" in dict(Layers("H1", 4, 2, J="J2").named_buffers())


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 4)])
def test_states_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"\(B, 4\)"):
        Layers("H2", 4, 1)(torch.zeros(shape))


def test_J2_by_hand() -> None:
    expected = torch.tensor([[0.0, 1, 1], [-1, 0, 1], [-1, -1, 0]])
    assert_close(J2(torch.empty(3)), expected, "J2")
    assert_close(H1(0.1, TANH).J({"b": torch.empty(2)}), torch.tensor([[0.0, 1], [-1, 0]]), "J1")


def test_roughness_and_its_gradient() -> None:
    path = draw(5, 2, 3).requires_grad_()
    value = roughness(path, 0.5)
    explicit = sum(((path[j + 1] - path[j]) ** 2).sum() for j in range(4)) * 0.25
    assert_close(value, explicit, "h/2 Σ‖w_{j+1} - w_j‖²")
    (expected,) = torch.autograd.grad(value, path)
    assert_close(roughness_gradient(path.detach(), 0.5), expected, "gradient")
    assert_close(roughness_gradient(draw(1, 3), 0.5), torch.zeros(1, 3), "a single layer")
