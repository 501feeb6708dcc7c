"""The server as a Flower ServerApp: for Flower's simulation, and for `flwr run`; `fedlr server run` needs neither.

The experiment comes as one string of JSON, the resolved configuration: as `FEDLR_EXPERIMENT`, a file, in the
environment, or as `cfg` in the run's configuration. It came from somewhere: it names parts of fedlr only, and those of
a user's own that `FEDLR_OWN_PARTS` lists.
"""

import json
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlr.adapters.state import num_bytes
from fedlr.config.parts import OWN_PARTS, require_registered
from fedlr.config.schema import Experiment, check_experiment
from fedlr.errors import InputError
from fedlr.methods.codecs.codec import num_coded_bytes
from fedlr.models.peft_state import read_adapter
from fedlr.server.nodes import Nodes, PartitionNodes, RosterNodes
from fedlr.server.pool import GridPool
from fedlr.server.remembered import Remembered
from fedlr.server.reply_grid import ReplyGrid
from fedlr.server.run import Run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the configuration names, in `FEDLR_RUN_DIR` if that is set."""
    given = os.environ.get("FEDLR_RUN_DIR")
    run = Run(experiment_of(context), Path(given) if given else None, say=lambda line: print(line, flush=True))
    serve(run, grid)
    run.leave_behind()


def serve(run: Run, grid: Grid) -> None:
    """Ask the clients behind a Grid for all rounds that are left."""
    e, terms = run.experiment, run.served.terms
    if isinstance(grid, ReplyGrid):
        largest = read_adapter(run.served.model).tensors  # of the largest rank
        grid.most_bytes = max(num_bytes(largest.values()), num_coded_bytes(terms.built_codec(), largest))
    nodes: Nodes
    members = grace_s = public_keys = None
    if e.runtime.kind == "superlink":
        nodes = enrolled = RosterNodes(grid, Path(e.deployment.roster))
        members, grace_s = enrolled.members, e.deployment.grace_s
        public_keys = enrolled.public_keys
        run.progress.reports.remembered = remembered = Remembered.of_server(e.deployment)
        if terms.mechanism is not None:
            remembered.require_writable()
    else:
        nodes = PartitionNodes(grid, num_clients=e.num_clients)
    pool = GridPool(
        grid,
        nodes,
        terms=terms,
        enrolled=run.served.start.adapter,
        deadline_s=e.deployment.round_deadline_s,
        quorum=e.deployment.min_updates,
        poll_s=e.deployment.poll_s,
        grace_s=grace_s,
        say=run.say,
        reports=run.progress.reports,
        public_keys=public_keys,
    )
    run.rounds(pool, members)


def experiment_of(context: Context) -> Experiment:
    """Return the experiment of a run.

    Raises:
        InputError: there is none, or it is wrong.
    """
    path, text = os.environ.get("FEDLR_EXPERIMENT"), context.run_config.get("cfg")
    own_parts = os.environ.get(OWN_PARTS, "").split()
    if path:
        text = Path(path).read_text(encoding="utf-8")
    if not isinstance(text, str):
        raise InputError("Expected the resolved configuration as FEDLR_EXPERIMENT=FILE or as cfg, got neither")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"Expected cfg to be the resolved configuration as JSON, got {text[:60]!r}") from error
    way_out = f": one of your own is named in the environment, {OWN_PARTS}='{{name}}'"
    require_registered(tree, source=path or "cfg", own_parts=own_parts, way_out=way_out)
    return check_experiment(tree)
