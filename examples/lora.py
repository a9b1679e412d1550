"""Low-rank adapters beside frozen weights, trained by a plan: python examples/lora.py"""

import os

import torch
from torch import nn
from torch.utils.data import TensorDataset

import meshwright as mw


class Adapted(nn.Module):
    """A frozen linear map, and beside it a trained one of low rank (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x))


class Net(nn.Module):
    """Stands for a model that has been trained before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 256)
        self.blocks = nn.ModuleList(
            nn.Sequential(Adapted(nn.Linear(256, 512)), nn.GELU(), Adapted(nn.Linear(512, 256)))
            for _ in range(3)
        )
        self.out = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


torch.manual_seed(0)
inputs = torch.randn(4096, 64)
data = TensorDataset(inputs, inputs[:, :10].argmax(dim=1))
model, loss = Net(), nn.CrossEntropyLoss()
for name, weight in model.named_parameters():
    weight.requires_grad_(name.endswith((".a.weight", ".b.weight")))

graph = mw.trace(mw.WithLoss(model, loss), data[:2], sequence=1)
plan = mw.find_plan(graph, mw.discover(), mw.Job(global_batch=128, sequence=1, precision="fp32"))
if "RANK" not in os.environ:
    trained = sum(layer.parameters for layer in graph.layers)
    frozen = sum(layer.frozen_parameters for layer in graph.layers)
    print(f"{trained:,} parameters are trained, beside {frozen:,} that are only held", flush=True)
mw.launch(plan)  # starts this script once per device, unless torchrun already has
mw.train(
    model,
    plan,
    data,
    loss=loss,
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    options=mw.TrainingOptions(steps=50),
    on_metrics=lambda m: print(f"step {m.step}: loss {m.loss:.4f}", flush=True),
)
