"""Optimizer states and gradients spread over several processes by DeepSpeed (ZeRO-1 and 2).

``accelerate launch --use_deepspeed``, or ACCELERATE_USE_DEEPSPEED=true under torchrun, asks for it,
with the options that accelerate knows. The engine is made here because accelerate's own knows no
processors without an accelerator, and because its state has to be saved with all else.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from compress import distributed
from compress.errors import RecipeError

STATES = ("exp_avg", "exp_avg_sq")  # of AdamW
OURS = ("optimizer", "scheduler", "fp16", "bf16", "train_batch_size")  # what a recipe says


def _asked() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def wanted() -> bool:
    """Whether there are several processes, and whoever started them asked for DeepSpeed."""
    return _asked() and distributed.size() > 1


def check_launcher(*, muon: bool) -> None:
    """Refuse what DeepSpeed cannot do for a recipe, before anything is read.

    Raises:
        RecipeError: it is not installed, or more is asked of it.
    """
    if not _asked():
        return
    fsdp = "accelerate launch --use_fsdp does that"
    if find_spec("deepspeed") is None:
        raise RecipeError(
            "DeepSpeed is asked for and not installed: pip install 'compresskit[deepspeed]', or "
            "use accelerate launch --use_fsdp"
        )
    if (stage := _config()["zero_optimization"].get("stage", 0)) not in (1, 2):
        raise RecipeError(
            f"ZeRO-{stage} is not supported, 1 and 2 are; to spread parameters {fsdp}"
        )
    if muon:
        raise RecipeError(
            f"optimizer: muon moves whole matrices, which DeepSpeed cuts into pieces; {fsdp}"
        )


def _config() -> dict[str, Any]:
    """What the launcher asks for, or a file that it names; what is left open is DeepSpeed's."""
    config = dict(DeepSpeedPlugin().deepspeed_config)
    spread = config.get("zero_optimization", {})
    config["zero_optimization"] = {k: v for k, v in spread.items() if v != "auto"}
    return {k: v for k, v in config.items() if k not in OURS}


class Zero:
    """An objective and its AdamW in DeepSpeed's engine.

    pieces  of a step's text that go through the model one by one
    clip    the largest norm of a gradient
    half    whether products are in bfloat16
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        pieces: int,
        clip: float,
        half: bool,
    ) -> None:
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        config = _config() | {
            "train_micro_batch_size_per_gpu": 1,  # of nothing that is asked here
            "gradient_accumulation_steps": pieces,
            "gradient_clipping": clip,
            "torch_autocast": {"enabled": half, "dtype": "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        self.optimizer, self.linked = optimizer, False
        self.engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Of one piece; gradients are averaged over processes with the ``last``."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Clip, move all parameters, and forget the gradients."""
        self.engine.step()
        self._link()

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What AdamW keeps of a parameter, whole; empty before the first step. All must ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.optimizer.state:
            return {}
        found = {key: safe_get_full_optimizer_state(parameter, key) for key in STATES}
        step = next(iter(self.optimizer.state.values()))["step"]  # all parameters have taken it
        return found | {"step": step}

    def restore(self, parameter: Tensor, value: Tensor, state: dict[str, Tensor]) -> None:
        """A parameter and its state as they were; ``state`` may be empty."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value.to(parameter.device))
        if not state:
            return
        if not self.linked:
            self._begin(state["step"])
        for key in STATES:
            safe_set_full_optimizer_state(parameter, state[key].to(parameter.device), key)

    def _begin(self, step: Tensor) -> None:
        """States of zeros, as if so many steps were taken."""
        for group in self.optimizer.param_groups:
            for flat in group["params"]:
                zeros = {key: torch.zeros_like(flat) for key in STATES}
                self.optimizer.state[flat] = {"step": step.clone()} | zeros
        self._link()

    def _link(self) -> None:
        """Once, when there are states: tell parameters where theirs are.

        The engine does so after its first group's step, when others have none.
        """
        if self.linked:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        self.linked = True
        spread = self.engine.optimizer
        for parameters, flat in zip(
            spread.bit16_groups, spread.single_partition_of_fp32_groups, strict=True
        ):
            lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)
