"""The optimizer that the demo model is trained with."""

from __future__ import annotations

import torch

from examples.demo_model.network import Parameters


class Muon:
    """Momentum, made orthogonal (Jordan et al. 2024), for matrices [..., out, in]; AdamW for everything else.

    torch.optim.Muon takes matrices one by one and no stacks of them, as experts are.
    """

    def __init__(self, parameters: Parameters, adam_rate: float, muon_rate: float, decay: float = 0.01) -> None:
        def is_matrix(name: str, tensor: torch.Tensor) -> bool:
            return tensor.ndim > 1 and "embed" not in name and "lm_head" not in name and "router" not in name

        self.matrices = [t for name, t in parameters.items() if is_matrix(name, t)]
        others = [t for name, t in parameters.items() if not is_matrix(name, t)]
        self.momenta = [torch.zeros_like(t) for t in self.matrices]
        self.adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=decay, foreach=True)
        self.adam_rate, self.muon_rate, self.decay = adam_rate, muon_rate, decay

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` of the peak rates; gradients are cleared."""
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        groups: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for weight, momentum in zip(self.matrices, self.momenta, strict=True):
            if weight.grad is None:  # the vision tower's, in a batch without pictures
                continue
            momentum.mul_(0.95).add_(weight.grad)
            groups.setdefault(tuple(weight.shape[-2:]), []).append((weight, weight.grad.add(momentum, alpha=0.95)))
            weight.grad = None
        rate = self.muon_rate * factor
        for (rows, columns), members in groups.items():  # matrices of one shape together
            flat = torch.cat([update.reshape(-1, rows, columns) for _, update in members])
            made = orthogonal(flat) * max(1.0, rows / columns) ** 0.5
            sizes = [weight.numel() // (rows * columns) for weight, _ in members]
            for (weight, _), update in zip(members, made.split(sizes), strict=True):
                weight.mul_(1 - rate * self.decay).sub_(update.view_as(weight), alpha=rate)


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[N, R, C] → nearly the nearest orthogonal matrices: a Newton-Schulz iteration with Muon's coefficients."""
    turned = x.shape[-2] > x.shape[-1]
    x = x.mT if turned else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if turned else x).float()
