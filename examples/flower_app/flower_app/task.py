"""The user's model and data: a frozen network with LoRA on two layers, and rows of which each client has its own."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

NUM_FEATURES, NUM_CLIENTS, NUM_ROWS = 16, 3, 200


class Network(nn.Module):
    """Stands for a pretrained model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(NUM_FEATURES, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the logits, (rows, 2)."""
        return self.head(torch.relu(self.second(torch.relu(self.first(rows)))))


def make_model() -> PeftModel:
    """Return the same model on every machine."""
    torch.manual_seed(0)
    return get_peft_model(Network(), LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"]))


def adapter_arrays(model: PeftModel) -> dict[str, Tensor]:
    """Return lora_A and lora_B of every layer."""
    return get_peft_model_state_dict(model)


def load_adapter(model: PeftModel, arrays: dict[str, Tensor]) -> None:
    """Put the arrays into the model."""
    set_peft_model_state_dict(model, arrays)


def train_only(model: PeftModel, keys: list[str]) -> None:
    """Freeze everything but the arrays that the round trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.replace(".default", "") in keys)


def load_rows(client: int | None) -> tuple[Tensor, Tensor]:
    """Return a client's rows and labels, or for None those of nobody, to test on."""
    draw = torch.Generator().manual_seed(1000 if client is None else client)
    rows = torch.randn(NUM_ROWS, NUM_FEATURES, generator=draw)
    if client is not None:
        rows[:, client] += 1.0  # no two clients have the same
    return rows, (rows[:, 0] * rows[:, 1] + rows[:, 2] > 0).long()


def fit(model: PeftModel, rows: Tensor, labels: Tensor, *, lr: float, num_steps: int = 40) -> float:
    """Train what requires gradients; return the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(num_steps):
        loss = nn.functional.cross_entropy(model(rows), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def accuracy(model: PeftModel, rows: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose label the model finds."""
    with torch.no_grad():
        return float((model(rows).argmax(dim=1) == labels).float().mean())
