"""Accuracy before, just after and some epochs after agents have left a run.

    python benchmarks/drop.py --data-dir FOLDER_OF_THE_IDX_FILES

One run of `topologies/mnist-grid16.yaml` in one process; copies of it go on without 1, 2 and 4 of
its 16 agents, and in the end all 16 take part again.
"""

from __future__ import annotations

import shutil
import tempfile
from argparse import ArgumentParser
from pathlib import Path

import hdnn_dist
from hdnn_dist.metrics import read_metrics
from hdnn_dist.run import reopen

SPEC = Path(__file__).parents[1] / "topologies" / "mnist-grid16.yaml"
LEAVE = (("a1",), ("a1", "a8"), ("a1", "a4", "a13", "a16"))  # a corner; and a side; all corners


def main() -> None:
    """Print a Markdown table."""
    parser = ArgumentParser(description="accuracy before and after agents leave a run")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder of the MNIST files")
    parser.add_argument("--before", type=int, default=4, help="epochs before the agents leave")
    parser.add_argument("--after", type=int, default=2, help="epochs without them, and then with")
    o = parser.parse_args()
    ends = [o.before, o.before + o.after, o.before + 2 * o.after]
    always = [f"data.dir={o.data_dir.absolute()}", "training.schedule.name=constant"]

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        hdnn_dist.train(
            SPEC, overrides=[*always, f"training.epochs={ends[0]}"], run=whole, local=True
        )
        print(
            f"| without | before | just after | {o.after} epochs later | just after their return | "
            f"{o.after} epochs later |\n|---|---|---|---|---|---|"
        )
        for agents in ((), *LEAVE):
            run = Path(folder) / f"without-{len(agents)}"
            shutil.copytree(whole, run)
            for end, change in zip(ends[1:], ("leave", "join"), strict=True):
                if agents:
                    hdnn_dist.regroup(run, **{change: agents})
                job = reopen(run, [f"training.epochs={end}"])
                hdnn_dist.fit(hdnn_dist.launch(job, local=True), run, tensorboard=False)
            found = [(r["epoch"], r["accuracy"]) for r in read_metrics(run) if r["kind"] == "eval"]
            at = [[a for epoch, a in found if epoch == end] for end in ends]
            cells = [at[0][0], at[0][-1], at[1][0], at[1][-1], at[2][-1]]
            print(
                f"| {', '.join(agents) or 'nobody'} | "
                + " | ".join(f"{100 * a:.2f} %" for a in cells)
                + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
