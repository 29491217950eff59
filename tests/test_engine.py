from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacrev

from hdnn_dist import engine
from hdnn_dist.errors import UserError
from hdnn_dist.family import FAMILY
from hdnn_dist.hamiltonian import ACTIVATIONS, Activation, activation_of
from hdnn_dist.job import Job
from hdnn_dist.model import HDNN, Layers
from hdnn_dist.sparsity import BlockPattern
from hdnn_dist.testing import assert_adjoint, assert_close, assert_respects
from tests.strategies import edges, jobs

STAR = BlockPattern(((0, 1, 2, 3), (0, 1), (0, 2), (0, 3)))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layers(member: str, depth: int = 5, **options: object) -> Layers:
    torch.manual_seed(1)
    net = Layers(member, 6, depth, h=0.3, **options).double()
    for weight in net.parameters():
        torch.nn.init.normal_(weight)
    return net


def gradients(net: Layers, y: Tensor, result: Tensor, y_bar: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result, [y, *net.parameters()], y_bar))


CASES = [
    ("H1", {}),
    ("H1", {"J": "J2"}),
    ("H1", {"J": torch.ones(5, 6, 6).triu(1) - torch.ones(5, 6, 6).tril(-1)}),
    ("H2", {}),
    ("H2", {"X": torch.eye(3) + 0.3 * torch.ones(3, 3).tril(), "train_X": True}),
    ("H2", {"activation": "elu"}),
    ("MS1", {}),
    ("MS2", {}),
    ("MS3", {}),
]


@pytest.mark.parametrize(("member", "options"), CASES)
@pytest.mark.parametrize("activations", ["store", "recompute"])
@pytest.mark.parametrize("buffer", [engine.BUFFER, 1])
def test_the_stack_is_its_layers_one_by_one(
    member: str,
    options: dict[str, object],
    activations: str,
    buffer: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "BUFFER", buffer)  # 1: a chunk is a layer
    if activations == "recompute" and member in ("H1", "MS2"):
        with pytest.raises(UserError, match="no closed inverse"):
            layers(member, activations=activations, **options)
        return
    net = layers(member, activations=activations, **options)
    y, y_bar = draw(7, 6).requires_grad_(), draw(7, 6)
    for _ in range(2):  # the second time in buffers that the first has left
        result, expected = net(y), net.propagate(y)[-1]
        assert_close(result, expected, "y_N", 1e-13)
        found = gradients(net, y, result, y_bar)
        for ours, theirs in zip(found, gradients(net, y, expected, y_bar), strict=True):
            assert_close(ours, theirs, "a gradient", 1e-12)


@pytest.mark.parametrize("member", FAMILY)
def test_gradients_and_their_gradients_against_finite_differences(member: str) -> None:
    net = layers(member, depth=2)
    names = [name for name, _ in net.named_parameters()]

    def call(y: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (y,))

    inputs = (draw(2, 6).requires_grad_(), *(w.detach().requires_grad_() for w in net.parameters()))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_it_can_be_differentiated_and_mapped_by_torch_func() -> None:
    net, y = layers("H2"), draw(4, 6)
    one = jacrev(lambda y: net(y[None])[0])(y[0])
    assert_close(one, jacrev(lambda y: net.propagate(y[None])[-1][0])(y[0]), "the Jacobian", 1e-12)
    assert_close(torch.vmap(lambda y: net(y[None])[0])(y), net(y), "each sample for itself", 1e-12)


def test_passes_under_way_at_once_do_not_share_their_buffers() -> None:
    net, y, other = layers("H2"), draw(7, 6).requires_grad_(), draw(7, 6).requires_grad_()
    first, second = net(y), net(other)
    net(y.detach())
    for x, result in ((y, first), (other, second)):
        [again] = torch.autograd.grad(result, [x], torch.ones_like(x), retain_graph=True)
        [found] = torch.autograd.grad(result, [x], torch.ones_like(x))
        [expected] = torch.autograd.grad(net.propagate(x)[-1], [x], torch.ones_like(x))
        assert torch.equal(again, found)
        assert_close(found, expected, "ȳ_0", 1e-12)


def test_buffers_are_used_again_and_let_go_with_another_batch() -> None:
    buffers, like = engine.Buffers(), draw(1)
    first = buffers.take(3, like, 2, 5)
    buffers.give([first])
    assert buffers.take(3, like, 2, 5) is first
    assert buffers.take(3, like, 2, 4).shape == (3, 2, 4)
    buffers.give([first])  # of a size that is no longer asked for
    assert buffers.take(3, like, 2, 5) is not first
    assert copy.deepcopy(buffers) is not buffers


@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_an_activation_of_ones_own(activations: str) -> None:
    tanh = ACTIVATIONS["tanh"]
    own = Activation(tanh.value, tanh.slope, tanh.integral)
    net, other = (layers("H2", activation=σ, activations=activations) for σ in (own, "tanh"))
    y = draw(3, 6)
    assert_close(net(y), other(y), "y_N", 1e-13)


def test_tanh_in_single_precision_is_right_to_two_roundings_of_one() -> None:
    a = torch.cat([torch.linspace(-20, 20, 4001), torch.logspace(-8, 0, 100), torch.tensor([0.0])])
    s = 2 * a
    engine._kernels(activation_of("tanh"), torch.float32).value(s)
    assert (s.double() - a.double().tanh()).abs().max() <= 2 * torch.finfo(torch.float32).eps


@given(edges([f"a{i}" for i in range(5)]), st.integers(1, 3), st.sampled_from([False, True]))
def test_rows_are_the_blocks_of_a_matrix(links: list[list[str]], d: int, recompute: bool) -> None:
    pairs = [(int(a[1]), int(b[1])) for a, b in links]
    pattern = BlockPattern.of(5, [*pairs, *((i, i) for i in range(5))])
    rows = engine.Rows.of(pattern, d)
    L, n, B = 3, 5 * d, 4
    dense = draw(L, n, n) * pattern.mask([d] * 5)
    blocks = rows.take(dense)
    assert torch.equal(rows.put(blocks), dense)
    assert_adjoint(rows.take, rows.put, draw(L, n, n), draw(*blocks.shape))

    member = FAMILY["H2"](0.3, activation_of("tanh"))
    Kp, Kq = blocks, rows.take(draw(L, n, n))
    operands = [w.requires_grad_() for w in (Kq, draw(L, n), Kp.clone(), draw(L, n))]
    y, y_bar = draw(2 * n, B).requires_grad_(), draw(2 * n, B)
    weights = dict(zip(("Kq", "bq", "Kp", "bp"), operands, strict=True))
    stack = engine.Stack.of(member, False, rows, recompute=recompute)
    result, expected = engine.run(stack, member, y, weights), engine.plain(stack, y, operands)
    assert_close(result, expected, "y_N", 1e-12)
    found = torch.autograd.grad(result, [y, *operands], y_bar)
    for ours, theirs in zip(
        found, torch.autograd.grad(expected, [y, *operands], y_bar), strict=True
    ):
        assert_close(ours, theirs, "a gradient", 1e-12)
    assert_respects(rows.put(found[1]), pattern, (d,) * 5)


@pytest.mark.parametrize("by_rows", [False, True])
@given(job=jobs())
def test_the_fast_dense_model_is_the_plain_one(
    by_rows: bool, job: Job, device: torch.device
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "rows_are_faster", lambda *_: by_rows)
        models = (HDNN(job.architecture, job.dtype, fast) for fast in (False, True))
        plain, fast = (model.to(device) for model in models)
        x = draw(3, job.data.features).to(device)
        assert_close(fast(x), plain(x), "scores")
        for model in (plain, fast):
            model(x).square().sum().backward()
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, f"the gradient of {name}")


def test_rows_are_chosen_for_many_agents_and_not_for_a_star() -> None:
    ring = BlockPattern.of(64, ((i, (i + k) % 64) for i in range(64) for k in (-1, 0, 1)))
    on = torch.device("cpu"), torch.float32
    assert engine.rows_are_faster(ring, 64, 128, *on)
    assert not engine.rows_are_faster(STAR, 64, 128, *on)
    assert not engine.rows_are_faster(BlockPattern.identity(1), 8, 128, *on)


@pytest.fixture(params=["older", "newer"])
def tf32(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Have torch use TF32, as it is told today or as it was."""
    told = torch.backends.cuda.matmul
    if request.param == "older":
        yield lambda: torch.set_float32_matmul_precision("high")
        torch.set_float32_matmul_precision("highest")
    elif hasattr(told, "fp32_precision"):
        before = told.fp32_precision
        yield lambda: setattr(told, "fp32_precision", "tf32")
        told.fp32_precision = before
    else:
        pytest.skip(f"torch {torch.__version__} has but the older way")


def test_a_gpu_wants_larger_blocks_for_rows(tf32: Callable[[], None]) -> None:
    """As measured: docs/performance.md."""
    near = (-1, 0, 1)
    small, large = (
        BlockPattern.of(M, ((i, (i + k) % M) for i in range(M) for k in near)) for M in (8, 64)
    )
    cases = [(small, 16, 512), (small, 128, 4096), (large, 64, 2048)]

    def faster(dtype: torch.dtype) -> list[bool]:
        return [engine.rows_are_faster(*case, torch.device("cuda"), dtype) for case in cases]

    assert faster(torch.float32) == [False, True, True]
    tf32()
    assert faster(torch.float32) == [False, False, True]
    assert faster(torch.float64) == [False, True, True]
