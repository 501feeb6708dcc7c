"""Run the app with Flower's simulation: three virtual clients in Ray actors, about 20 seconds."""

from flwr.simulation import run_simulation

from flower_app.client_app import app as client_app
from flower_app.server_app import app as server_app
from flower_app.task import NUM_CLIENTS

if __name__ == "__main__":
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=NUM_CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
