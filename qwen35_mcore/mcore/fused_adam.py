"""Adam with the interface and state layout of TE's and Apex's FusedAdam, in plain torch.

Megatron's distributed optimizer checkpoints ``exp_avg`` and ``exp_avg_sq`` per parameter and
``step`` per parameter group. torch.optim.AdamW keeps ``step`` per parameter, which breaks both
saving before the first step and loading a fully reshardable checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class FusedAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, 2015) or AdamW (Loshchilov and Hutter, 2019) over float32 tensors.

    Of a DTensor, as megatron's FSDP makes of each parameter, this rank's part is updated.

    Args:
        adam_w_mode: decoupled weight decay (AdamW) when true, L2 regularisation when false.
        bias_correction: divide the moments by ``1 - beta ** step``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("capturable asks for CUDA graphs; this optimizer runs on a CPU")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Advance every parameter that has a gradient by one step."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], with_gradient: list[torch.Tensor]) -> None:
        params: Any = [_local(p) for p in with_gradient]
        grads: Any = [_local(p.grad) for p in with_gradient]
        states = [self.state[p] for p in with_gradient]
        for p, state in zip(params, states, strict=True):
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        exp_avg: Any = [state["exp_avg"] for state in states]
        exp_avg_sq: Any = [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        step, lr, decay = group["step"], group["lr"], group["weight_decay"]

        if decay and self.adam_w_mode:
            torch._foreach_mul_(params, 1.0 - lr * decay)
        elif decay:
            grads = torch._foreach_add(grads, params, alpha=decay)

        torch._foreach_lerp_(exp_avg, grads, 1.0 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1.0 - beta2)

        corrected = group["bias_correction"]
        correction1 = 1.0 - beta1**step if corrected else 1.0
        correction2 = 1.0 - beta2**step if corrected else 1.0
        denominator = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_div_(denominator, correction2**0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, exp_avg, denominator, -lr / correction1)


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
