from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

import pytest
import torch

import hdnn_dist
from hdnn_dist.agent import Evaluation, Fault, StepResult
from hdnn_dist.checkpoint import Totals, checkpoints, latest_checkpoint, write_checkpoint
from hdnn_dist.data import Part, epoch_order
from hdnn_dist.errors import CheckpointError, LostError, RunError
from hdnn_dist.job import Job
from hdnn_dist.metrics import read_metrics
from hdnn_dist.run import create, finished, has_checkpoint, reopen
from hdnn_dist.trainer import Listener, LocalRunner, Progress, Runner, restore, state_digest
from tests.strategies import numbers, tiny


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return create(tiny(), tmp_path / "run")


def test_restore_puts_the_agents_back(run: Path) -> None:
    runner = LocalRunner(tiny())
    runner.train(1)
    write_checkpoint(run, 1, state_digest(runner.job), Totals(), runner.save)
    other = LocalRunner(tiny())
    assert restore(other, run) == 1
    for a, b in zip(runner.worker.agents.values(), other.worker.agents.values(), strict=True):
        assert all((a.state()[key] == b.state()[key]).all() for key in a.state())
    assert runner.train(1) == other.train(1)


def test_restore_refuses_another_topology_and_a_run_that_is_too_long(run: Path) -> None:
    runner = LocalRunner(tiny())
    write_checkpoint(run, 1, "another", Totals(), runner.save)
    with pytest.raises(CheckpointError, match="another topology"):
        restore(runner, run)
    runner.worker.step = 3
    write_checkpoint(run, 3, state_digest(runner.job), Totals(), runner.save)
    short = LocalRunner(tiny(training={"epochs": 2}))
    with pytest.raises(CheckpointError, match=r"has taken 3 steps, but 2 epochs are 2.*to 3 or"):
        restore(short, run)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("activation: tanh", "activation: relu"),
        ("h: 0.25", "h: 0.5"),
        ("dtype: float32", "dtype: float64"),
        ("kind: auto", "kind: stripes"),
        ("optimizer:\n    name: adam", "optimizer:\n    name: adamw"),
    ],
)
def test_a_spec_edited_by_hand_is_refused(run: Path, old: str, new: str) -> None:
    runner = LocalRunner(tiny())
    write_checkpoint(run, 1, state_digest(runner.job), Totals(), runner.save)
    spec = (run / "spec.yaml").read_text()
    assert spec.count(old) == 1, spec
    (run / "spec.yaml").write_text(spec.replace(old, new))
    with pytest.raises(CheckpointError, match=r"another topology, model.*restore the spec\.yaml"):
        restore(LocalRunner(reopen(run)), run)


def test_a_trace_is_of_some_steps_after_the_first_and_changes_nothing(tmp_path: Path) -> None:
    job = tiny(training={"epochs": 2, "batch_size": 16})
    assert job.steps_per_epoch == 4
    summaries = [
        hdnn_dist.fit(LocalRunner(job), create(job, tmp_path / name), profile=steps)
        for name, steps in (("plain", 0), ("traced", 5))
    ]
    assert len({summary.test_loss for summary in summaries}) == 1
    assert not (tmp_path / "plain" / "trace.json").exists()
    events = json.loads((tmp_path / "traced" / "trace.json").read_text())["traceEvents"]
    steps = {event["args"]["step"] for event in events if event["ph"] == "X"}
    assert steps == {2, 3, 4}, "to the end of an epoch"


def test_a_resumed_run_is_summed_over_all_its_processes(tmp_path: Path) -> None:
    """Cut after three of four epochs, its last evaluation the worst."""
    run = tmp_path / "run"
    job = tiny(training={"epochs": 4, "batch_size": 32, "on_nonfinite": "skip"})

    class Moody(LocalRunner):
        accuracies: ClassVar = [0.5, 0.9, 0.75, 0.25]

        def train(self, steps: int) -> list[StepResult]:
            if self.worker.step == 6 and cut:
                raise RunError("cut")
            return super().train(steps)

        def evaluate(self, part: Part = "test") -> Evaluation:
            loss = super().evaluate(part).loss
            accuracy = self.accuracies[self.worker.step // job.steps_per_epoch - 1]
            return Evaluation(math.nan if self.worker.step == 8 else loss, accuracy, 10)

    cut = True
    runner = Moody(job)
    with pytest.raises(RunError, match="cut"):
        hdnn_dist.fit(runner, create(job, run))
    first = latest_checkpoint(run)[1].totals
    assert first.best_test_accuracy == 0.9
    assert first.bytes_sent == sum(runner.sent().values())
    assert not (run / "summary.json").exists()
    cut = False
    again = Moody(job)
    summary = hdnn_dist.fit(again, run)
    assert (summary.best_test_accuracy, summary.test_accuracy) == (0.9, 0.25)
    assert summary.bytes_sent == first.bytes_sent + sum(again.sent().values())
    assert summary.seconds > first.seconds >= first.training_seconds > 0
    assert summary.training_seconds > first.training_seconds
    assert summary.samples_per_second == pytest.approx(8 * 32 / summary.training_seconds)
    # A run that is complete stays as it is.
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.name != "spec.yaml"}
    last = Moody(job)
    assert repr(hdnn_dist.fit(last, run)) == repr(summary)  # nan is not equal to itself
    assert not last.sent()
    assert {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.name != "spec.yaml"} == before
    # Without its summary, that is written again, with the sums of the last checkpoint.
    (run / "summary.json").write_text("[]")
    assert hdnn_dist.fit(Moody(job), run).training_seconds == summary.training_seconds
    assert json.loads((run / "summary.json").read_text())["best_test_accuracy"] == 0.9


def test_the_best_of_a_regression_is_that_of_the_largest_r2(tmp_path: Path) -> None:
    """Also where all are worse than the mean of the targets, and over two processes."""
    losses = [3.0, 1.5, math.nan, 2.0, 1.75]

    class Moody(LocalRunner):
        def evaluate(self, part: Part = "test") -> Evaluation:
            return Evaluation(losses[self.worker.step // 4 - 1], None, 10, 9.0, 1.0)

    spec: dict[str, Any] = {
        "topology": {"agents": 2, "edges": [["a1", "a2"]]},
        "model": {"layers": 1},
        "data": numbers(),
        "training": {"batch_size": 5, "on_nonfinite": "skip", "keep_last": 1},
    }
    run = tmp_path / "run"
    for epochs in (4, 5):
        job = Job.load(spec | {"training": spec["training"] | {"epochs": epochs}})
        summary = hdnn_dist.fit(Moody(job), create(job, run) if epochs == 4 else run)
        assert (summary.test_rmse, summary.best_test_r2) == (3.0, -0.5)
        assert (summary.test_accuracy, summary.best_test_accuracy) == (None, None)
        assert summary.test_scores["r2"] == 1 - losses[epochs - 1]
        kept = [folder.name for folder in checkpoints(run)]
        assert kept == ["step-00000008", f"step-{4 * epochs:08d}"]
        assert hdnn_dist.fit(Moody(job), run) == summary


class Frail(LocalRunner):
    """Loses its agents before some steps, once each."""

    def __init__(self, job: Job, *before: int) -> None:
        super().__init__(job)
        self.before = list(before)

    def train(self, steps: int) -> list[StepResult]:
        if self.before and self.worker.step + steps > self.before[0]:
            self.before.pop(0)
            raise LostError("an actor died")
        return super().train(steps)


def test_what_a_run_has_left_behind_it_does_not_come_back(tmp_path: Path) -> None:
    job = tiny(training={"batch_size": 16, "epochs": 4, "keep_last": 2})
    run = create(job, tmp_path / "run")
    summary = hdnn_dist.fit(LocalRunner(job), run)
    assert (run / "summary.json").exists()
    kept = [folder.name for folder in checkpoints(run)]
    (checkpoints(run)[-1] / "a.safetensors").write_bytes(b"damaged")
    assert finished(job, run) is None
    again = hdnn_dist.fit(Frail(job, 13), run)
    assert again.test_loss == summary.test_loss
    assert again.restarts == 1
    assert (run / "checkpoints" / f"set-aside-{kept[-1]}").is_dir()
    assert checkpoints(run)[-1].name == kept[-1]
    assert not list((run / "checkpoints").glob(".*"))


class Diary(Listener):
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def started(self, runner: Runner, step: int) -> None:
        self.events.append(("started", step))

    def lost(self, cause: LostError, restart: int) -> None:
        self.events.append((str(cause), restart))


def test_a_run_that_loses_agents_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    job = tiny(training={"batch_size": 16, "epochs": 4, "shift": 0})
    quiet = hdnn_dist.train(job, run=tmp_path / "quiet", local=True)
    diary, run = Diary(), create(job, tmp_path / "run")
    summary = hdnn_dist.fit(Frail(job, 2, 6, 11), run, [diary])
    starts = [step for event, step in diary.events if event == "started"]
    assert starts == [0, 0, 4, 8]
    cause, restart = diary.events[1]
    assert re.fullmatch(r"steps? \d.*: an actor died", cause)
    assert restart == 1
    assert summary.restarts == 3
    assert (summary.test_loss, summary.bytes_sent) == (quiet.test_loss, quiet.bytes_sent)
    ours, theirs = hdnn_dist.load(run).state_dict(), hdnn_dist.load(quiet.run).state_dict()
    assert all(torch.equal(ours[name], w) for name, w in theirs.items())
    steps = [r["step"] for r in read_metrics(run) if r["kind"] == "train"]
    assert steps == list(range(1, 17))


def test_a_run_gives_up_when_its_restarts_are_spent(tmp_path: Path) -> None:
    job = tiny(training={"batch_size": 16}, cluster={"max_restarts": 1})
    with pytest.raises(LostError, match=r"an actor died; all 1 restarts .* are spent"):
        hdnn_dist.fit(Frail(job, 5, 6), create(job, tmp_path / "run"))


def poisoned(job: Job, agent: int, sample: int) -> LocalRunner:
    """A runner one of whose agents sees an infinite number in a sample."""
    runner = LocalRunner(job)
    runner.worker.agents[agent].features("train")[sample] = math.inf
    return runner


def test_a_number_that_is_not_finite_is_named_where_it_came_from(tmp_path: Path) -> None:
    job = tiny(training={"batch_size": 16})
    with pytest.raises(RunError, match=r"^step \d: the state y_0 of agent 'b' is not finite"):
        hdnn_dist.fit(poisoned(job, 1, 5), create(job, tmp_path / "run"))
    assert not has_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_an_evaluation_that_is_not_finite_stops_the_run_or_is_told(
    policy: str, activations: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = {"epochs": 2, "on_nonfinite": policy, "activations": activations}
    job, run = tiny(training=training), tmp_path / "run"
    said = "step 1: the test set's state y_0 of agent 'b' is not finite"
    runner = LocalRunner(job)
    runner.worker.agents[1].features("test")[3] = math.inf
    if policy == "stop":
        with pytest.raises(RunError, match=f"^{said}; the checkpoints before it are good"):
            hdnn_dist.fit(runner, create(job, run), tensorboard=False)
        assert not has_checkpoint(run)
    else:
        assert math.isnan(hdnn_dist.fit(runner, create(job, run), tensorboard=False).test_loss)
        assert said in caplog.text


def test_a_step_that_is_not_finite_is_skipped_by_all_agents(tmp_path: Path) -> None:
    class Skips(Listener):
        def __init__(self) -> None:
            self.faults: list[Fault] = []

        def skipped(self, fault: Fault) -> None:
            self.faults.append(fault)

    job = tiny(training={"batch_size": 16, "epochs": 3, "on_nonfinite": "skip"})
    skips, run = Skips(), create(job, tmp_path / "run")
    runner = poisoned(job, 1, 5)
    before = [agent.state() for agent in runner.worker.agents.values()]
    before = [{name: w.clone() for name, w in state.items()} for state in before]
    step = next(
        k for k in range(4) if 5 in epoch_order(job.spec.training.seed, 0, 64)[16 * k : 16 * k + 16]
    )
    runner.worker.step = step
    runner.train(1)
    assert str(min(runner.faults())) == f"step {step + 1}: the state y_0 of agent 'b' is not finite"
    for agent, state in zip(runner.worker.agents.values(), before, strict=True):
        assert all(torch.equal(agent.state()[name], w) for name, w in state.items())
    summary = hdnn_dist.fit(poisoned(job, 1, 5), run, [skips])
    assert math.isfinite(summary.test_loss)
    assert [(f.agent, f.what) for f in skips.faults] == [("b", "the state y_0")] * 3


@pytest.mark.parametrize(
    ("name", "what"),
    [("encoder.weight", "the state y_0"), ("readout.weight", r"the cotangent ∂loss/∂y_1")],
)
def test_where_a_weight_that_is_not_finite_is_felt(name: str, what: str) -> None:
    runner = LocalRunner(tiny())
    with torch.no_grad():
        runner.worker.agents[0].weights[name][0, 0] = math.nan
    runner.train(1)
    assert min(runner.faults()).what == what


def test_a_gradient_that_is_not_finite_is_named_with_its_layer() -> None:
    runner = LocalRunner(tiny(model={"layers": 4}, training={"alpha": 1e6}))
    with torch.no_grad():  # finite, unlike its difference to its neighbours times alpha
        runner.worker.agents[1].weights["Kp"][2] = 1e35
    runner.train(1)
    found = {fault.agent: fault.what for fault in runner.faults()}
    assert found["b"] == "the gradient of Kp in layer 1"


def test_a_run_that_is_told_to_stop_saves_this_very_step(tmp_path: Path) -> None:
    class Stopper(Listener):
        def stepped(self, results: Sequence[StepResult], progress: Progress) -> None:
            if progress.step >= 3:
                stop.set()

    stop = Event()
    job = tiny(training={"batch_size": 16, "epochs": 4})
    quiet = hdnn_dist.train(job, run=tmp_path / "quiet", local=True)
    run = create(job, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        hdnn_dist.fit(LocalRunner(job), run, [Stopper()], stop=stop)
    assert latest_checkpoint(run)[1].step >= 3
    assert hdnn_dist.fit(LocalRunner(job), run).test_loss == quiet.test_loss


def test_a_loss_that_is_no_number_ends_the_run_with_its_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["training.optimizer.name=sgd", "training.schedule.name=constant"]
    hdnn_dist.train(overrides=[*overrides, "training.epochs=1"], run=run, local=True)
    good = {f: f.read_bytes() for f in run.glob("checkpoints/**/*") if f.is_file()}
    job = reopen(run, ["training.epochs=5", "training.optimizer.lr=1e6"])
    runner = hdnn_dist.launch(job, local=True)
    with pytest.raises(RunError, match=r"step \d+: the .* of agent 'a\d' is not finite; the check"):
        hdnn_dist.fit(runner, run)
    assert {f: f.read_bytes() for f in run.glob("checkpoints/**/*") if f.is_file()} == good


def path(policy: str = "drop", **training: object) -> Job:
    """a - b - c, where b is the root."""
    topology = {"agents": ["a", "b", "c"], "d": 2, "edges": [["a", "b"], ["b", "c"]]}
    return tiny(
        topology=topology,
        model={"layers": 2},
        training={"batch_size": 16, "epochs": 4, **training},
        cluster={"on_agent_loss": policy},
    )


class Loses(Frail):
    """Loses some agents for good."""

    def __init__(self, job: Job, before: int, agents: Sequence[str]) -> None:
        super().__init__(job, before)
        self.agents = agents

    def train(self, steps: int) -> list[StepResult]:
        try:
            return super().train(steps)
        except LostError as error:
            raise LostError(str(error), self.agents) from None


class Groups(Listener):
    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def regrouped(self, step: int, left: Sequence[str], joined: Sequence[str]) -> None:
        self.events.append((step, list(left), list(joined)))

    def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:
        self.events.append((step,))


def test_a_run_goes_on_without_an_agent_that_it_has_lost(tmp_path: Path) -> None:
    job, run, groups = path(), tmp_path / "run", Groups()
    create(job, run)
    summary = hdnn_dist.fit(Loses(job, 6, ["c"]), run, [groups])
    assert groups.events == [(4,), (4, ["c"], []), (4,), (8,), (12,), (16,)]
    assert (summary.absent, summary.restarts, summary.steps) == (("c",), 1, 16)
    assert list(latest_checkpoint(run)[1].files) == ["a", "b"]
    kinds = [(r["kind"], r["step"]) for r in read_metrics(run) if r["kind"] != "gradients"]
    assert kinds.count(("agents", 4)) == 1
    assert kinds.count(("eval", 4)) == 2  # before it was lost, and just after
    # All that reads the run sees the agents that took part.
    assert reopen(run).topology.names == ("a", "b")
    assert hdnn_dist.load(run).architecture.names == ("a", "b")
    with hdnn_dist.open_run(run, local=True) as (runner, _):
        assert runner.evaluate().loss == summary.test_loss
    assert finished(reopen(run), run) == summary


def test_those_that_stay_keep_their_state_when_another_leaves(tmp_path: Path) -> None:
    job, run = path(), create(path(), tmp_path / "run")
    before = LocalRunner(job)
    before.train(4)
    write_checkpoint(run, 4, state_digest(job), Totals(), before.save)
    after = LocalRunner(job.without(["c"]))
    assert restore(after, run) == 4
    wide, narrow = before.worker.agents[1].state(), after.worker.agents[1].state()
    reads_a_and_b = slice(0, 4)  # of b's row of K: a, b, c
    for key, value in narrow.items():
        whole = wide[key]
        kept = whole if value.shape == whole.shape else whole[..., reads_a_and_b]
        assert torch.equal(value, kept), key
    assert narrow["optimizer/Kp/exp_avg"].any()
    a, same = before.worker.agents[0].state(), after.worker.agents[0].state()
    assert all(torch.equal(same[key], value) for key, value in a.items())


def test_an_agent_joins_at_a_checkpoint_with_fresh_weights(tmp_path: Path) -> None:
    class Invites(Groups):
        def started(self, runner: Runner, step: int) -> None:
            if "c" in runner.job.topology.names:
                assert isinstance(runner, LocalRunner)
                states = [agent.state() for agent in runner.worker.agents.values()]
                self.states = [{k: v.clone() for k, v in state.items()} for state in states]

        def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:
            super().evaluated(step, epoch, evaluation)
            if reopen(run).absent and step == 8:
                hdnn_dist.regroup(run, join=["c"])

    job, run, invites = path(), create(path(), tmp_path / "run"), Invites()
    assert hdnn_dist.regroup(run, leave=["c"]) == ("c",)
    summary = hdnn_dist.fit(LocalRunner(job), run, [invites])
    assert invites.events == [(0, ["c"], []), (0,), (4,), (8,), (8, [], ["c"]), (8,), (12,), (16,)]
    assert summary.absent == ()
    fresh = [agent.state() for agent in LocalRunner(job).worker.agents.values()]
    _, b, c = invites.states
    assert c.keys() == fresh[2].keys()  # no optimiser state yet
    assert all(torch.equal(value, c[key]) for key, value in fresh[2].items())
    of_c = slice(4, 6)
    for K in ("Kp", "Kq"):
        assert torch.equal(b[f"weights/{K}"][..., of_c], fresh[1][f"weights/{K}"][..., of_c])
        assert not torch.equal(b[f"weights/{K}"][..., :4], fresh[1][f"weights/{K}"][..., :4])
        assert not b[f"optimizer/{K}/exp_avg"][..., of_c].any()


def test_what_is_new_is_fresh_whatever_was_loaded_before(tmp_path: Path) -> None:
    job, run = path(), create(path(), tmp_path / "run")
    some = LocalRunner(job.without(["c"]))
    some.train(4)
    write_checkpoint(run, 4, state_digest(job), Totals(), some.save)
    fresh, used = LocalRunner(job), LocalRunner(job)
    used.train(8)
    assert restore(fresh, run) == restore(used, run) == 4
    for one, other in zip(fresh.worker.agents.values(), used.worker.agents.values(), strict=True):
        expected, state = one.state(), other.state()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("agent", "why"),
    [
        ("b", "'b' is the root of the readout, which alone holds the labels"),
        ("a", "without a, c: the readout at b has no path"),
    ],
)
def test_a_run_that_cannot_go_on_without_an_agent_says_why(
    agent: str, why: str, tmp_path: Path
) -> None:
    edges = [["c", "b"], ["b", "a"], ["a", "d"]]
    job = tiny(
        topology={"agents": list("abcd"), "d": 2, "edges": edges},
        model={"layers": 1, "readout": {"root": "b"}},
        training={"batch_size": 16},
        cluster={"on_agent_loss": "drop"},
    )
    run = create(job, tmp_path / "run")
    hdnn_dist.regroup(run, leave=["c"])
    with pytest.raises(LostError, match=f"cannot go on without: {why}"):
        hdnn_dist.fit(Loses(job, 6, [agent]), run)
    assert reopen(run).absent == ("c",)
    restore(LocalRunner(reopen(run)), run)  # its checkpoint is as it was


def test_a_run_that_is_to_stop_at_a_loss_stops(tmp_path: Path) -> None:
    job = path("stop")
    with pytest.raises(LostError, match=r"an actor died$"):
        hdnn_dist.fit(Loses(job, 6, ["c"]), create(job, tmp_path / "run"))
