"""What a fine-tuning is asked for: its words, and that its folder keeps to them."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from evals.downstream import outputs
from evals.downstream.examples import digest
from evals.downstream.tasks import Splits, Task
from pretrain.files import write_json
from pretrain.finetuning.starting_point import StartingPoint, from_run, untrained, with_defaults
from pretrain.finetuning.train import TrainOptions


@dataclass
class FinetuneArguments:
    """Everything the command understands but `model=` and `model.KEY=`; 0 and "" are defaults."""

    run: str = ""
    tag: str = "latest"  # checkpoint of run
    init: str = "pretrained"  # or random: the run's model without its weights
    tokenizer: str = ""  # with run: if its corpus is not where it was
    out: str = ""
    task: str = ""
    head: str = "text"  # the answer is written; or classifier: it is one of the labels
    source: str = ""  # folder of the files of a task that names none
    train: str = ""
    validation: str = ""
    test: str = ""
    input: str = ""  # template
    input_field: str = ""  # column; short for input={COLUMN}
    target: str = ""
    target_field: str = ""
    metrics: str = ""  # with commas; the first one picks the weights
    holdout: float = 0.0  # share of train for validation where it has no files; default: a tenth
    train_examples: int = 0  # take so many, by hash
    validation_examples: int = 0
    test_examples: int = 0
    max_input_tokens: int = 0
    max_target_tokens: int = 0  # default: of the longest training target
    truncate: bool = False
    seeds: int = 3
    epochs: float = 3.0
    steps: int = 0  # in place of epochs
    batch_size: int = 32
    micro_batch_tokens: int = 65536  # of each process
    check_every: int = 0  # steps; default: an epoch
    patience: int = 3
    dropout: float | None = None  # default: the run's, or the model's
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_fraction: float = 0.05
    beams: int = 1  # of the tests; validation is greedy
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # tokens in a row that no answer has twice; 0: no limit
    lanes: int = 64  # texts written side by side
    precision: str = ""  # bf16 (autocast) | fp32; default: bf16 on a GPU
    device: str = "auto"


# What may change from one call to the next without another result.
FREE = ("out", "seeds", "device", "lanes", "tokenizer")


def check_folder(out: str) -> None:
    """Raises:
    ValueError: it is a file.
    """
    if Path(out).is_file():
        raise ValueError(f"out={out} is a file; name a folder")


def check_head(arguments: FinetuneArguments, task: Task) -> None:
    """Raises:
    ValueError: the head is not known, or is not for this task.
    """
    if arguments.head not in ("text", "classifier"):
        raise ValueError(f"head={arguments.head} is not known; use text or classifier")
    if arguments.head == "text":
        return
    if task.kind != "classification":
        raise ValueError(
            f"head=classifier: task={task.name} is a {task.kind} ({', '.join(task.metrics)}), "
            f"whose answers are no closed set of labels; leave head= out"
        )
    for key in ("beams", "max_target_tokens", "no_repeat_ngram_size"):
        if getattr(arguments, key) != getattr(FinetuneArguments, key):
            raise ValueError(f"{key}= is of answers that are written; leave it or head= out")


def overrides(arguments: FinetuneArguments) -> dict[str, Any]:
    """What the words say of the task."""
    for key in ("input", "target"):
        if getattr(arguments, key) and getattr(arguments, f"{key}_field"):
            raise ValueError(f"{key}= and {key}_field= say the same; leave one out")
    given: dict[str, Any] = {
        "holdout": arguments.holdout,
        "train": arguments.train,
        "validation": arguments.validation,
        "tests": {"test": arguments.test} if arguments.test else {},
        "metrics": arguments.metrics.split(",") if arguments.metrics else [],
    }
    for key in ("input", "target"):
        column = getattr(arguments, f"{key}_field")
        given[key] = f"{{{column}}}" if column else getattr(arguments, key)
    return {key: value for key, value in given.items() if value}


def starting_point(arguments: FinetuneArguments, model_words: list[str]) -> StartingPoint:
    """The model that the words name.

    Raises:
        ValueError: there is none, or words contradict each other.
        CheckpointError: the run's checkpoint is missing or damaged.
    """
    if bool(arguments.run) == any(word.startswith("model=") for word in model_words):
        raise ValueError("give run=runs/NAME, or model=NAME tokenizer=FILE for an untrained model")
    if not arguments.out:
        raise ValueError("out= is missing; use out=runs/NAME_TASK")
    check_folder(arguments.out)
    if arguments.init not in ("pretrained", "random"):
        raise ValueError(f"init={arguments.init} is not known; use pretrained or random")
    if not arguments.run:
        return untrained(model_words, arguments.tokenizer, arguments.dropout)
    if model_words:
        raise ValueError(f"{model_words[0]}: run={arguments.run} has its own; leave it out")
    return from_run(
        Path(arguments.run),
        tag=arguments.tag,
        tokenizer=arguments.tokenizer,
        random=arguments.init == "random",
        dropout=arguments.dropout,
    )


def check_settings(
    out: Path,
    arguments: FinetuneArguments,
    task: Task,
    labels: list[str],
    splits: Splits,
    start: StartingPoint,
    precision: str,
) -> None:
    """Compares with the settings.json that is there, and writes it.

    Raises:
        ValueError: the folder holds a fine-tuning with other settings.
    """
    asked = {f.name: getattr(arguments, f.name) for f in fields(arguments) if f.name not in FREE}
    settings = {
        "arguments": {**asked, "precision": precision},
        "task": {key: value for key, value in asdict(task).items() if key != "labels"},
        "labels": labels,
        "examples": {split: digest(examples) for split, examples in splits.named().items()},
        "model": start.facts,
    }
    settings = json.loads(json.dumps(settings))
    if (out / outputs.SETTINGS).exists():
        _compare(out, outputs.read_settings(out), settings)
    write_json(out / outputs.SETTINGS, settings)


def _compare(out: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises:
    ValueError: the two differ.
    """
    # A key that came later had its default before it came.
    before["arguments"] = asdict(FinetuneArguments()) | before["arguments"]
    before["model"]["config"] = with_defaults(before["model"]["config"])
    before.setdefault("examples", settings["examples"])  # an older folder has no digests
    changed = {
        key: f"{key} was {before[part].get(key)!r}, is {value!r}"
        for part in ("model", "task", "arguments")
        for key, value in settings[part].items()
        if before[part].get(key) != value
    }
    if before["labels"] != settings["labels"]:
        differ = sorted({*before["labels"]} ^ {*settings["labels"]}) or settings["labels"]
        changed["labels"] = f"labels are others, e.g. {differ[0]!r}"
    if "config" in changed:
        changed["config"] = "another model configuration"
    for split, found in settings["examples"].items():
        if before["examples"].get(split) != found:
            changed[f"{split} examples"] = f"{split} examples are others"
    if changed:
        raise ValueError(
            f"out={out} holds a fine-tuning with other settings "
            f"({'; '.join(changed.values())}); choose another out="
        )


def train_options(arguments: FinetuneArguments, n_train: int) -> TrainOptions:
    """How it is trained, on so many examples.

    Raises:
        ValueError: they are less than a batch, the epochs less than a step, or an option is outside
            its range.
    """
    if n_train < arguments.batch_size:
        raise ValueError(
            f"batch_size={arguments.batch_size} is more than the {n_train} training examples"
        )
    per_epoch = n_train // arguments.batch_size
    if not 0 < arguments.epochs < math.inf:
        raise ValueError(f"epochs={arguments.epochs:g} must be a positive number")
    steps = arguments.steps or round(arguments.epochs * per_epoch)
    if steps < 1:
        raise ValueError(f"epochs={arguments.epochs:g} are less than a step; raise them")
    return TrainOptions(
        steps=steps,
        batch_size=arguments.batch_size,
        check_every=arguments.check_every or per_epoch,
        patience=arguments.patience,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        warmup_fraction=arguments.warmup_fraction,
        micro_batch_tokens=arguments.micro_batch_tokens,
    )
