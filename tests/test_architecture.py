from __future__ import annotations

import torch
from hypothesis import given

from hdnn_dist.architecture import Architecture
from hdnn_dist.job import Job
from hdnn_dist.model import HDNN
from hdnn_dist.testing import assert_close, assert_respects
from tests.strategies import in_order, jobs


def parts(architecture: Architecture) -> dict[int, dict[str, torch.Tensor]]:
    return {i: architecture.initial(i, torch.float64) for i in range(len(architecture.names))}


@given(jobs())
def test_every_weight_has_one_owner(job: Job) -> None:
    architecture = job.architecture
    owned = parts(architecture)
    dense = architecture.assemble(owned)
    for i, own in owned.items():
        again = architecture.split(dense, i)
        assert own.keys() == again.keys()
        assert all(torch.equal(own[name], again[name]) for name in own)
    entries = {name: torch.zeros(shape) for name, shape in architecture.shapes().items()}
    for i in owned:
        for name, index in architecture.blocks(i).items():
            entries[name][index] += 1
    assert all(count.max() <= 1 for count in entries.values())


@given(jobs())
def test_initial_weights_have_the_patterns(job: Job) -> None:
    architecture, patterns = job.architecture, job.architecture.patterns
    dense = architecture.assemble(parts(architecture))
    for name in architecture.member.matrices:
        for K, T in zip(in_order(architecture, dense[name]), patterns.T, strict=True):
            assert_respects(K, T, architecture.sizes)
            may = T.mask(architecture.sizes)
            assert (K[may.triu(1) if architecture.member.upper else may] != 0).all()
    for name in architecture.coupling:
        for C in in_order(architecture, dense[name]).reshape(-1, *dense[name].shape[-2:]):
            assert_respects(C, patterns.R, architecture.sizes)
            assert torch.linalg.matrix_rank(C) == len(C)


@given(jobs())
def test_counts_are_those_of_the_weights(job: Job) -> None:
    architecture, model = job.architecture, HDNN(job.architecture)
    agents = range(len(architecture.names))
    trained = [model.get_buffer(name + "_mask").sum() for name, _ in model.named_parameters()]
    assert sum(architecture.count(i) for i in agents) >= sum(trained) - 1e-9
    masked = {name: model.get_buffer(name + "_mask") for name, _ in model.named_parameters()}
    for i in agents:
        own = architecture.split(masked | zeros_for(architecture, masked), i)
        assert architecture.count(i) == sum(int(w.sum()) for w in own.values())
    trainable = dict(model.named_parameters())
    if architecture.member.upper:
        trainable = {
            n: w[:, *torch.triu_indices(*w.shape[1:], 1)] if n == "K" else w
            for n, w in trainable.items()
        }
    assert architecture.count_dense() == sum(w.numel() for w in trainable.values())


def zeros_for(
    architecture: Architecture, known: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return {n: torch.zeros(s) for n, s in architecture.shapes().items() if n not in known}


@given(jobs(max_agents=4))
def test_initial_weights_depend_on_the_seed_and_the_name_alone(job: Job) -> None:
    from dataclasses import replace

    other = replace(job.architecture, seed=job.architecture.seed + 1)
    for i in range(len(job.architecture.names)):
        once, twice = job.architecture.initial(i), job.architecture.initial(i)
        assert all(torch.equal(once[name], twice[name]) for name in once)
        assert not torch.equal(once["encoder.weight"], other.initial(i)["encoder.weight"])
        wide = job.architecture.initial(i, torch.float64)
        assert all(torch.allclose(once[n].double(), wide[n], atol=1e-6) for n in once), (
            "both precisions start at one point"
        )


def test_agents_of_one_shape_start_at_different_points() -> None:
    architecture = Job.load(None).architecture
    values = {tuple(architecture.initial(i)["Kp"].flatten()[:5].tolist()) for i in range(8)}
    assert len(values) == 8


def test_initial_weights_do_not_depend_on_torchs_default_dtype() -> None:
    architecture = Job.load(None).architecture
    expected = architecture.initial(0)
    torch.set_default_dtype(torch.float64)
    try:
        again = architecture.initial(0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(again[n], w) and again[n].dtype == w.dtype for n, w in expected.items())


def test_the_input_of_a_unit_keeps_its_scale() -> None:
    # Gaussian with variance 1 over the inputs: K y has about the variance of y.
    from hdnn_dist.reader import spec_from_dict

    job = Job.of(
        spec_from_dict({"topology": {"agents": 3, "d": 50, "edges": [["a1", "a2"], ["a2", "a3"]]}})
    )
    dense = job.architecture.assemble(parts(job.architecture))
    y = torch.randn(200, 150, dtype=torch.float64)
    assert_close((y @ dense["Kp"][0].T).var(), torch.tensor(1.0).double(), "Var(K y)", 0.1)
