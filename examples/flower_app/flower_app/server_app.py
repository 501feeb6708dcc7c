"""The user's ServerApp. Only the strategy is fedlr's."""

import json

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedlr.flower import FedSVD
from flower_app.task import NUM_CLIENTS, accuracy, adapter_arrays, load_adapter, load_rows, make_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train over all connected clients; print the accuracy on rows of nobody, before the first round and after each."""
    model = make_model()

    def test(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        load_adapter(model, arrays.to_torch_state_dict())
        return MetricRecord({"accuracy": accuracy(model, *load_rows(None))})

    strategy = FedSVD(min_available_nodes=NUM_CLIENTS, seed=0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(adapter_arrays(model)),
        num_rounds=int(context.run_config.get("num-rounds", 5)),
        timeout=120,
        train_config=ConfigRecord({"lr": float(context.run_config.get("lr", 0.02))}),
        evaluate_fn=test,
    )
    accuracies = [metrics["accuracy"] for _, metrics in sorted(result.evaluate_metrics_serverapp.items())]
    print(json.dumps({"accuracies": accuracies, "dropped": [len(r.dropouts) for r in strategy.rounds]}))
