"""Speed of preparation, everything included: reading, parsing, tokenising, hashing, writing.

    python -m data.benchmark_prepare [text=FILE.jsonl] [workers=1,16] [megabytes=32] [KEY=VALUE ...]

Writes `megabytes` of the text (default: the bundled novels, repeated as needed) per worker into one
file per worker in each form, prepares each form with each number of workers, and prints a table.
KEYs: `tokenizer` (unigram, bpe, bytes or a .model), `vocab_size`, `forms` (comma-separated) and
`folder` (where the files go; needs about twice workers * megabytes).

MB are 10^6 bytes of UTF-8 text, not of the file around it. CPU seconds are those of all processes,
starting them included: MB per CPU second is the speed of one core that does nothing else. Scaling
is MB/s per worker, of what one worker does of the same form (with 1 among `workers`, first).
"""

import contextlib
import gzip
import io
import json
import lzma
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet

from data.prepare import TRAINED, PrepareConfig, prepare
from data.sources import find_files, hash_file, plan_units, read_unit
from data.tokenizer import train_sentencepiece
from pretrain.command_line import numbers, parse

SAMPLE = Path(__file__).parent / "sample" / "train.jsonl.xz"
TRAINING_BYTES = 8_000_000


@dataclass
class BenchmarkArguments:
    """The command's keys; see the module's docstring."""

    text: str = str(SAMPLE)
    workers: str = "1"
    megabytes: float = 32
    tokenizer: str = "unigram"
    vocab_size: int = 8192
    forms: str = "jsonl,jsonl.gz,jsonl.xz,jsonl.zst,parquet,txt"
    folder: str = ""


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def _parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), out, row_group_size=100)
    return out.getvalue()


FORMS: dict[str, Callable[[list[str]], bytes]] = {
    "jsonl": _jsonl,
    "jsonl.gz": lambda texts: gzip.compress(_jsonl(texts), 6),
    "jsonl.xz": lambda texts: lzma.compress(_jsonl(texts), preset=1),
    "jsonl.zst": lambda texts: pyarrow.compress(_jsonl(texts), codec="zstd", asbytes=True),
    "parquet": _parquet,
    "txt": lambda texts: "".join(texts).encode(),
}


@dataclass
class Measurement:
    """One preparation: sizes in bytes, times in seconds."""

    form: str
    workers: int
    file_bytes: int
    text_bytes: int
    tokens: int
    seconds: float
    cpu_seconds: float

    def row(self, one: "Measurement | None") -> str:
        """A line of the table; `one` is the measurement with one worker, to compare with."""
        megabytes = self.text_bytes / 1e6
        scaling = "-"
        if one is not None:
            speeds = [m.text_bytes / m.seconds / m.workers for m in (self, one)]
            scaling = f"{speeds[0] / speeds[1]:.0%}"
        return (
            f"| {self.form} | {self.workers} | {self.file_bytes / 1e6:,.1f} | {megabytes:,.1f} "
            f"| {self.seconds:.2f} | {megabytes / self.seconds:.1f} | {scaling} "
            f"| {megabytes / self.cpu_seconds:.1f} | {self.tokens / self.seconds / 1e6:.2f} |"
        )


HEADER = """\
| form | workers | file MB | text MB | seconds | MB/s | scaling | MB per CPU second | M tokens/s |
|---|---|---|---|---|---|---|---|---|"""


def measure(form: str, workers: int, content: bytes, model: str, folder: Path) -> Measurement:
    """Prepares one file of `content` per worker with `tokenizer=model`."""
    inputs, out = folder / "inputs", folder / "corpus"
    inputs.mkdir(parents=True)
    for i in range(workers):
        (inputs / f"{i:03d}.{form}").write_bytes(content)
    config = PrepareConfig(str(out), {"train": str(inputs)}, tokenizer=model, workers=workers)
    started, cpu = time.perf_counter(), _cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train = prepare(config)["splits"]["train"]
    seconds, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    shutil.rmtree(folder)
    file_bytes = len(content) * workers
    return Measurement(form, workers, file_bytes, train["raw_bytes"], train["tokens"], seconds, cpu)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _texts(location: str, n_bytes: float) -> list[str]:
    """Documents of the text, from its start again when it ends, until they hold `n_bytes`."""
    files = [hash_file(*found) for found in find_files(location)]
    units = [unit for file in files for unit in plan_units(file, 2**40, "text")]
    texts: list[str] = []
    missing = n_bytes
    while True:
        before = missing
        for document in chain.from_iterable(read_unit(unit, "text") for unit in units):
            size = len(document.text.encode())
            if size >= missing:
                last = document.text.encode()[: int(missing)]
                return [*texts, last.decode(errors="ignore")]
            texts.append(document.text)
            missing -= size
        if missing == before:
            raise ValueError(f"text={location}: no document has any text; give another file")


def _model(arguments: BenchmarkArguments, texts: list[str], folder: Path) -> str:
    if arguments.tokenizer not in TRAINED:
        return arguments.tokenizer
    lines = "".join(texts)[:TRAINING_BYTES]
    model = train_sentencepiece(
        [lines], model_type=arguments.tokenizer, vocab_size=arguments.vocab_size
    )
    path = folder / "benchmark.model"
    path.write_bytes(model)
    return str(path)


def main(words: list[str]) -> int:
    """Runs the command; returns its exit code."""
    try:
        print_table(parse(BenchmarkArguments, words))
    except ValueError as error:
        print(f"benchmark_prepare: {error}", file=sys.stderr)
        return 2
    return 0


def print_table(arguments: BenchmarkArguments) -> None:
    """Measures and prints row by row.

    Raises:
        ValueError: an unknown form or one that pyarrow cannot write, no text, or no numbers of
            workers.
    """
    forms, workers = arguments.forms.split(","), numbers("workers", arguments.workers)
    if unknown := set(forms) - set(FORMS):
        raise ValueError(f"forms={', '.join(unknown)}: unknown; known: {', '.join(FORMS)}")
    if "jsonl.zst" in forms and not pyarrow.Codec.is_available("zstd"):
        others = ",".join(form for form in FORMS if form != "jsonl.zst")
        raise ValueError(f"forms=jsonl.zst: this pyarrow is built without zstd; use forms={others}")
    folder = Path(tempfile.mkdtemp(dir=arguments.folder or None))
    try:
        texts = _texts(arguments.text, arguments.megabytes * 1e6)
        model = _model(arguments, texts, folder)
        trained = arguments.tokenizer in TRAINED
        name = f"{arguments.tokenizer} {arguments.vocab_size}" if trained else arguments.tokenizer
        print(
            f"{name}, {arguments.megabytes:g} MB per worker, "
            f"{os.cpu_count()} processors\n\n{HEADER}",
            flush=True,
        )
        for form in forms:
            content = FORMS[form](texts)
            one = None
            for n_workers in workers:
                measured = measure(form, n_workers, content, model, folder / "run")
                one = measured if n_workers == 1 else one
                print(measured.row(one), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
