"""Muon: momentum whose update of a matrix is orthogonalized (Keller Jordan, 2024).

https://kellerjordan.github.io/posts/muon/ defines it; its scale, which lets it share AdamW's
learning rate and weight decay, is that of arXiv 2502.16982. `torch.optim.Muon` (PyTorch 2.9) is the
same with adjust_lr_fn="match_rms_adamw", one matrix after the other and without the guard.
"""

import itertools
import math
from collections import Counter

import torch
from torch import Tensor, nn

from smollm import distributed

MOMENTUM = 0.95  # decay of the gradients' running mean, with Nesterov's correction
NEWTON_SCHULZ_STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: singular values come near 1, fast
ADAMW_RMS = 0.2  # of an element of AdamW's update, about (arXiv 2502.16982, section 2.2)
LARGEST_BATCH = 2**25  # elements of matrices that are updated at a time: bounds the memory
SMALLEST_NORM = 1e-7  # by which a matrix is divided, at least


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly the nearest semi-orthogonal matrices: singular values become about 0.7 to 1.2, but
    for the smallest ones, below about a hundredth of the norm.

    Five Newton-Schulz iterations of odd polynomials of degree 5, all matrices in one batch.

    Args:
        matrices: (N, rows, columns), fp32.
        dtype: to iterate in; bf16 is enough.

    Returns:
        (N, rows, columns) of `dtype`.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.to(dtype)
    if tall:  # the products are of the shorter side's size
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def update_scale(rows: int, columns: int) -> float:
    """What gives an orthogonalized matrix the root mean square of AdamW's updates."""
    return ADAMW_RMS * math.sqrt(max(rows, columns))


def batch_size(numel: int) -> int:
    """How many matrices of so many elements are updated at a time."""
    return max(1, LARGEST_BATCH // numel)


def step_bytes(shapes: Counter[tuple[int, ...]], itemsize: int) -> int:
    """Memory that a step takes for itself, at most: five copies of a batch, in its dtype.

    Args:
        shapes: of the matrices, with their numbers.
        itemsize: bytes of the dtype that it iterates in.
    """
    sizes = ((math.prod(shape), count) for shape, count in shapes.items())
    return max(5 * itemsize * numel * min(count, batch_size(numel)) for numel, count in sizes)


class Muon(torch.optim.Optimizer):
    """Muon for matrices; matrices of one shape are updated together.

    Where a model is sharded (FSDP2), each process keeps its shard of the momentum; the whole
    updates are gathered, one batch at a time, and orthogonalized by every process.

    Args:
        parameters: matrices of one device.
        lr: the learning rate, the same as AdamW's beside it.
        weight_decay: decoupled, as AdamW's.
        dtype: of the iterations.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        by_shape = sorted(parameters, key=lambda p: tuple(p.shape))  # stable: the model's order
        groups = [
            {"params": list(group)}
            for _, group in itertools.groupby(by_shape, key=lambda p: tuple(p.shape))
        ]
        defaults = {"lr": lr, "weight_decay": weight_decay, "rate_scale": 1.0}
        super().__init__(groups, defaults)
        self.dtype = dtype
        # As with the fused AdamW: a () fp32 tensor that is 1 where this step must change nothing.
        self.found_inf: Tensor | None = None
        self.buffers: list[Tensor] = []  # of each group, (N, rows of this shard, columns) fp32
        for group in self.param_groups:
            local = [distributed.local(p.detach()) for p in group["params"]]
            buffer = torch.zeros((len(local), *local[0].shape), device=local[0].device)
            self.buffers.append(buffer)
            for parameter, part in zip(group["params"], buffer, strict=True):
                self.state[parameter]["momentum_buffer"] = distributed.wrap_like(part, parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix; waits for the device nowhere."""
        for group, buffer in zip(self.param_groups, self.buffers, strict=True):
            parameters = group["params"]
            count = batch_size(parameters[0].numel())
            for start in range(0, len(parameters), count):
                chosen = slice(start, start + count)
                self._update(parameters[chosen], buffer[chosen], group["lr"], group["weight_decay"])

    def _update(
        self, parameters: list[nn.Parameter], buffer: Tensor, lr: float, weight_decay: float
    ) -> None:
        """Update matrices of one shape, whose momentum is `buffer`."""
        weights = [distributed.local(p) for p in parameters]
        gradients = torch.stack([distributed.local(p.grad) for p in parameters])
        first = parameters[0]
        blend, shrink = 1 - MOMENTUM, 1 - lr * weight_decay
        scale = -lr * update_scale(*first.shape)
        if self.found_inf is not None:  # multiplying by 0 would leave NaN as it is
            bad = self.found_inf != 0
            gradients.masked_fill_(bad, 0.0)
            blend, shrink, scale = (
                torch.where(bad, neutral, torch.full_like(self.found_inf, value))
                for neutral, value in ((0.0, blend), (1.0, shrink), (0.0, scale))
            )
        buffer.lerp_(gradients, blend)
        update = gradients.lerp_(buffer, MOMENTUM).to(self.dtype)
        del gradients
        whole = distributed.gather_rows(update, first)
        update = distributed.own_rows(orthogonalize(whole, self.dtype), first)
        torch._foreach_mul_(weights, shrink)
        torch._foreach_add_(weights, update.float().mul_(scale).unbind())
