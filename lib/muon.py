"""Muon, an optimizer for matrices: steps that turn all directions alike."""

import torch
import torch.nn as nn

from lib.distributed import is_sharded, sharded_like


class Muon(torch.optim.Optimizer):
    """Momentum whose step for a matrix is made orthogonal, so that it moves all directions alike, rare ones too (Jordan et
    al. 2024). Five Newton-Schulz steps push the singular values to about 1; a tall matrix [out, in] gets sqrt(out / in)
    times the learning rate. Matrices of one shape go together, and in fp32 whatever the run's precision is: see orthogonal."""

    def __init__(self, params, lr: float = 0.02, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                directions = [self._direction(p, group["momentum"]) for p in parameters]
                if is_sharded(directions[0]):  # each process needs all of a matrix, and makes the same step of it
                    directions = [direction.full_tensor() for direction in directions]
                steps = orthogonal(torch.stack(directions)).to(parameters[0].dtype)
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                steps = [sharded_like(step, p) for step, p in zip(steps, parameters, strict=True)]
                torch._foreach_add_(parameters, steps, alpha=-rate)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov's: the average of the gradients, with this one counted once more."""
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter, dtype=torch.float32)
        gradient = parameter.grad.float()
        state["average"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["average"], momentum)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """fp32 [K, out, in]: each matrix with its singular values brought to about 0.7 to 1.2, unless they were some hundred times
    smaller than its norm. Not in bf16: of a wide matrix the squares of the values would be lost in rounding errors, which
    these steps blow up (docs/speed.md)."""
    tall = x.shape[1] > x.shape[2]
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.mT if tall else x
    slope, cubic, quintic = 3.4445, -4.775, 2.0315  # of s, s^3, s^5: the slope at 0 lifts small singular values fast
    if x.shape[2] < 2 * x.shape[1]:
        for _ in range(5):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=cubic, alpha=quintic), x, beta=slope)
    else:  # the same for a wide matrix in half the time: steps of its square are multiplied up, and it comes in once
        square, product = x @ x.mT, torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)
        for _ in range(5):
            step = torch.baddbmm(square, square, square, beta=cubic, alpha=quintic)  # and slope times the identity
            product = torch.baddbmm(product, step, product, beta=slope)
            for _ in range(2):
                square = torch.baddbmm(square, step, square, beta=slope)
        x = product @ x
    return x.mT if tall else x
