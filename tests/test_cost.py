from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given

from hdnn_dist.cost import LARGE, SMALL, Calibration, Cost, predict, read_calibration, work_of
from hdnn_dist.errors import UserError
from hdnn_dist.job import Job
from hdnn_dist.reader import spec_from_dict
from tests.strategies import jobs

NOTHING = Calibration(
    host="here",
    date="today",
    torch="2",
    cores=4,
    step=0.0,
    half_step=0.0,
    message=0.0,
    number=0.0,
    keep=0.0,
    small=1e300,
    large=1e300,
    latency=0.0,
    send=0.0,
    bandwidth=1e300,
)
APART = ((0,), (1,), (2,), (3,))


def ring(**sections: object) -> Job:
    """Four agents of d = 2, one layer; 5 samples a step."""
    edges = [["a", "b"], ["b", "c"], ["c", "d"], ["d", "a"]]
    training = {"batch_size": 5} | sections.pop("training", {})  # type: ignore[operator]
    topology = sections.pop("topology", {"d": 2, "edges": edges})
    model = {"layers": 1, "readout": {"root": "a"}}
    return Job.of(
        spec_from_dict({"topology": topology, "model": model, "training": training, **sections})
    )


def test_each_constant_counts_what_it_says() -> None:
    # Two half steps, forward, and their adjoints: 8 rounds on the ring, each agent sending to two
    # neighbours; then the scores up two levels (c or d's below b's or d's) and down again.
    job = ring()

    def seconds(packing: tuple[tuple[int, ...], ...], cores: int = 4, **constants: float) -> float:
        found = predict(job, packing, replace(NOTHING, **constants), cores).seconds
        return round(found, 9)

    one, two = ((0, 1, 2, 3),), ((0, 1), (2, 3))
    assert seconds(one, step=1.0) == 4
    assert seconds(APART, step=1.0) == 1
    assert seconds(APART, cores=2, step=1.0) == 2
    assert seconds(one, half_step=1.0) == 4 * 2 * 3
    sent = 8 * 4 * 2 + 2 * 3
    assert seconds(one, message=1.0) == sent
    assert seconds(APART, latency=1.0) == 8 + 2 * 2
    assert seconds(one, latency=1.0, send=1.0) == 0
    # Two neighbours, a message each way; the tree: c to b, then b and d to a, and back.
    assert seconds(APART, send=1.0) == 8 * 4 + 2 * (1 + 2)
    assert seconds(APART, cores=2, send=1.0) == 8 * 4 * 4 / 2 + 2 * (1 + 2)
    # 5 samples of 2 numbers of 4 bytes, out and in at two of the actors' edges; 10 scores.
    assert seconds(two, bandwidth=1.0) == 8 * 2 * 2 * 40 + 2 * (200 + 200)


def test_the_work_of_an_agent_by_hand() -> None:
    job = ring(model={"layers": 3, "readout": {"root": "a"}})
    work = work_of(job)[1]
    assert work.half_steps == 3 * 2 * 3
    # K y and Kᵀ s of 2 rows and 6 columns, forward and twice backward, two half steps a layer.
    assert work.products[2 * 2 * 6 * 5] == 3 * 2 * 2 * 3
    assert work.products[2 * 4 * 16 * 5] == 2  # the encoder of a quarter of the digits
    assert work.products[2 * 4 * 10 * 5] == 3  # the scores


@given(jobs())
def test_work_grows_with_what_is_recomputed_and_no_message_is_forgotten(job: Job) -> None:
    whole = work_of(job)
    messages = sum(len(phase.messages) for phase in job.plan.training_step)
    assert sum(work.messages for work in whole) == messages
    assert all(work.half_steps > 0 and work.numbers > 0 for work in whole)
    again = replace(job, plan=replace(job.plan, recompute=True))
    once = replace(job, plan=replace(job.plan, recompute=False))
    for more, less in zip(work_of(again), work_of(once), strict=True):
        assert 3 * more.half_steps == 4 * less.half_steps
        assert more.numbers > less.numbers
        assert more.kept == 0 < less.kept


def test_rates_between_small_and_large_products_lie_between_theirs() -> None:
    measured = replace(NOTHING, small=1e9, large=1e11)
    assert measured.product(0) == 0
    assert SMALL / measured.product(SMALL) == pytest.approx(1e9)
    assert LARGE / measured.product(LARGE) == pytest.approx(1e11)
    assert 1.0 / measured.product(1) == pytest.approx(1e9)
    middle = round((SMALL * LARGE) ** 0.5)
    assert middle / measured.product(middle) == pytest.approx(1e10, rel=1e-3)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(asdict(NOTHING)))
    assert read_calibration(file) == NOTHING


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{}", "host: Field required"),
        ("no json", "Invalid JSON"),
        (json.dumps(asdict(NOTHING) | {"latency": -1}), "latency: Input should be greater than"),
        (json.dumps(asdict(NOTHING) | {"small": 0}), "small: Input should be greater than 0"),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(content)
    with pytest.raises(UserError, match=complaint) as refusal:
        read_calibration(file)
    assert "hdnn-dist calibrate" in str(refusal.value)


def test_messages_in_fewer_bits_cost_fewer_bytes_but_for_the_norm() -> None:
    clip = {"clip_norm": 1.0}
    here = replace(NOTHING, bandwidth=1.0)
    full = predict(ring(training=clip), APART, here, 4).transfer
    half = predict(ring(training={**clip, "messages": "bf16"}), APART, here, 4).transfer
    # The norm goes up two levels and down: 4 bytes in and out, of two agents at the upper one.
    norm = 2 * (4 + 2 * 4)
    assert full - norm == 2 * (half - norm)


def test_copies_share_the_batch_and_the_cores_and_sum_their_gradients() -> None:
    one, two = ring(), ring(cluster={"replicas": 2})  # of 5 samples, 3 and 2

    def cost(job: Job, cores: int = 8, **constants: float) -> Cost:
        return predict(job, APART, replace(NOTHING, **constants), cores)

    assert cost(two, step=1.0).arithmetic == cost(one, step=1.0).arithmetic == 1
    assert cost(two, cores=4, step=1.0).arithmetic == 2
    assert cost(two, latency=1.0).latency == cost(one, latency=1.0).latency + 2
    count = max(two.architecture.count(i, zeros=True) for i in range(4))
    rounds, ring_of_two = 3 / 5 * cost(one, bandwidth=1.0).transfer, 2 * count * 4
    assert cost(two, bandwidth=1.0).transfer == pytest.approx(rounds + ring_of_two)


def test_an_agent_on_a_machine_a_quarter_as_fast_computes_four_times_as_long() -> None:
    agents = [{"name": name, "d": 2, "speed": 0.25 if name == "b" else 1.0} for name in "abcd"]
    edges = [["a", "b"], ["b", "c"], ["c", "d"], ["d", "a"]]
    job = ring(topology={"agents": agents, "edges": edges})
    found = predict(job, APART, replace(NOTHING, step=1.0), 4)
    assert found.busy == (1, 4, 1, 1)
    assert found.arithmetic == 4
