"""Adam with the interface, the state and the precisions of Transformer Engine's, in plain torch.

Megatron's distributed optimizer checkpoints ``exp_avg`` and ``exp_avg_sq`` per parameter and
``step`` per parameter group. torch.optim.AdamW keeps ``step`` per parameter, which breaks both
saving before the first step and loading a fully reshardable checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

LARGEST = {torch.float16: 32752.0, torch.float8_e4m3fn: 448.0}
"""What the largest value of a scaled tensor becomes; half of float16's range, as in Transformer
Engine."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, 2015) or AdamW (Loshchilov and Hutter, 2019), computed in float32.

    Of a DTensor, as megatron's FSDP makes of each parameter, this rank's part is updated.

    Args:
        adam_w_mode: decoupled weight decay (AdamW) when true, L2 regularisation when false.
        bias_correction: divide the moments by ``1 - beta ** step``.
        master_weights: update a copy of each bfloat16 parameter, which is rounded to it.
        master_weight_dtype: of the copies, float32 or float16.
        exp_avg_dtype, exp_avg_sq_dtype: of the moments: float32, bfloat16, or scaled by one number
            a tensor: float16, or float8 (e4m3, spelt uint8).
        use_decoupled_grad: gradients are ``param.decoupled_grad``, of any dtype.
        store_param_remainders: a float32 copy is kept as the 16 bits that its bfloat16 parameter
            has not; see `split`.
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
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
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
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self.store_param_remainders = (
            store_param_remainders and master_weights and master_weight_dtype == torch.float32
        )
        self.name_to_dtype_map = {
            "exp_avg": _stored(exp_avg_dtype),
            "exp_avg_sq": _stored(exp_avg_sq_dtype),
            "master_param": master_weight_dtype,
        }
        self._scales: dict[Tensor, dict[str, Tensor]] = {}

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        """Moments of zero, and the parameter's value as its copy."""
        param_here = _local(param)
        zeros = torch.zeros_like(param_here, dtype=torch.float32)
        for name in MOMENTS:
            self.set_scaled_state(param, name, zeros)
        if self.master_weights:
            remainder = torch.zeros_like(param_here, dtype=torch.int16)
            value = remainder if store_param_remainders else param_here.detach().float()
            self.set_scaled_state(param, "master_param", value)

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        """A moment or copy in float32 (the state itself where it is float32); remainders as they
        are, int16."""
        state: Tensor = self.state[param][state_name]
        if state.dtype in (torch.float32, torch.int16):
            return state
        scale = self._scales[param][state_name] if state.dtype in LARGEST else 1.0
        return state.float() * scale

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Store a moment or copy: float32 in this optimizer's precision, remainders as they are."""
        dtype = self.name_to_dtype_map[state_name]
        if unscaled_state.dtype == torch.int16:
            dtype = torch.int16
        if state_name not in self.state[param]:
            self.state[param][state_name] = torch.empty_like(_local(param), dtype=dtype)
        if dtype in LARGEST:
            scale = unscaled_state.abs().amax() / LARGEST[dtype]
            self._scales.setdefault(param, {})[state_name] = scale
            unscaled_state = unscaled_state * torch.where(scale > 0, scale.reciprocal(), 0.0)
        self.state[param][state_name].copy_(unscaled_state)

    def state_dict(self) -> dict[str, Any]:
        """torch's, with every moment and copy in float32."""
        state: dict[str, Any] = super().state_dict()
        for number, param in enumerate(self._params()):
            if number in state["state"]:
                names = state["state"][number]
                state["state"][number] = {n: self.get_unscaled_state(param, n) for n in names}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for number, param in enumerate(self._params()):
            tensors = state_dict["state"].get(number, {})
            if tensors:
                self.state[param] = {}  # torch's has the parameter's dtype
            for name, value in tensors.items():
                remainder = self._keeps_remainder(param) and name == "master_param"
                self.set_scaled_state(param, name, value if remainder else value.float())

    def _params(self) -> list[Any]:
        """In the order of a state dict's numbers."""
        return list(itertools.chain.from_iterable(g["params"] for g in self.param_groups))

    def _keeps_remainder(self, param: Tensor) -> bool:
        return self.store_param_remainders and param.dtype == torch.bfloat16

    def _gradient(self, param: Any) -> Tensor | None:
        return getattr(param, "decoupled_grad" if self.use_decoupled_grad else "grad", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Advance every parameter that has a gradient by one step."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if self._gradient(p) is not None]
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if "exp_avg" not in self.state[p]:
                self.initialize_state(p, self._keeps_remainder(p))
        grads: Any = [_local(self._gradient(p)).float() for p in params]
        exp_avg: Any = [self.get_unscaled_state(p, "exp_avg") for p in params]
        exp_avg_sq: Any = [self.get_unscaled_state(p, "exp_avg_sq") for p in params]
        main: Any = [self._main(p) for p in params]
        self._advance(group, main, grads, exp_avg, exp_avg_sq)
        for p, value, *moments in zip(params, main, exp_avg, exp_avg_sq, strict=True):
            for name, moment in zip(MOMENTS, moments, strict=True):
                if moment is not self.state[p][name]:
                    self.set_scaled_state(p, name, moment)
            if p.dtype != torch.float32:
                self._set_main(p, value)

    def _main(self, param: Tensor) -> Tensor:
        """What is updated, float32: the parameter itself where it is float32."""
        if param.dtype == torch.float32:
            return _local(param)
        copy = self.get_unscaled_state(param, "master_param")
        return joined(param, copy) if copy.dtype == torch.int16 else copy

    def _set_main(self, param: Tensor, value: Tensor) -> None:
        rounded = value
        if self._keeps_remainder(param):
            rounded, remainder = split(value)
            self.set_scaled_state(param, "master_param", remainder)
        elif value is not self.state[param]["master_param"]:
            self.set_scaled_state(param, "master_param", value)
        param.copy_(rounded)

    def _advance(
        self, group: dict[str, Any], params: Any, grads: Any, exp_avg: Any, exp_avg_sq: Any
    ) -> None:
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


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _stored(dtype: torch.dtype) -> torch.dtype:
    return torch.float8_e4m3fn if dtype == torch.uint8 else dtype


def split(main: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as Transformer Engine keeps it beside a parameter: bfloat16, rounded to
    nearest with ties away from zero, and the lower 16 bits, int16; `joined` is the inverse."""
    bits = main.view(torch.int32)
    remainder = bits.to(torch.int16)  # keeps the lower bits
    rounded = (bits >> 16) + (remainder < 0)
    return rounded.to(torch.int16).view(torch.bfloat16), remainder


def joined(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 tensor of a bfloat16 parameter and its remainder; the inverse of `split`."""
    upper = param.detach().view(torch.int16).to(torch.int32) - (remainder < 0).int()
    return ((upper << 16) | (remainder.to(torch.int32) & 0xFFFF)).view(torch.float32)
