"""AdamW parameter groups and learning-rate schedules.

Who decays: matrices. Vectors (norms, biases, gates) do not; embedding tables do not, tied or not:
decay shrinks the rows of rare tokens, which see no gradient in most steps (OLMo 2, arXiv
2501.00656). State-space parameters (A, dt, D, ...) form a group with their own rate and no decay:
they are log-rates of a dynamical system, and decay would pull every time scale towards one (S4,
arXiv 2111.00396). A module names its own by `no_decay_parameters()` and `ssm_parameters()`.

Schedules are pure functions of tokens seen that return a *factor*: every group keeps its base rate,
and a resumed run needs no scheduler state.
"""

import math
from typing import Any

from torch import nn

from pretrain.config import OptimConfig, ScheduleConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Splits the trainable parameters into the groups `decay`, `no_decay` and `ssm`.

    Returns:
        AdamW groups with `name`, `params`, `base_lr`, `lr` and `weight_decay`; no empty one.

    Raises:
        ValueError: when a module names a parameter that it does not have.
    """
    no_decay, ssm = _declared(model, "no_decay_parameters"), _declared(model, "ssm_parameters")
    no_decay |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    members: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "ssm": []}
    for parameter in model.parameters():  # a tied weight appears once
        if not parameter.requires_grad:
            continue
        if id(parameter) in ssm:
            members["ssm"].append(parameter)
        elif id(parameter) in no_decay or parameter.ndim < 2:
            members["no_decay"].append(parameter)
        else:
            members["decay"].append(parameter)
    return [
        {"params": members[name], **hyperparameters}
        for name, hyperparameters in group_hyperparameters(config).items()
        if members[name]
    ]


def group_hyperparameters(config: OptimConfig) -> dict[str, dict[str, Any]]:
    """What each group holds besides its parameters; re-applied after a checkpoint is loaded."""
    rate, ssm_rate = config.learning_rate, config.ssm_learning_rate
    table = {
        "decay": (rate, config.weight_decay),
        "no_decay": (rate, 0.0),
        "ssm": (ssm_rate, 0.0),
    }
    return {
        name: {"name": name, "base_lr": lr, "lr": lr, "weight_decay": decay}
        for name, (lr, decay) in table.items()
    }


def schedule_factor(tokens: int, total_tokens: int, config: ScheduleConfig) -> float:
    """Learning-rate factor after `tokens` of `total_tokens`.

    Warm-up is linear. Then `constant` stays at 1, `cosine` falls to `final_ratio` over the rest,
    and `wsd` (warm-up, stable, decay; MiniCPM, arXiv 2404.06395) stays at 1 until the last
    `decay_fraction`, over which it falls linearly to `final_ratio`.
    """
    tokens = min(tokens, total_tokens)  # the last step may reach beyond
    warmup = config.warmup_fraction * total_tokens
    if tokens < warmup:
        return tokens / warmup
    if config.type == "constant":
        return 1.0
    start = warmup if config.type == "cosine" else (1 - config.decay_fraction) * total_tokens
    if tokens <= start:
        return 1.0
    done = (tokens - start) / (total_tokens - start)
    if config.type == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return 1.0 - (1.0 - config.final_ratio) * done


def _declared(model: nn.Module, method: str) -> set[int]:
    """Identities of the parameters that modules declare by `method`, relative to themselves."""
    declared: set[int] = set()
    for path, module in model.named_modules():
        names: set[str] = getattr(module, method, set)()
        own = dict(module.named_parameters(remove_duplicate=False))
        for name in names:
            if name not in own:
                raise ValueError(
                    f"{type(module).__name__}.{method}() at '{path}' names '{name}', which is not "
                    f"one of its parameters: {', '.join(sorted(own))}"
                )
            declared.add(id(own[name]))
    return declared
