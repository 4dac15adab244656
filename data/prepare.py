"""Text to a corpus: plan units, make the tokenizer, write a shard per unit, then the manifest.

The same inputs give the same bytes for any number of workers and after any kill: a unit is a fixed
row range whose shard has a fixed name, every file appears by an atomic rename, and a unit whose
sidecar stands is skipped. `inputs.json` is written first and says what the folder is for;
`manifest.json` is written last, and a folder without it is unfinished.
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from data.folder_lock import lock_folder
from data.processes import WorkerKilledError, map_processes
from data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER_FILE,
    Corpus,
    fingerprint,
    read_manifest,
    read_sidecar,
    token_dtype,
    write_atomically,
    write_manifest,
)
from data.sources import SourceFile, Unit, find_files, hash_file, plan_units, read_unit
from data.tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    UNK_ID,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from data.units import SUMS, write_units

INPUTS = "inputs.json"
_Item = TypeVar("_Item", tuple[str, str], SourceFile)
_Result = TypeVar("_Result")
WORTH_PROCESSES_BYTES = 2**28  # Hashing less is faster than starting processes.
TRAINED = ("unigram", "bpe")
SAMPLE_PIECE_CHARS = 2**16


@dataclass
class PrepareConfig:
    """What to prepare, and how.

    Attributes:
        out: the corpus folder.
        splits: split name -> file, folder, glob or hf:// address, or a list of these.
        text_field: column of jsonl and parquet rows that holds the text, or several with commas.
        tokenizer: "unigram" or "bpe" (trained on a sample of `train_split`), "bytes", or the path
            of a SentencePiece .model.
        vocab_size: for a trained tokenizer: specials and pieces, without sentinels.
        n_sentinels: ids for span corruption behind the pieces.
        train_split: the split that a trained tokenizer sees.
        sample_bytes: how much of it, in bytes of text.
        seed: draws the sample.
        workers: processes; without influence on the result.
        unit_bytes: text per shard, about.
        hub_patience_seconds: how long to wait for a hub that is away, at any one point.
    """

    out: str = ""
    splits: dict[str, Any] = field(default_factory=dict)
    text_field: str = "text"
    tokenizer: str = "unigram"
    vocab_size: int = 8192
    n_sentinels: int = 0
    train_split: str = "train"
    sample_bytes: int = 8_000_000
    seed: int = 0
    workers: int = 1
    unit_bytes: int = 64 * 2**20
    hub_patience_seconds: float = 300.0


class OutputError(RuntimeError):
    """The corpus folder cannot be written; what is finished stays."""


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepares a corpus, or continues an unfinished one, or finds that it stands already.

    Returns:
        The manifest.

    Raises:
        ValueError: a value, an input file or the folder's previous content does not fit.
        OutputError: the disk is full, or the folder cannot be written or is in use.
    """
    _check(config)
    started = time.monotonic()
    out = Path(config.out)
    patience = config.hub_patience_seconds
    commits = _commits(out)
    found = {split: find_files(place, patience, commits) for split, place in config.splits.items()}
    with _writing(out):
        files = _per_file(partial(_hash, patience=patience), found, config.workers, "hashing")
    inputs = _inputs(config, files, commits)
    taken = OutputError(f"out={out}: another preparation is writing there; wait for it")
    with _writing(out), lock_folder(out, taken):
        if (out / INPUTS).exists():
            _compare(inputs, json.loads((out / INPUTS).read_bytes()), out)
        elif any(not path.name.startswith(INPUTS) for path in out.iterdir()):
            raise ValueError(f"out={out}: not empty, and no corpus; choose another folder")
        _remove_left_overs(out)
        if not (out / INPUTS).exists():
            write_atomically(out / INPUTS, json.dumps(inputs, indent=1).encode())
        if (out / MANIFEST).exists():
            manifest = read_manifest(out)
            for split in manifest["splits"]:
                Corpus.open(out, split)
            print(f"{out} stands already: nothing to do (fingerprint {fingerprint(manifest)[:16]})")
            return manifest
        plan = partial(plan_units, unit_bytes=config.unit_bytes, text_field=config.text_field)
        planned = _per_file(plan, files, config.workers, "planning")
        units = {split: list(chain.from_iterable(part)) for split, part in planned.items()}
        tokenizer = _make_tokenizer(config, out, units)
        speed = _write_shards(config, out, units, tokenizer)
        names = {split: list(map(_shard_name, range(len(part)))) for split, part in units.items()}
        manifest = corpus_manifest(out, names, tokenizer, inputs)
        _remove_left_overs(out)
        write_manifest(out, manifest)
    print(summary(manifest))
    seconds = time.monotonic() - started
    print(f"{out} ready in {seconds:.1f} s{speed}, fingerprint {fingerprint(manifest)[:16]}")
    return manifest


def summary(manifest: dict[str, Any]) -> str:
    """The closing table, one line per split."""
    tokenizer = manifest["tokenizer"]
    columns = ["documents", "tokens", "bytes", "bytes/token", "words", "unk rate", "longest"]
    lines = [
        f"tokenizer {tokenizer['kind']}, vocabulary {tokenizer['vocab_size']}",
        f"{'split':<12}" + "".join(f"{column:>14}" for column in [*columns, "round trip"]),
    ]
    for name, split in manifest["splits"].items():
        tokens, checked = split["tokens"], split["roundtrip_checked"]
        text_tokens = max(tokens - split["documents"], 1)  # Without EOS.
        values = [
            f"{split['documents']:,}",
            f"{tokens:,}",
            f"{split['raw_bytes']:,}",
            f"{split['raw_bytes'] / text_tokens:.3f}",
            f"{split['words']:,}",
            f"{split['unk'] / text_tokens:.2e}",
            f"{split['longest']:,}",
            f"{split['roundtrip_exact']}/{checked}",
        ]
        lines.append(f"{name:<12}" + "".join(f"{value:>14}" for value in values))
        if split["empty"]:
            lines.append(f"{name}: {split['empty']} empty documents left out")
        if split["roundtrip_exact"] < checked:
            lines.append(
                f"{name}: {checked - split['roundtrip_exact']} of {checked} documents do not "
                "survive encoding and decoding: the tokenizer is lossy; compare only numbers per "
                "byte or word of the text itself"
            )
    return "\n".join(lines)


def _hash(found: tuple[str, str], patience: float) -> SourceFile:
    return hash_file(*found, patience)


def _size(file: tuple[str, str] | SourceFile) -> int | None:
    """Bytes of a file; None when it is not here to be looked at."""
    if isinstance(file, SourceFile):
        return file.bytes
    return os.path.getsize(file[1]) if os.path.exists(file[1]) else None


def _per_file(
    function: Callable[[_Item], _Result], files: dict[str, list[_Item]], workers: int, what: str
) -> dict[str, list[_Result]]:
    """`function` of every file of every split, with a bar when one would wonder."""
    items = list(chain.from_iterable(files.values()))
    sizes = [_size(item) for item in items]
    known = [size for size in sizes if size is not None]
    in_bytes = len(known) == len(sizes)
    if in_bytes and sum(known) < WORTH_PROCESSES_BYTES:
        workers = 1
    steps, unit = (known, "B") if in_bytes else ([1] * len(items), "file")
    with tqdm(total=sum(steps), desc=what, unit=unit, unit_scale=True, delay=2) as bar:
        results = iter(
            map_processes(function, items, workers, finished=lambda i: bar.update(steps[i]))
        )
    return {split: list(islice(results, len(part))) for split, part in files.items()}


def _check(config: PrepareConfig) -> None:
    problems = []
    if not config.out:
        problems.append("out: missing; give the corpus folder, e.g. out=corpora/mine")
    if not config.splits:
        problems.append("splits: missing; give data=PATH or splits.train=PATH")
    for key in ("vocab_size", "sample_bytes", "workers", "unit_bytes"):
        if getattr(config, key) < 1:
            problems.append(f"{key}={getattr(config, key)}: must be at least 1")
    if config.n_sentinels < 0:
        problems.append(f"n_sentinels={config.n_sentinels}: must not be negative")
    if config.tokenizer in TRAINED and config.splits and config.train_split not in config.splits:
        problems.append(
            f"train_split={config.train_split}: no such split to train tokenizer="
            f"{config.tokenizer} on; there are {', '.join(config.splits)}"
        )
    if problems:
        raise ValueError("\n".join(problems))


def _commits(out: Path) -> dict[str, str]:
    """The commits of the hub that an earlier try began with; a branch may have moved since."""
    inputs = json.loads((out / INPUTS).read_bytes()) if (out / INPUTS).exists() else {}
    return dict(inputs.get("commits", {}))


def _inputs(
    config: PrepareConfig, files: dict[str, list[SourceFile]], commits: dict[str, str]
) -> dict[str, Any]:
    """Everything that the corpus' content follows from."""
    tokenizer: dict[str, Any] = {"n_sentinels": config.n_sentinels}
    if config.tokenizer in TRAINED:
        tokenizer |= {
            "trained": config.tokenizer,
            "vocab_size": config.vocab_size,
            "sample_bytes": config.sample_bytes,
            "split": config.train_split,
            "seed": config.seed,
        }
    else:
        tokenizer |= {"sha256": load_tokenizer(config.tokenizer).sha256}
    return {
        "format_version": FORMAT_VERSION,
        # Content, not the place on this machine.
        "files": {split: {f.name: f.sha256 for f in part} for split, part in files.items()},
        "text_field": config.text_field,
        "tokenizer": tokenizer,
        "unit_bytes": config.unit_bytes,
        **({"commits": commits} if commits else {}),
    }


def _compare(wanted: dict[str, Any], found: dict[str, Any], out: Path) -> None:
    there, now = _leaves(found), _leaves(wanted)
    differences = [
        f"{key}: there {there.get(key)}, now {now.get(key)}"
        for key in sorted({*there, *now})
        if there.get(key) != now.get(key)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"out={out}: holds a corpus of other inputs ({'; '.join(differences[:3])}{more}); "
            "choose another out, or delete that folder first"
        )


def _leaves(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= (
            _leaves(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
        )
    return leaves


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turns what the operating system says about the folder into one clear error."""
    try:
        yield
    except WorkerKilledError as error:
        raise OutputError(
            f"out={out}: {error}; use fewer workers and run the same command: finished shards stay"
        ) from error
    except OSError as error:
        raise OutputError(
            f"out={out}: cannot be written ({error.strerror or error}: {error.filename or out}); "
            "make room or choose another folder, then run the same command: finished shards stay"
        ) from error


def _remove_left_overs(out: Path) -> None:
    """Half-written files of killed processes, of which one may end only now."""
    for left_over in out.rglob("*.tmp"):
        left_over.unlink(missing_ok=True)


def _make_tokenizer(config: PrepareConfig, out: Path, units: dict[str, list[Unit]]) -> Tokenizer:
    path = out / TOKENIZER_FILE
    if path.exists():  # Of an earlier try; the compared inputs determine it.
        return load_tokenizer(path, config.n_sentinels)
    if config.tokenizer not in TRAINED:
        tokenizer = load_tokenizer(config.tokenizer, config.n_sentinels)
        if isinstance(tokenizer, SentencePieceTokenizer):
            write_atomically(path, tokenizer.model)
        return tokenizer
    print(
        f"training a {config.tokenizer} tokenizer, vocab_size {config.vocab_size} ...", flush=True
    )
    sample = _sample(config, units[config.train_split])
    model = train_sentencepiece(sample, model_type=config.tokenizer, vocab_size=config.vocab_size)
    write_atomically(path, model)
    return SentencePieceTokenizer(model, config.n_sentinels)


def _sample(config: PrepareConfig, units: list[Unit]) -> list[str]:
    """About `sample_bytes` of text: units in a seeded order, of each a seeded choice of pieces."""
    generator = random.Random(config.seed)
    units = generator.sample(units, len(units))
    # A unit gives at most an eighth of the sample (or its share, when there are fewer units).
    share = config.sample_bytes / min(len(units), 8) if units else 0
    sample: list[str] = []
    missing: float = config.sample_bytes
    for unit in units:
        if missing <= 0:
            break
        keep = min(1.0, share / max(unit.text_bytes, 1))
        for document in read_unit(unit, config.text_field):
            text = document.text
            for start in range(0, len(text), SAMPLE_PIECE_CHARS):
                if generator.random() < keep and missing > 0:
                    sample.append(text[start : start + SAMPLE_PIECE_CHARS])
                    missing -= len(sample[-1].encode())
    return sample


def _write_shards(
    config: PrepareConfig, out: Path, units: dict[str, list[Unit]], tokenizer: Tokenizer
) -> str:
    """Makes what is missing; returns how fast, for the closing line."""
    todo = []
    done_bytes = 0
    for split, part in units.items():
        (out / split).mkdir(exist_ok=True)
        for i, unit in enumerate(part):
            stem = out / split / _shard_name(i)
            sidecar = read_sidecar(stem)
            if sidecar is None or sidecar["tokenizer_sha256"] != tokenizer.sha256:
                todo.append((unit, stem))
            else:
                done_bytes += unit.text_bytes
    if done_bytes:
        print(f"continuing: {done_bytes:,} bytes of text were finished before")
    with tqdm(
        total=sum(unit.text_bytes for unit, _ in todo),
        unit="B",
        unit_scale=True,
        desc="tokenising",
        mininterval=0.5,
    ) as bar:
        tokens = 0

        def report(n_bytes: int, n_tokens: int) -> None:
            nonlocal tokens
            tokens += n_tokens
            speed = tqdm.format_sizeof(tokens / max(bar.format_dict["elapsed"], 1e-3))
            bar.set_postfix_str(f"{speed} tokens/s", refresh=False)
            bar.update(n_bytes)

        write_units(todo, config.text_field, tokenizer, config.workers, report)
        seconds = max(bar.format_dict["elapsed"], 1e-3)
        if not todo:
            return ""
        return (
            f" (tokenising {seconds:.1f} s: {bar.n / 1e6 / seconds:.1f} MB/s, "
            f"{tokens / 1e6 / seconds:.2f}M tokens/s)"
        )


def _shard_name(i: int) -> str:
    return f"{i:05d}"


def corpus_manifest(
    out: Path, names: dict[str, list[str]], tokenizer: Tokenizer, inputs: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of finished shards.

    Args:
        out: the corpus folder.
        names: split -> its shards in their order.
        tokenizer: that made them.
        inputs: what they are made from.
    """
    splits = {}
    for split, part in names.items():
        shards, totals = [], dict.fromkeys(("documents", "tokens", *SUMS, "longest"), 0)
        for name in part:
            stem = out / split / name
            content = stem.with_suffix(".json").read_bytes()
            sidecar = json.loads(content)
            for key in ("documents", "tokens"):
                totals[key] += sidecar[key]
            for key in SUMS:
                totals[key] += sidecar["counts"][key]
            totals["longest"] = max(totals["longest"], sidecar["counts"]["longest"])
            shards.append(
                {
                    "name": f"{split}/{name}",
                    "documents": sidecar["documents"],
                    "tokens": sidecar["tokens"],
                    "source": sidecar["source"],
                    "bin": {key: sidecar["bin"][key] for key in ("bytes", "sha256")},
                    "idx": sidecar["idx"],
                    "json": {
                        "bytes": len(content),
                        "sha256": hashlib.sha256(content).hexdigest(),
                    },
                }
            )
        splits[split] = {**totals, "shards": shards}
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": {
            "kind": tokenizer.kind,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "n_pieces": tokenizer.n_pieces,
            "n_sentinels": tokenizer.n_sentinels,
            "special_ids": {"pad": PAD_ID, "bos": BOS_ID, "eos": EOS_ID, "unk": UNK_ID},
        },
        "dtype": str(token_dtype(tokenizer.vocab_size).str),
        "splits": splits,
        "inputs": inputs,
    }
