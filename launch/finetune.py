"""Fine-tunes a model on a task, several seeds, and sets it beside what costs no training.

    python launch/finetune.py run=runs/NAME task=sst2 out=runs/NAME_sst2
    python launch/finetune.py run=runs/NAME init=random task=sst2 out=runs/NAME_sst2_random
    python launch/finetune.py model=attention_tiny tokenizer=bytes task=jsonl train=train.jsonl \\
        test=test.jsonl input_field=text target_field=label metrics=accuracy out=runs/mine
    python launch/finetune.py table runs/NAME_sst2 runs/NAME_sst2_random out=runs/sst2

task= is a file of configs/task/, or `jsonl` for files (jsonl, csv or parquet) described by words:
train=, validation= (left out: a tenth of train, by hash), test=, input_field= and target_field=
(or input='title: {title} text: {text}'), metrics=. The same words override a named task's.

The answer is written as text, or with head=classifier chosen among the labels of a classification.

OUT has per seed the answers to the tests (TEST.jsonl), the best weights on validation (best.pt) and
result.json; over all seeds table.md and results.json. The same command resumes. `table` compares
several OUTs without a model, task by task. One process trains one seed after the other
(`deepspeed --num_gpus 1` works, too). Exit codes: 0 done, 1 a checkpoint is damaged, 2 bad input.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data.folder_lock import lock_folder
from evals.downstream import outputs, report
from evals.downstream.baselines import baselines
from evals.downstream.metrics import combine, contributions
from evals.downstream.tasks import Splits, Task, open_task
from launch.finetuning_data import EncodedTask, labels_of, limited
from pretrain.command_line import choose_device, parse
from pretrain.config_problems import launcher_world_size
from pretrain.finetuning.classifier import LabelClassifier
from pretrain.finetuning.generation import GenerationOptions, generate
from pretrain.finetuning.interface import PairModel
from pretrain.finetuning.starting_point import (
    StartingPoint,
    from_run,
    untrained,
    with_defaults,
)
from pretrain.finetuning.train import TrainOptions, train
from pretrain.training.environment import git_commit
from pretrain.training.manifest import CheckpointError, write_json

FINISHED, FAILED, BAD_INPUT = 0, 1, 2
WEIGHTS = "best.pt"


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
    micro_batch_tokens: int = 65536
    check_every: int = 0  # steps; default: an epoch
    patience: int = 3
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_fraction: float = 0.05
    beams: int = 1  # of the tests; validation is greedy
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # tokens in a row that no answer has twice; 0: no limit
    lanes: int = 64  # texts written side by side
    precision: str = ""  # bf16 (autocast) | fp32; default: bf16 on a GPU
    device: str = "auto"


@dataclass
class TableArguments:
    """Everything `finetune.py table OUT ...` understands."""

    out: str = ""  # folder for table.md and results.json
    baseline: str = ""  # row that all are compared with; default: the last folder
    workers: int = 1  # processes that score; ROUGE takes 0.1 s for a long summary


# What may change from one call to the next without another result.
_FREE = ("out", "seeds", "device", "lanes", "tokenizer")


def main(argv: list[str]) -> int:
    """Runs a command line; the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return FINISHED
    argv = [word for word in argv if not word.startswith("--local_rank")]  # of the launcher
    try:
        if argv[0] == "table":
            folders = [Path(word) for word in argv[1:] if "=" not in word]
            words = [word for word in argv[1:] if "=" in word]
            show(folders, parse(TableArguments, words))
        else:
            finetune(argv)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED if isinstance(error, CheckpointError) else BAD_INPUT
    return FINISHED


def show(folders: list[Path], arguments: TableArguments) -> None:
    """Prints the table of several fine-tunings, and writes it where `out` says."""
    if not folders:
        raise ValueError("table needs folders; use table runs/A runs/B out=runs/compared")
    comparisons = [report.compare(group, arguments.baseline) for group in report.by_task(folders)]
    found = [report.records(comparison, arguments.workers) for comparison in comparisons]
    records = [record for part in found for record in part]
    tables = [report.markdown(*pair) for pair in zip(found, comparisons, strict=True)]
    if len(tables) > 1:
        tables.insert(0, report.overview(records, comparisons))
    table = "\n\n".join(tables)
    print(table)
    if arguments.out:
        out = Path(arguments.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(table + "\n", encoding="utf-8")
        write_json(out / "results.json", {"commit": git_commit(), "rows": records})


def finetune(words: list[str]) -> None:
    """Trains and tests every seed that is not done, then shows the table."""
    if launcher_world_size() > 1:
        raise ValueError(
            "fine-tuning runs in one process; start it without a launcher or with --num_gpus 1, "
            "and give other GPUs other tasks or models"
        )
    model_words = [word for word in words if word.startswith(("model=", "model."))]
    arguments = parse(FinetuneArguments, [word for word in words if word not in model_words])
    for key in ("seeds", "batch_size", "patience"):
        if getattr(arguments, key) < 1:
            raise ValueError(f"{key}={getattr(arguments, key)} must be at least 1")
    task = open_task(arguments.task, source=arguments.source, overrides=_overrides(arguments))
    start = _starting_point(arguments, model_words)
    device = choose_device(arguments.device)
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision={precision} is not known; use bf16 or fp32")
    _check_head(arguments, task)
    everything = task.read()
    labels = labels_of(task, everything)
    splits = limited(
        everything,
        train=arguments.train_examples,
        validation=arguments.validation_examples,
        test=arguments.test_examples,
    )
    # Here, not after an hour of training, what a metric lacks is found.
    first = splits.validation[:1]
    contributions(task.metrics, [first[0].references[0]], first, labels)
    out = Path(arguments.out)

    def build(seed: int) -> PairModel | LabelClassifier:
        if arguments.head == "classifier":
            return start.build_classifier(seed, device, len(labels), autocast=precision == "bf16")
        return start.build(seed, device, autocast=precision == "bf16")

    model = build(0)
    data = EncodedTask.of(
        splits,
        task.name,
        start.tokenizer,
        model,
        labels,
        max_input=arguments.max_input_tokens,
        max_target=arguments.max_target_tokens,
        truncate=arguments.truncate,
    )
    options = _train_options(arguments, len(splits.train))
    taken = ValueError(
        f"out={out}: another fine-tuning is writing there; wait for it, or choose another out="
    )
    with lock_folder(out, taken):
        _check_settings(out, arguments, task, labels, start, precision)
        print(data.describe(model), flush=True)
        for test, examples in splits.tests.items():
            for name, texts in baselines(task.kind, splits.train, examples).items():
                outputs.write(out / "baselines" / name, test, texts, examples)
        for seed in range(arguments.seeds):
            folder = out / f"seed_{seed}"
            if (folder / outputs.RESULT).exists():
                continue
            model = build(seed)
            _one_seed(model, seed, folder, data, splits, task, labels, options, arguments, start)
        print(f"\n{shlex.join(['launch/finetune.py', *words])}\n")
        show([out], TableArguments(out=str(out)))


def _check_head(arguments: FinetuneArguments, task: Task) -> None:
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


def _overrides(arguments: FinetuneArguments) -> dict[str, Any]:
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


def _starting_point(arguments: FinetuneArguments, model_words: list[str]) -> StartingPoint:
    if bool(arguments.run) == any(word.startswith("model=") for word in model_words):
        raise ValueError("give run=runs/NAME, or model=NAME tokenizer=FILE for an untrained model")
    if not arguments.out:
        raise ValueError("out= is missing; use out=runs/NAME_TASK")
    if arguments.init not in ("pretrained", "random"):
        raise ValueError(f"init={arguments.init} is not known; use pretrained or random")
    if not arguments.run:
        return untrained(model_words, arguments.tokenizer)
    if model_words:
        raise ValueError(f"{model_words[0]}: run={arguments.run} has its own; leave it out")
    return from_run(
        Path(arguments.run),
        tag=arguments.tag,
        tokenizer=arguments.tokenizer,
        random=arguments.init == "random",
    )


def _check_settings(
    out: Path,
    arguments: FinetuneArguments,
    task: Task,
    labels: list[str],
    start: StartingPoint,
    precision: str,
) -> None:
    """Writes settings.json, or compares with the one that is there.

    Raises:
        ValueError: the folder holds a fine-tuning with other settings.
    """
    asked = {f.name: getattr(arguments, f.name) for f in fields(arguments) if f.name not in _FREE}
    settings = {
        "arguments": {**asked, "precision": precision},
        "task": {key: value for key, value in asdict(task).items() if key != "labels"},
        "labels": labels,
        "model": start.facts,
    }
    settings = json.loads(json.dumps(settings))
    if not (out / outputs.SETTINGS).exists():
        write_json(out / outputs.SETTINGS, settings)
        return
    before = outputs.read_settings(out)
    # A key that came later had its default before it came.
    before["arguments"] = {f.name: f.default for f in fields(arguments)} | before["arguments"]
    before["model"]["config"] = with_defaults(before["model"]["config"])
    changed = {
        key: f"{key} was {before[part].get(key)!r}, is {value!r}"
        for part in ("model", "task", "arguments")
        for key, value in settings[part].items()
        if before[part].get(key) != value
    }
    if before["labels"] != labels:
        differ = sorted(set(before["labels"]) ^ set(labels)) or labels
        changed["labels"] = f"labels are others, e.g. {differ[0]!r}"
    if "config" in changed:
        changed["config"] = "another model configuration"
    if changed:
        raise ValueError(
            f"out={out} holds a fine-tuning with other settings "
            f"({'; '.join(changed.values())}); choose another out="
        )


def _train_options(arguments: FinetuneArguments, n_train: int) -> TrainOptions:
    per_epoch = max(1, n_train // arguments.batch_size)
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


def _one_seed(
    model: PairModel | LabelClassifier,
    seed: int,
    folder: Path,
    data: EncodedTask,
    splits: Splits,
    task: Task,
    labels: list[str],
    options: TrainOptions,
    arguments: FinetuneArguments,
    start: StartingPoint,
) -> None:
    """Trains, keeps the best weights, answers the tests."""
    folder.mkdir(parents=True, exist_ok=True)
    greedy = GenerationOptions(
        max_tokens=data.target_tokens + 1,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
        lanes=arguments.lanes,
    )

    def answer(inputs: Sequence[Any], how: GenerationOptions) -> list[str]:
        if isinstance(model, LabelClassifier):
            return [labels[i] for i in model.classify(inputs, options.micro_batch_tokens)]
        return [start.tokenizer.decode(ids) for ids in generate(model, inputs, how)]

    def validate() -> float:
        texts = answer(data.validation, greedy)
        metric = task.metrics[0]
        return combine(metric, contributions([metric], texts, splits.validation, labels)[metric])

    def tell(check: dict[str, float]) -> None:
        print(
            f"seed {seed}  step {check['step']:,}/{options.steps:,}  loss {check['loss']:.3f}  "
            f"validation {task.metrics[0]} {check['validation']:.1f}",
            flush=True,
        )

    progress = folder / "progress.pt"
    result = train(model, data.train, validate, options, seed, progress, tell)
    torch.save(model.module.state_dict(), folder / "tmp.best.pt")
    os.replace(folder / "tmp.best.pt", folder / WEIGHTS)
    how = replace(greedy, beams=arguments.beams, length_penalty=arguments.length_penalty)
    for test, inputs in data.tests.items():
        outputs.write(folder, test, answer(inputs, how), splits.tests[test])
    write_json(folder / outputs.RESULT, {**result, "truncated": data.cut, "commit": git_commit()})
    progress.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
