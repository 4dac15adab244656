"""`suite=extrapolation` of launch/evaluate.py: from words of a command line to a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.extrapolation import report, suite
from evals.extrapolation.suite import ExtrapolationOptions, parse_multiples
from evals.scoring.protocols import parse_contexts
from evals.subject import Subject, SubjectArguments


@dataclass
class ExtrapolationArguments(SubjectArguments):
    """What `suite=extrapolation` understands; see `ExtrapolationOptions`, lengths in tokens."""

    multiples: str = "1/8..256"  # of the training length
    contexts: str = ""  # instead of multiples
    span_tokens: int | None = None
    spans_per_document: int = 4
    min_documents: int = ExtrapolationOptions.min_documents
    stream_tokens: int | None = None
    segment_tokens: int = 2048
    concat_tokens: int = ExtrapolationOptions.concat_tokens  # 0: none
    growing_tokens: int = ExtrapolationOptions.growing_tokens
    flat_margin_nats: float = ExtrapolationOptions.flat_margin_nats
    diverge_nats: float = ExtrapolationOptions.diverge_nats


def plan(arguments: ExtrapolationArguments, subject: Subject) -> ExtrapolationOptions:
    """What the words ask for.

    Raises:
        ValueError: an option is wrong, or does not fit the model or its documents.
    """
    train_length = subject.train_length
    if subject.model.max_tokens is not None and subject.model.max_tokens <= train_length:
        raise ValueError(
            f"suite=extrapolation reads beyond the training length ({train_length} tokens), and "
            "this model takes no more at once; use suite=perplexity"
        )
    contexts = (
        parse_contexts(arguments.contexts)
        if arguments.contexts
        else parse_multiples(arguments.multiples, train_length)
    )
    options = ExtrapolationOptions(
        contexts=contexts,
        span_tokens=arguments.span_tokens,
        spans_per_document=arguments.spans_per_document,
        min_documents=arguments.min_documents,
        stream_tokens=arguments.stream_tokens,
        segment_tokens=arguments.segment_tokens,
        concat_tokens=arguments.concat_tokens,
        growing_tokens=arguments.growing_tokens,
        flat_margin_nats=arguments.flat_margin_nats,
        diverge_nats=arguments.diverge_nats,
    )
    suite.plan(subject.model, subject.documents, options, train_length)
    return options


def evaluate(subject: Subject, options: ExtrapolationOptions, out_dir: Path, command: str) -> None:
    """Scores a model and writes its folder, in every process of the launch."""
    result = suite.run(subject.model, subject.documents, options, out_dir, **subject.said(command))
    if subject.processes.is_main:
        show(result, out_dir)


def rebuild(out_dir: Path) -> None:
    """Derives everything in a folder anew from its token store, and prints the same."""
    show(suite.rebuild(out_dir), out_dir)


def show(result: dict[str, Any], out_dir: Path) -> None:
    """Prints what was found, writes the page and prints its path last."""
    print("\n".join(report.findings(result)))
    print(report.write(result, out_dir))
