"""`suite=perplexity` of launch/evaluate.py: from words of a command line to a folder of results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import compare, report
from evals.perplexity import suite
from evals.perplexity.suite import PerplexityOptions
from evals.scoring.protocols import parse_contexts
from evals.subject import Subject, SubjectArguments


@dataclass
class PerplexityArguments(SubjectArguments):
    """What `suite=perplexity` understands; see `PerplexityOptions`, lengths in tokens."""

    contexts: str = ""
    protocols: str = ",".join(suite.DEFAULT_PROTOCOLS)  # also: sliding, truncate
    span_tokens: int | None = None
    spans_per_document: int = 4
    stream_tokens: int | None = None
    segment_tokens: int = 2048
    window_tokens: int | None = None
    stride_tokens: int | None = None  # of sliding


def plan(arguments: PerplexityArguments, subject: Subject) -> PerplexityOptions:
    """What the words ask for.

    Raises:
        ValueError: an option is wrong, or does not fit the model or its documents.
    """
    limit = subject.model.max_tokens
    largest = 16 * subject.train_length if limit is None else limit - 64  # spans need room, too
    options = PerplexityOptions(
        contexts=parse_contexts(arguments.contexts or f"64..{largest}"),
        protocols=tuple(filter(None, arguments.protocols.split(","))),
        span_tokens=arguments.span_tokens,
        spans_per_document=arguments.spans_per_document,
        stream_tokens=arguments.stream_tokens,
        segment_tokens=arguments.segment_tokens,
        window_tokens=arguments.window_tokens,
        stride_tokens=arguments.stride_tokens,
    )
    suite.plan(subject.model, subject.documents, options, subject.train_length)
    return options


def evaluate(subject: Subject, options: PerplexityOptions, out_dir: Path, command: str) -> None:
    """Scores a model and writes its folder, in every process of the launch."""
    result = suite.run(subject.model, subject.documents, options, out_dir, **subject.said(command))
    if subject.processes.is_main:
        show(result, out_dir)


def rebuild(out_dir: Path) -> None:
    """Derives everything in a folder anew from its token store, and prints the same."""
    show(suite.rebuild(out_dir), out_dir)


def show(result: dict[str, Any], out_dir: Path) -> None:
    """Prints the table, writes the page and prints its path last."""
    print_table(result)
    print(report.write([compare.load(out_dir)], out_dir))


def print_table(result: dict[str, Any]) -> None:
    """Bits per byte of every pass, one line each."""
    for metric in result["metrics"]:
        if metric["name"] == "bpb":
            interval = "[{:.4f}, {:.4f}]".format(*metric["ci95"]) if metric["ci95"] else ""
            context = metric["context"] or ""
            print(
                f"{metric['protocol']:>18} {context:>8}  {metric['value']:.4f} bpb {interval}"
                f"  {metric['n_docs']} documents, {metric['n_tokens']:,} tokens"
            )
