"""Fine-tunes a model on a task, several seeds, and sets it beside what costs no training.

    python launch/finetune.py run=runs/NAME task=sst2 out=runs/NAME_sst2
    deepspeed --num_gpus 8 launch/finetune.py run=runs/NAME task=sst2 out=runs/NAME_sst2
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
several OUTs without a model, task by task.

Seeds are trained one after the other, by all processes of the launch: they share the examples of
every step and of every test, and the batches are those of one process. Exit codes: 0 done, 1 a
checkpoint is damaged, 2 bad input, 4 another process of the launch failed.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.folder_lock import lock_folder
from evals.downstream import outputs, report
from evals.downstream.baselines import baselines
from evals.downstream.metrics import combine, contributions
from evals.downstream.tasks import Splits, Task, open_task
from launch.finetuning_data import EncodedTask, labels_of, limited
from launch.finetuning_settings import (
    FinetuneArguments,
    check_folder,
    check_head,
    check_settings,
    overrides,
    starting_point,
    train_options,
)
from pretrain.command_line import check_positive, own_device, parse
from pretrain.files import write_json
from pretrain.finetuning.answers import classify, write
from pretrain.finetuning.classifier import LabelClassifier
from pretrain.finetuning.generation import GenerationOptions
from pretrain.finetuning.interface import PairModel
from pretrain.finetuning.ranks import RankLost, Ranks, SharedError, join
from pretrain.finetuning.starting_point import StartingPoint
from pretrain.finetuning.train import TrainOptions, replace_file, train
from pretrain.training.environment import git_commit
from pretrain.training.leaving import leave
from pretrain.training.manifest import CheckpointError

FINISHED, FAILED, BAD_INPUT, PROCESS_LOST = 0, 1, 2, 4
WEIGHTS = "best.pt"


@dataclass
class TableArguments:
    """Everything `finetune.py table OUT ...` understands."""

    out: str = ""  # folder for table.md and results.json
    baseline: str = ""  # row that all are compared with; default: the last folder
    workers: int = 1  # processes that score; ROUGE takes 0.1 s for a long summary


Model = PairModel | LabelClassifier


@dataclass(frozen=True)
class Plan:
    """All that is known before the first step, the same in every process.

    Attributes:
        arguments: what was asked for.
        task: what is learned.
        labels: of the task.
        splits: its examples.
        start: what training starts from.
        precision: bf16 or fp32.
        build: a seed -> the model as it starts.
        data: the examples as tokens.
        options: of the training.
        written: how the tests are answered; validation is greedy.
        description: a line about model and data.
    """

    arguments: FinetuneArguments
    task: Task
    labels: list[str]
    splits: Splits
    start: StartingPoint
    precision: str
    build: Callable[[int], Model]
    data: EncodedTask
    options: TrainOptions
    written: GenerationOptions
    description: str

    @property
    def out(self) -> Path:
        return Path(self.arguments.out)

    def answer(
        self, model: Model, inputs: Sequence[Any], how: GenerationOptions, ranks: Ranks
    ) -> list[str]:
        """The model's answers to inputs, in every process."""
        if isinstance(model, LabelClassifier):
            chosen = classify(model, inputs, self.options.micro_batch_tokens, ranks)
            return [self.labels[number] for number in chosen]
        return [self.start.tokenizer.decode(ids) for ids in write(model, inputs, how, ranks)]

    def score(self, texts: Sequence[str]) -> float:
        """The first metric of answers to validation."""
        metric = self.task.metrics[0]
        found = contributions([metric], texts, self.splits.validation, self.labels)
        return combine(metric, found[metric])


def main(argv: list[str]) -> int:
    """Runs a command line; the exit code, in all processes the same unless one fails alone."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return FINISHED
    argv = [word for word in argv if not word.startswith("--local_rank")]  # of the launcher
    ranks = join()

    def complain(error: Exception) -> None:
        print(f"error: {error}", file=sys.stderr, flush=True)

    try:
        if argv[0] == "table":
            folders = [Path(word) for word in argv[1:] if "=" not in word]
            words = [word for word in argv[1:] if "=" in word]
            ranks.on_main(lambda: show(folders, parse(TableArguments, words)))
        else:
            finetune(argv, ranks)
    except SharedError as error:
        ranks.on_main(partial(complain, error))  # a launcher ends all when the first has left
        return FAILED if issubclass(error.kind, CheckpointError) else BAD_INPUT
    except RankLost as error:
        if ranks.is_main:
            complain(error)
        return PROCESS_LOST
    return FINISHED


def show(folders: list[Path], arguments: TableArguments) -> None:
    """Prints the table of several fine-tunings, and writes it where `out` says."""
    if not folders:
        raise ValueError("table needs folders; use table runs/A runs/B out=runs/compared")
    check_folder(arguments.out)
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


def finetune(words: list[str], ranks: Ranks) -> None:
    """Trains and tests every seed that is not done, then shows the table.

    Raises:
        SharedError: bad input, or a file that cannot be read or written.
        RankLost: another process failed.
    """
    plan = ranks.everywhere(lambda: prepare(words, ranks))
    with ExitStack() as held:
        for seed in ranks.on_main(lambda: claim(plan, held)):
            train_seed(plan, seed, ranks)

        def close() -> None:
            print(f"\n{shlex.join(['launch/finetune.py', *words])}\n")
            show([plan.out], TableArguments(out=str(plan.out)))

        ranks.on_main(close)


def prepare(words: list[str], ranks: Ranks) -> Plan:
    """Finds everything that can be wrong before the first step.

    Raises:
        ValueError: bad input.
        CheckpointError: the run's checkpoint is missing or damaged.
    """
    model_words = [word for word in words if word.startswith(("model=", "model."))]
    arguments = parse(FinetuneArguments, [word for word in words if word not in model_words])
    check_positive(**{key: getattr(arguments, key) for key in ("seeds", "batch_size", "patience")})
    task = open_task(arguments.task, source=arguments.source, overrides=overrides(arguments))
    start = starting_point(arguments, model_words)
    if ranks.size > 1 and arguments.device not in ("auto", "cuda", "cpu"):
        raise ValueError(
            f"device={arguments.device}: {ranks.size} processes need one each; use auto or cpu"
        )
    device = own_device(arguments.device)
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision={precision} is not known; use bf16 or fp32")
    check_head(arguments, task)
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

    def build(seed: int) -> Model:
        autocast = precision == "bf16"
        if arguments.head == "classifier":
            return start.build_classifier(seed, device, len(labels), autocast=autocast)
        return start.build(seed, device, autocast=autocast)

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
    return Plan(
        arguments=arguments,
        task=task,
        labels=labels,
        splits=splits,
        start=start,
        precision=precision,
        build=build,
        data=data,
        options=train_options(arguments, len(splits.train)),
        written=GenerationOptions(
            max_tokens=data.target_tokens + 1,
            beams=arguments.beams,
            length_penalty=arguments.length_penalty,
            no_repeat_ngram_size=arguments.no_repeat_ngram_size,
            lanes=arguments.lanes,
        ),
        description=data.describe(model),
    )


def claim(plan: Plan, held: ExitStack) -> list[int]:
    """Makes the folder this command's own, for as long as `held` is open; the seeds to train.

    Raises:
        ValueError: another fine-tuning has it, or it is of other settings.
    """
    taken = ValueError(
        f"out={plan.out}: another fine-tuning is writing there; wait for it, or choose another out="
    )
    held.enter_context(lock_folder(plan.out, taken))
    check_settings(
        plan.out,
        plan.arguments,
        plan.task,
        plan.labels,
        plan.splits,
        plan.start,
        plan.precision,
    )
    for note in plan.start.passed_over:
        print(f"passed over: {note}")
    print(plan.description, flush=True)
    for test, examples in plan.splits.tests.items():
        for name, texts in baselines(plan.task.kind, plan.splits.train, examples).items():
            outputs.write(plan.out / "baselines" / name, test, texts, examples)
    done = {path.parent.name for path in plan.out.glob(f"seed_*/{outputs.RESULT}")}
    return [seed for seed in range(plan.arguments.seeds) if f"seed_{seed}" not in done]


def train_seed(plan: Plan, seed: int, ranks: Ranks) -> None:
    """Trains, keeps the best weights, answers the tests."""
    folder = plan.out / f"seed_{seed}"
    ranks.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    model = plan.build(seed)
    greedy = replace(plan.written, beams=1, length_penalty=1.0)

    def validate() -> float:
        texts = plan.answer(model, plan.data.validation, greedy, ranks)
        return ranks.on_main(lambda: plan.score(texts))

    def tell(check: dict[str, float]) -> None:
        if ranks.is_main:
            print(
                f"seed {seed}  step {check['step']:,}/{plan.options.steps:,}  "
                f"loss {check['loss']:.3f}  "
                f"validation {plan.task.metrics[0]} {check['validation']:.1f}",
                flush=True,
            )

    progress = folder / "progress.pt"
    result = train(model, plan.data.train, validate, plan.options, seed, progress, tell, ranks)
    ranks.on_main(lambda: replace_file(folder / WEIGHTS, model.module.state_dict()))
    for test, inputs in plan.data.tests.items():
        texts = plan.answer(model, inputs, plan.written, ranks)
        ranks.on_main(partial(outputs.write, folder, test, texts, plan.splits.tests[test]))

    def finish() -> None:
        facts = {"truncated": plan.data.cut, "processes": ranks.size, "commit": git_commit()}
        write_json(folder / outputs.RESULT, {**result, **facts})
        progress.unlink(missing_ok=True)

    ranks.on_main(finish)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
