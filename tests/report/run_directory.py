"""Write a plausible run directory, with the oddity that a test asks for."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LAYERS = [
    f"base_model.model.roberta.encoder.layer.{i}.attention.self.{m}" for i in range(6) for m in ("query", "value")
]


def write_run(
    folder: Path,
    *,
    method: str = "fedsvd",
    privacy: str = "example_level",
    seed: int = 1,
    num_rounds: int = 6,
    num_clients: int = 10,
    labels: Sequence[str] = ("negative", "neutral", "positive"),
    public: bool = True,
    baselines: bool = True,
    exact: bool = True,
    budget: float = 6.0,
    rank: int = 8,
    change: Mapping[str, Any] | None = None,
) -> Path:
    """Return `folder`, filled like the directory of a finished run."""
    private = privacy != "none"
    folder.mkdir(parents=True)
    states = metrics(private=private, seed=seed, num_rounds=num_rounds, exact=exact, budget=budget, rank=rank)
    asked = clients(states, num_clients=num_clients, private=private)
    epsilon_max = states[-1]["epsilon_max"]
    summary = {
        "name": "sentiment_hospitals",
        "method": method,
        "privacy": privacy,
        "seed": seed,
        "num_rounds": num_rounds,
        "num_clients": num_clients,
        "cohort_size": max(1, num_clients // 2),
        "start_accuracy": states[0]["accuracy"],
        "final_accuracy": states[-1]["accuracy"],
        "final_loss": states[-1]["loss"],
        "epsilon_max": epsilon_max,
        "delta": 1e-5 if private else None,
        "adapter_sha256": "9f2c4e1ab07d" + "5e" * 26,
        "num_trained_parameters": 294912,
        "bytes_up": sum(s["bytes_up"] for s in states),
        "bytes_down": sum(s["bytes_down"] for s in states),
        "seconds": 754.2,
    } | dict(change or {})
    write_json(folder / "summary.json", summary)
    write_lines(folder / "metrics.jsonl", states)
    write_lines(folder / "clients.jsonl", asked)
    write_json(folder / "versions.json", {"python": "3.11.9", "torch": "2.13.0", "fedlr": "0.1.0", "git": "4be1a3c"})
    epsilon = f"  epsilon: {budget}" if private else "  epsilon: null"
    config = f"name: sentiment_hospitals\nseed: {seed}\nprivacy:\n{epsilon}\n  delta: 1.0e-05\n"
    (folder / "config.yaml").write_text(config)
    write_json(folder / "privacy.json", statement(epsilon_max, asked) if private else {"statement": NO_PRIVACY})
    write_json(folder / "partition.json", partition(labels, num_clients, seed) if public else {"public": False})
    (folder / "adapter").mkdir()
    write_json(
        folder / "adapter" / "adapter_config.json",
        {"base_model_name_or_path": "roberta-base", "task_type": "SEQ_CLS"},
    )
    if baselines:
        (folder / "baselines" / "no_privacy").mkdir(parents=True)
        free = metrics(private=False, seed=seed, num_rounds=num_rounds, exact=exact, budget=budget, rank=rank)
        write_lines(folder / "baselines" / "no_privacy" / "metrics.jsonl", free)
        write_json(folder / "baselines" / "alone.json", alone(num_clients, private=private))
    return folder


NO_PRIVACY = "This run has no differential privacy: epsilon is infinite."


def metrics(
    *, private: bool, seed: int, num_rounds: int, exact: bool, budget: float, rank: int
) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    states = []
    ceiling = 0.831 if private else 0.894
    for r in range(num_rounds + 1):
        wobble = 0.012 * math.sin(2.3 * r + seed) * (r > 0)
        spent = budget * 0.989 * math.sqrt(r / num_rounds)
        error = 1e-9 * (1 + math.sin(r)) if exact else 0.08 / math.sqrt(r + 1)
        phases = {"train": 30 + 3 * math.sin(r), "aggregate": 0.4, "evaluate": 4.1}
        states.append(
            {
                "rounds_completed": r,
                "accuracy": ceiling - (ceiling - 0.342) * math.exp(-5 * r / max(num_rounds, 4)) + wobble,
                "loss": 1.1 * math.exp(-r / 12) + 0.35,
                "epsilon_max": spent if private else None,
                "epsilon_median": spent * 0.94 if private else None,
                "epsilon_min": spent * 0.7 if private else None,
                "num_trained": 5 if r else 0,
                "num_refused": 0,
                "num_rejected": 0,
                "aggregation_error": error if r else 0,
                "aggregation_error_by_layer": {p: error * (0.2 + i / 7) for i, p in enumerate(LAYERS)} if r else {},
                "singular_values": {
                    p: [math.sqrt(r) * (1 + 0.1 * i) * 0.9 * 0.62**k for k in range(rank)] for i, p in enumerate(LAYERS)
                },
                "bytes_up": 5 * 589824 if r else 0,
                "bytes_down": 5 * 1179648 if r else 0,
                "noise_to_signal": 0.4 + 0.05 * r if private and r else None,
                "seconds": phases | {"round": sum(phases.values()) + 0.8} if r else {"evaluate": 4.0},
            }
        )
    return states


def clients(states: Sequence[Mapping[str, Any]], *, num_clients: int, private: bool) -> list[dict[str, Any]]:
    """Return the lines of clients.jsonl; client 2 refuses once; of many clients the last is never asked."""
    rows = []
    for r in range(len(states) - 1):
        for c in range(max(1, num_clients - (num_clients > 8))):
            refused = r == 3 and c == 2
            share = 1.0 if c == 0 else 0.7 + 0.3 * ((7 * c) % 10) / 10
            rows.append(
                {
                    "round_index": r,
                    "client_id": c,
                    "status": "refused" if refused else "trained",
                    "reason": "the budget would be exceeded" if refused else None,
                    "num_steps": 0 if refused else 3,
                    "participations": r + 1,
                    "epsilon": states[r + 1]["epsilon_max"] * share if private else None,
                    "seconds": 4.2,
                }
            )
    return rows


def partition(labels: Sequence[str], num_clients: int, seed: int) -> dict[str, Any]:
    """Return a skewed partition."""
    rows = []
    for c in range(num_clients):
        counts = [20 + (37 * (c + seed) * (k + 3) ** 2 + 91 * k) % 400 for k in range(len(labels))]
        rows.append({"client_id": c, "num_examples": sum(counts), "label_counts": counts})
    return {"public": True, "labels": list(labels), "clients": rows}


def alone(num_clients: int, *, private: bool) -> dict[str, Any]:
    """Return baselines/alone.json."""
    rows = [
        {
            "client_id": c,
            "accuracy": 0.47 + 0.16 * ((13 * c) % 10) / 10,
            "epsilon": 5.8 - 0.01 * c if private else None,
        }
        for c in range(num_clients)
    ]
    return {"privacy": "dp" if private else "none", "clients": rows}


def statement(epsilon: float, asked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a privacy statement."""
    return {
        "statement": f"Each example is protected with epsilon at most {epsilon:.4f} at delta 1e-05.",
        "unit": "one training example of one client",
        "neighbouring_relation": "add or remove one example",
        "mechanism": {
            "noise_multiplier": 1.117,
            "max_grad_norm": 1.0,
            "sample_rate": 0.05,
            "sampling": "Poisson",
        },
        "accountant": "pld (dp-accounting 0.6.0)",
        "not_covered": [
            "the choice of hyper-parameters, unless it was made on public data",
            "when and how often a client answers, and the size of its messages",
            "people with several examples: their protection is weaker by about that factor",
        ],
        "clients": [{"client_id": c, "epsilon": 5.9, "num_steps": 60} for c in sorted({r["client_id"] for r in asked})],
    }


def write_json(path: Path, value: object) -> None:
    """Write one JSON file."""
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: Sequence[object]) -> None:
    """Write one JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
