"""Times training steps of our models and of public implementations, and prints the table.

    python -m evals.throughput models=bst_350m,swa_350m lengths=4096,32768 peers=llama,fla_swa
    python -m evals.throughput models=bst_350m lengths=4096 loops=plain,deepspeed,trainer

A step is forward, backward, clipping, fused AdamW and zero_grad on random tokens, one micro-batch
of `tokens` at every length (at least one sequence). FLOPs by the convention of
`LanguageModel.flops_per_token`; for peers see peer_models.py. Keys:

    models=, peers=   names of configs/model or paths; of peer_models.py; either may be empty
    like=             the model whose size the peers take; default: the first of models
    lengths=          tokens per sequence
    tokens=           of a micro-batch; auto: 8k to 128k, until memory ends, and the best is shown
    loops=            plain, deepspeed, trainer; peers are measured in the plain one only
    zero_stage=1      of the loops through DeepSpeed; 0 moves gradients least, on one GPU
    precision=        bf16 (autocast), fp32, or bf16_weights (peers only)
    residual_in_fp32= true, or false for a residual stream in bf16; ours only
    compile=true, checkpointing=false, vocab_size=32128, seconds=4 (timed per measurement)
    compile_workers=1 more: first compiles everything, so many processes side by side
    compile_only=false ends there: torch's cache is filled and nothing timed
    timeout_s=180     after which a measurement is ended; its log holds the stacks
    profile=false     also write the kernels of one step by time to out/profiles
    device=auto, out=runs/throughput

Every measurement has a process of its own and is kept in out/measurements: a second call measures
only what is new. Writes out/throughput.md, throughput.csv, throughput.json, throughput.png. Exit
code 1 when a measurement crashed, hung or was wrong; 2 for bad input.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evals.plots import to_png
from evals.throughput import report
from evals.throughput.machine import describe_machine
from evals.throughput.processes import Result, compile_all, result_of
from evals.throughput.settings import LOOPS, PEERS, PRECISIONS, Measurement
from pretrain.command_line import first_device, numbers, parse

FAILED, BAD_INPUT = 1, 2
AUTO_TOKENS = tuple(2**13 << doubling for doubling in range(5))


@dataclass
class ThroughputArguments:
    """Everything that the command understands."""

    models: str = "bst_350m,spade_350m,swa_350m"
    peers: str = ""
    like: str = ""
    lengths: str = "4096,32768,131072"
    tokens: str = "65536"
    loops: str = "plain"
    zero_stage: int = 1
    precision: str = "bf16"
    compile: bool = True
    checkpointing: bool = False
    residual_in_fp32: bool = True
    vocab_size: int = 32128
    seconds: float = 4.0
    compile_workers: int = 1
    compile_only: bool = False
    timeout_s: float = 180.0
    profile: bool = False
    device: str = "auto"
    out: str = "runs/throughput"


def main(argv: list[str]) -> int:
    """Runs a command line; the exit code."""
    if argv and argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    try:
        arguments = parse(ThroughputArguments, argv)
        groups = plan(arguments)
        machine = describe_machine(first_device(arguments.device))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    out_dir = Path(arguments.out)
    print(machine.describe(), flush=True)
    if arguments.compile_workers > 1 or arguments.compile_only:
        every = [measurement for sizes in groups for measurement in sizes]
        compile_all(every, out_dir, machine, arguments.timeout_s, arguments.compile_workers)
    if arguments.compile_only:
        return 0
    results: list[Result] = []
    for sizes in groups:
        for measurement in sizes:
            results.append(result_of(measurement, out_dir, machine, arguments.timeout_s))
            print(f"  {report.brief(report.row_of(results[-1]))}", flush=True)
            if results[-1]["status"] == "out of memory":
                break  # a larger micro-batch needs more
    rows = [report.row_of(result) for result in results]
    chosen = report.best(rows)
    policy = "every block recomputed" if arguments.checkpointing else "no activation checkpointing"
    facts = f"{machine.describe()}; {arguments.precision}, {policy}"
    if not arguments.residual_in_fp32:
        facts += ", residual stream of our models in bf16"
    if arguments.loops != "plain":
        facts += f", DeepSpeed with ZeRO stage {arguments.zero_stage}"
    text = f"{facts}\n\n{report.markdown(chosen)}\n"
    text += "".join(f"- {sentence}\n" for sentence in report.sentences(rows))
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "throughput.md").write_text(text, encoding="utf-8")
    (out_dir / "throughput.csv").write_text(report.to_csv(rows), encoding="utf-8")
    (out_dir / "throughput.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    drawn = report.figure(chosen, f"Training on {machine.device}, {arguments.precision}")
    (out_dir / "throughput.png").write_bytes(to_png(drawn))
    print(f"\n{text}", end="")
    bad = ("failed", "timed out", "wrong")
    return FAILED if any(row["status"].startswith(bad) for row in rows) else 0


def plan(arguments: ThroughputArguments) -> list[list[Measurement]]:
    """What is to be measured: per model, loop and length its sizes of micro-batch, smallest first.

    Raises:
        ValueError: with the key, its value and what to write instead.
    """
    models, peers = (_words(text) for text in (arguments.models, arguments.peers))
    loops, lengths = _words(arguments.loops), numbers("lengths", arguments.lengths)
    problems = []
    for key, words, known in (("peers", peers, PEERS), ("loops", loops, LOOPS)):
        unknown = [word for word in words if word not in known]
        if unknown:
            problems.append(f"{key}={','.join(unknown)}: not known; use {', '.join(known)}")
    if arguments.precision not in PRECISIONS:
        problems.append(f"precision={arguments.precision}: use {', '.join(PRECISIONS)}")
    if arguments.precision == "bf16_weights" and models:
        problems.append(
            f"precision=bf16_weights with models={arguments.models}: ours keep fp32 weights; give "
            f"models= like={models[0]}"
        )
    if not arguments.residual_in_fp32 and arguments.precision != "bf16":
        problems.append(
            f"residual_in_fp32=false with precision={arguments.precision}: the residual stream "
            f"takes autocast's dtype, and there is none; use precision=bf16"
        )
    if not (models or peers):
        problems.append("models= and peers= are both empty; name one")
    if peers and not (models or arguments.like):
        problems.append("like= is missing: the model whose size the peers take; use like=swa_350m")
    if min(lengths) < 1 or arguments.vocab_size < 2:
        problems.append("lengths= must be at least 1, vocab_size= at least 2")
    if not min(arguments.seconds, arguments.timeout_s) > 0:
        problems.append("seconds= and timeout_s= must be greater than 0")
    if arguments.compile_only and not arguments.compile:
        problems.append(
            "compile_only=true with compile=false: nothing to do; leave one of them out"
        )
    if arguments.compile_workers < 1:
        problems.append(f"compile_workers={arguments.compile_workers}: must be at least 1")
    if arguments.tokens != "auto" and min(numbers("tokens", arguments.tokens)) < 1:
        problems.append(f"tokens={arguments.tokens}: must be at least 1, or auto")
    if arguments.zero_stage not in range(4):
        problems.append(f"zero_stage={arguments.zero_stage}: use 0, 1, 2 or 3")
    if problems:
        raise ValueError("; ".join(problems))
    groups = [
        list(_sizes(arguments, model, loop, length))
        for length in lengths
        for model in [*models, *peers]
        for loop in loops
        if model not in PEERS or loop == "plain"
    ]
    if not any(groups):
        raise ValueError(f"loops={arguments.loops}: peers are measured in the plain loop only")
    return groups


def _sizes(
    arguments: ThroughputArguments, model: str, loop: str, length: int
) -> Iterator[Measurement]:
    """Micro-batches of at least one sequence, each of them once; what does not reach a measurement
    is not in it, so that the same one is known again in another command."""
    auto = arguments.tokens == "auto"
    totals = AUTO_TOKENS if auto else numbers("tokens", arguments.tokens)
    for batch_size in sorted({max(1, total // length) for total in totals}):
        profile = ""
        if arguments.profile:
            folder = Path(arguments.out) / "profiles"
            folder.mkdir(parents=True, exist_ok=True)
            profile = str(folder / f"{Path(model).name}-{loop}-{length}x{batch_size}.txt")
        measurement = Measurement(
            model=model,
            like=(arguments.like or _words(arguments.models)[0]) if model in PEERS else "",
            vocab_size=arguments.vocab_size,
            length=length,
            batch_size=batch_size,
            loop=loop,
            precision=arguments.precision,
            compile=arguments.compile,
            checkpointing=arguments.checkpointing,
            residual_in_fp32=arguments.residual_in_fp32,
            seconds=arguments.seconds,
            device=first_device(arguments.device).type,
            profile=profile,
            zero_stage=Measurement.zero_stage if loop == "plain" else arguments.zero_stage,
        )
        measurement.config()  # refuses an unknown model before anything is measured
        yield measurement


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
