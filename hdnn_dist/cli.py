"""The command line: every command of `hdnn-dist`, in the order in which `--help` shows them.

What they do is in `cli_runs`, `cli_submission` and `cli_specs`, each a few calls of the library.
torch and ray take seconds to import, so commands import what they need, when they need it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from hdnn_dist import __version__, cli_runs, cli_specs, cli_submission
from hdnn_dist.cli_exits import Interruptible, interrupt_ends_at_once, report_error
from hdnn_dist.errors import HdnnError, UserError

app = typer.Typer(
    cls=Interruptible,
    help="Train Hamiltonian deep networks on a graph of agents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "train": cli_runs.train,
    "submit": cli_submission.submit,
    "status": cli_submission.status,
    "logs": cli_submission.logs,
    "stop": cli_submission.stop,
    "eval": cli_runs.evaluate,
    "predict": cli_runs.predict,
    "check": cli_specs.check,
    "calibrate": cli_specs.calibrate,
    "drop": cli_runs.drop,
    "join": cli_runs.join,
    "analyze": cli_runs.analyze,
    "report": cli_runs.write_report,
    "export": cli_runs.export,
    "counterexample": cli_specs.counterexample,
    "schema": cli_specs.schema,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
topology = typer.Typer(help="Graphs of agents.", no_args_is_help=True)
topology.command("draw")(cli_specs.draw)
app.add_typer(topology, name="topology")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hdnn-dist {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Train Hamiltonian deep networks on a graph of agents."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: without the program's name; default: those of this process.
    """
    with interrupt_ends_at_once():
        try:
            app(args=arguments, prog_name="hdnn-dist")
        except (HdnnError, OSError) as error:
            sys.exit(report_error(error))
        except MemoryError as error:
            problem = f"out of memory ({str(error) or 'of Python'})"
            mend = "take smaller inputs, or a machine with more"
            sys.exit(report_error(UserError(problem, mend)))
