"""Regression on a CSV file: numbers and words to a price, and the same prices by plain PyTorch from what the run keeps."""

import random
import tempfile
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import lowmem_pnn

TOWNS = {"Bern": 90, "Oslo": 110, "Riga": 40}


def network() -> nn.Module:
    """Area, rooms and three towns to a price."""
    return nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def houses(file: Path, count: int, seed: int) -> Path:
    """Write a table of houses."""
    draw = random.Random(seed)
    rows = [(draw.uniform(30, 200), draw.randint(1, 8), draw.choice(list(TOWNS))) for _ in range(count)]
    prices = [area * TOWNS[town] / 1000 + rooms + draw.gauss(0, 0.5) for area, rooms, town in rows]
    pd.DataFrame(rows, columns=["area", "rooms", "town"]).assign(price=prices).to_csv(file, index=False)
    return file


folder = Path(tempfile.mkdtemp())
train, test = houses(folder / "train.csv", 800, seed=0), houses(folder / "test.csv", 200, seed=1)
run = {"max_gpu_mem": "100MB", "device": "cpu", "workdir": folder / "run"}
result = lowmem_pnn.fit(network, f"csv:{train}", test=f"csv:{test}", target="price", method="exact", epochs=20, lr=3e-3, **run)
table, seen = pd.get_dummies(pd.read_csv(test), columns=["town"]), result.preparation  # words one-hot, numbers standardised
x = (torch.tensor(table.drop(columns="price").to_numpy("float32")) - torch.tensor(seen["mean"])) / torch.tensor(seen["std"])
answers = lowmem_pnn.load_weights(network(), result.weights_file)(x)[:, 0]
error = (answers - torch.tensor(table.price.to_numpy())).abs().mean().item()
assert abs(error - result.scores["test"]["mae"]) < 1e-4
print(f"plain PyTorch, same weights: mean error {error:.2f}, R2 {result.scores['test']['r2']:.3f}")
