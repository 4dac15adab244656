"""`key=value` words of a command line, as a dataclass; and what some of them name."""

import difflib
import os
from collections.abc import Collection
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def parse(kind: type, words: list[str]) -> Any:
    """Turns `key=value` words into a dataclass of str, bool, int and float fields; the last two may
    be None by default.

    Raises:
        ValueError: a word is no key=value, its key is not known (with its closest match), or its
            value has the wrong type.
    """
    known = {field.name: field for field in fields(kind)}
    all_keys = ", ".join(known)
    values: dict[str, Any] = {}
    problems = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}=?" if close else f"use KEY=VALUE with {all_keys}"
            problems.append(f"{word}: not known; {hint}")
        elif known[key].type is bool:
            values[key] = text == "true"
            if text not in ("true", "false"):
                problems.append(f"{word}: use true or false")
        elif known[key].type is str:
            values[key] = text
        elif known[key].type in (float, float | None):
            try:
                values[key] = float(text)
            except ValueError:
                problems.append(f"{word}: must be a number")
        elif text.isdecimal():
            values[key] = int(text)
        else:
            problems.append(f"{word}: must be a whole number")
    if problems:
        raise ValueError("; ".join(problems))
    return kind(**values)


def numbers(key: str, text: str) -> list[int]:
    """The whole numbers of a `key=1,2,4`.

    Raises:
        ValueError: something else stands there.
    """
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{key}={text}: must be whole numbers with commas between, e.g. 1,2,4")
    return [int(part) for part in parts]


def choose(key: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    """The names of a `key=one,another`.

    Raises:
        ValueError: one of them is not known.
    """
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use some of {', '.join(known)}"
            raise ValueError(f"{key}={text}: {name!r} is not known; {hint}")
    return names


def check_positive(**counts: int) -> None:
    """Raises:
    ValueError: one of them is below 1.
    """
    for key, value in counts.items():
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1")


def parse_rates(text: str) -> tuple[float, ...]:
    """The learning rates of `learning_rates=1e-2,3e-3`, in their order.

    Raises:
        ValueError: one of them is no positive number.
    """
    try:
        rates = tuple(float(word) for word in text.split(","))
        if not all(0 < rate < float("inf") for rate in rates):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"learning_rates={text} is no list of positive numbers; use learning_rates=1e-2,3e-3"
        ) from None
    return rates


def choose_device(name: str) -> "torch.device":
    """`auto`: the GPU when there is one. A GPU with an index becomes the current one.

    Raises:
        ValueError: torch does not know the device, or it is not there.
    """
    import torch  # Here, because it is slow to import and most commands need no device.

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name} cannot be used ({error}); use auto or cpu") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # kernels, events and streams go to the current one
    return device


def first_device(name: str) -> "torch.device":
    """`choose_device` for what runs in processes of its own, each of which takes the first GPU that
    it sees.

    Raises:
        ValueError: there is no such device, or the name has an index.
    """
    kind, _, index = name.partition(":")
    if kind == "cuda" and index:
        raise ValueError(
            f"device={name}: processes take the first GPU that is visible to them; use device=cuda "
            f"with CUDA_VISIBLE_DEVICES={index}"
        )
    return choose_device(name)


def own_device(name: str) -> "torch.device":
    """`choose_device`, where each process of a node takes a GPU of its own.

    Raises:
        ValueError: there is no such device, or more processes than GPUs.
    """
    import torch

    device = choose_device(name)
    if device.type == "cuda" and device.index is None:
        index, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index >= gpus:
            raise ValueError(
                f"device={name}: process {index + 1} of this node finds {gpus} GPU(s); start as "
                f"many processes as there are GPUs, or use device=cpu"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device
