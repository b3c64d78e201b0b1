"""The learning rate of each step: warm-up, decay, floor."""

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from megavlm.recipe import OptimizerConfig
from megavlm.runtime.log import LOGGER


def build_schedule(
    optimizer: MegatronOptimizer, config: OptimizerConfig, *, train_iters: int, iteration: int
) -> OptimizerParamScheduler:
    """Make megatron-core's scheduler, counted in optimizer steps, as it stands after ``iteration`` of them.

    Call ``step(increment=1)`` *before* each optimizer step: step 1 then trains with ``lr / lr_warmup_iters`` (and not
    with 0), and the last step of the decay with ``min_lr``.
    """
    lr_decay_iters = config.lr_decay_iters or train_iters
    LOGGER.info(
        "learning rate: %.4g after %d steps of warm-up, %s to %.4g at step %d; weight decay %.4g",
        config.lr,
        config.lr_warmup_iters,
        config.lr_decay_style,
        config.lr if config.lr_decay_style == "constant" else config.min_lr,
        lr_decay_iters,
        config.weight_decay,
    )
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=lr_decay_iters,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    schedule.step(increment=iteration)  # a pure function of the iteration: a checkpoint needs no state of it
    return schedule


def current_lr(optimizer: MegatronOptimizer) -> float:
    """Learning rate of the next update: of parts that do not scale it, if any such part trains."""
    lr = get_canonical_lr_for_logging(optimizer.param_groups)
    if lr is None:
        lr = optimizer.param_groups[0]["lr"] if optimizer.param_groups else 0.0
    return float(lr)
