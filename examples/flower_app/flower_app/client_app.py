"""The user's ClientApp. All that a fedlr strategy asks of it: train the arrays of "trained-keys", and no others."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_app.task import accuracy, adapter_arrays, fit, load_adapter, load_rows, make_model, train_only

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from the arrays of the message; send back the ones that were trained."""
    model, config = make_model(), message.content["config"]
    load_adapter(model, message.content["arrays"].to_torch_state_dict())
    keys = list(config["trained-keys"])
    train_only(model, keys)
    rows, labels = load_rows(int(context.node_config["partition-id"]))
    loss = fit(model, rows, labels, lr=config["lr"])
    trained = {key: array for key, array in adapter_arrays(model).items() if key in keys}
    metrics = MetricRecord({"num-examples": len(rows), "loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the arrays of the message on the client's own rows."""
    model = make_model()
    load_adapter(model, message.content["arrays"].to_torch_state_dict())
    rows, labels = load_rows(int(context.node_config["partition-id"]))
    metrics = MetricRecord({"num-examples": len(rows), "accuracy": accuracy(model, rows, labels)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
