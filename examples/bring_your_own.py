"""Your own module, dataset and optimizer, trained by a plan: python examples/bring_your_own.py"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import meshwright as mw


class Net(nn.Module):
    """Blocks of very uneven cost, with a skip from the first to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 256)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(256, hidden), nn.GELU(), nn.Linear(hidden, 256))
            for hidden in (2048, 1024, 512, 256, 128, 64)
        )
        self.out = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x + first)


torch.manual_seed(0)
inputs = torch.randn(4096, 64)
data = TensorDataset(inputs, inputs[:, :10].argmax(dim=1))
model, loss = Net(), nn.CrossEntropyLoss()

graph = mw.trace(mw.WithLoss(model, loss), data[:2], sequence=1)
plan = mw.find_plan(graph, mw.discover(), mw.Job(global_batch=256, sequence=1, precision="fp32"))
mw.launch(plan)  # starts this script once per device, unless torchrun already has
mw.train(
    model,
    plan,
    data,
    loss=loss,
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    options=mw.TrainingOptions(steps=50),
    on_metrics=lambda m: print(f"step {m.step}: loss {m.loss:.4f}", flush=True),
)
