from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdnn_dist.errors import SpecError
from hdnn_dist.job import Job
from hdnn_dist.reader import spec_from_dict
from hdnn_dist.sparsity import BlockPattern, offsets, union
from tests.strategies import jobs

patterns = st.integers(1, 6).flatmap(
    lambda M: st.lists(
        st.frozensets(st.tuples(st.integers(0, M - 1), st.integers(0, M - 1))),
        min_size=2,
        max_size=2,
    ).map(lambda entries: [BlockPattern.of(M, e) for e in entries])
)


def boolean(P: BlockPattern) -> np.ndarray:
    return P.mask([1] * P.size).numpy()


@given(patterns)
def test_the_algebra_is_that_of_boolean_matrices(pair: list[BlockPattern]) -> None:
    P, Q = pair
    A, B = boolean(P), boolean(Q)
    assert (boolean(P @ Q) == ((A.astype(int) @ B.astype(int)) > 0)).all()
    assert (boolean(P.T) == A.T).all()
    assert (boolean(P | Q) == (A | B)).all()
    assert (boolean(P - Q) == (A & ~B)).all()
    assert (P <= Q) == bool((A <= B).all())
    assert P.nnz == A.sum()
    assert union([P, Q]) == P | Q
    assert P.is_local == bool((A <= np.eye(P.size, dtype=bool)).all())
    assert all(((i, l) in P) == A[i, l] for i in range(P.size) for l in range(P.size))


def test_mask_blows_blocks_up_to_agent_sizes() -> None:
    P = BlockPattern.of(2, [(0, 0), (0, 1), (1, 1)])
    expected = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 1]], dtype=torch.bool)
    assert torch.equal(P.mask([1, 2]), expected)
    assert offsets([1, 2]) == (slice(0, 1), slice(1, 3))
    assert str(P) == "■ ■\n· ■"


def pattern_of(graph: str, **model: object) -> Job:
    return Job.of(
        spec_from_dict(
            {
                "topology": {"edges": [["a", "b"], ["b", "c"]], "directed": True},
                "model": {"graph": graph, **model},
            }
        )
    )


def test_an_edge_is_a_dependency_and_links_go_both_ways() -> None:
    patterns = pattern_of("K").architecture.patterns
    assert str(patterns.T[0]) == "■ · ·\n■ ■ ·\n· ■ ■"  # b uses a's state, c uses b's
    assert patterns.R == BlockPattern.identity(3)
    assert patterns.S == patterns.T[0] | patterns.T[0].T


def test_the_graph_enters_J_or_both() -> None:
    J, both = pattern_of("J").architecture.patterns, pattern_of("both").architecture.patterns
    assert J.T[0] == BlockPattern.identity(3)
    assert J.R == both.R == both.T[0] == pattern_of("K").architecture.patterns.T[0]


def test_graphs_per_layer_repeat_over_the_depth() -> None:
    graphs = [{"edges": [["a", "b"]]}, "none", "topology"]
    patterns = pattern_of("K", layers=4, layer_graphs=graphs).architecture.patterns
    assert [T.nnz for T in patterns.T] == [4, 3, 5, 4]
    assert patterns.K == patterns.T[2]
    with pytest.raises(SpecError, match="block-diagonal"):
        pattern_of("J", layer_graphs=["none"])


def test_the_single_exchange_condition() -> None:
    # On a path a-b-c, TᵀT joins a and c, who cannot talk; on a triangle all can.
    path = Job.of(spec_from_dict({"topology": {"edges": [["a", "b"], ["b", "c"]]}}))
    triangle = Job.of(spec_from_dict({"topology": {"edges": [["a", "b"], ["b", "c"], ["c", "a"]]}}))
    assert not path.architecture.patterns.single_exchange
    assert triangle.architecture.patterns.single_exchange


@given(jobs())
def test_layers_to_cross_is_where_the_dependency_is_complete(job: Job) -> None:
    # Against Boolean matrices, layer by layer, far beyond what a small graph can need.
    P = job.architecture.patterns
    R, M = boolean(P.R).astype(int), len(P.sizes)
    p = q = np.eye(M, dtype=int)
    expected = None
    for depth in range(40):
        if ((p + q) > 0).all():
            expected = depth
            break
        T = boolean(P.T[depth % P.layers]).astype(int)
        if job.spec.model.name in ("H2", "MS3"):
            p = ((p + R.T @ T.T @ T @ q) > 0).astype(int)
            q = ((q + R @ T.T @ T @ p) > 0).astype(int)
        elif job.spec.model.name == "MS1":
            p = ((p + T @ q) > 0).astype(int)
            q = ((q + T.T @ p) > 0).astype(int)
        else:  # one update of the whole state
            C = R @ T.T @ T if job.spec.model.name == "H1" else T + T.T
            p = q = ((p + C @ p) > 0).astype(int)
    assert P.layers_to_cross() == expected


def test_a_ring_of_eight_is_crossed_in_one_and_a_half_layers() -> None:
    ring = nx.cycle_graph(8)
    edges = [[f"a{a + 1}", f"a{b + 1}"] for a, b in ring.edges]
    job = Job.of(spec_from_dict({"topology": {"agents": 8, "edges": edges}}))
    # A half step of TᵀT reaches two hops, a layer four: the whole diameter.
    assert job.architecture.patterns.layers_to_cross() == 1
