"""The linear probe of frozen features that fine-tuning is measured beside: logistic regression."""

from collections.abc import Sequence

import torch
from torch.nn import functional


def probe(
    train: torch.Tensor,
    labels: torch.Tensor,
    test: torch.Tensor,
    there: torch.Tensor,
    penalties: Sequence[float],
    most_steps: int,
) -> dict:
    """Return the best accuracy on the test's features [N, D], standardised, over penalties of the weights."""
    mean, deviation = train.mean(0), train.std(0)
    train, test, best = (train - mean) / deviation, (test - mean) / deviation, {"accuracy": 0.0}
    for penalty in penalties:
        weight, bias = _fitted(train, labels, penalty, most_steps)
        accuracy = ((test @ weight.T + bias).argmax(1) == there).float().mean().item()
        best = max(best, {"accuracy": accuracy, "penalty": penalty}, key=lambda each: each["accuracy"])
    return best


def _fitted(features: torch.Tensor, labels: torch.Tensor, penalty: float, most_steps: int) -> list[torch.Tensor]:
    classes = int(labels.max()) + 1
    trained = [torch.zeros(size, requires_grad=True) for size in ((classes, features.shape[1]), (classes,))]
    optimizer = torch.optim.LBFGS(trained, max_iter=most_steps, line_search_fn="strong_wolfe")

    def loss_of() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(features @ trained[0].T + trained[1], labels)
        loss = loss + penalty * trained[0].square().sum()
        loss.backward()
        return loss

    optimizer.step(loss_of)
    return [each.detach() for each in trained]
