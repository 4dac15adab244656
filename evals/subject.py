"""What a suite evaluates: a trained model, the documents it is tried on, and where results go."""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.loader import start_id
from data.shards import Corpus
from data.sources import find_files, read_rows
from data.tokenizer import Tokenizer
from evals.scoring import wikitext
from evals.scoring.documents import EvalDocuments, from_corpus
from evals.scoring.huggingface import HuggingFaceScorer, HuggingFaceTokenizer, encode_documents
from evals.scoring.models import LanguageModelScorer
from evals.scoring.processes import Processes, join
from evals.scoring.score import ScoredModel
from evals.seeds import recipe_sha256
from pretrain.command_line import own_device
from pretrain.training.environment import git_commit
from pretrain.training.load import load_model


@dataclass
class SubjectArguments:
    """The words that every suite understands; a suite's own arguments extend them."""

    run: str = ""
    hf: str = ""  # folder of a Hugging Face model, in place of run
    out: str = ""  # with hf: results go to OUT/eval
    text: str = ""  # with hf: files of text, as data.sources reads them
    text_field: str = "text"
    suite: str = "perplexity"
    limit: int | None = None  # documents
    name: str = ""  # of the result folder; default: the suite
    tag: str = "latest"  # checkpoint
    data: str = ""  # corpus folder; default: the one the run was trained on
    split: str = ""  # default: the run's validation split
    detokenize: str = ""  # wikitext: its pages are scored and their words counted as by lm-eval
    device: str = "auto"
    precision: str = "fp32"


@dataclass(frozen=True)
class Subject:
    """An opened model with its documents.

    Attributes:
        name: of the run, for tables and plots.
        model: ready to score.
        documents: of the evaluated split, behind what stood there in training.
        tokenizer: theirs and the model's.
        train_length: tokens of a training segment.
        processes: that this one works with: only the main one prints and writes results.
        results: folder whose subfolders are the suites' results.
        provenance: facts about the model for result.json.
    """

    name: str
    model: ScoredModel
    documents: EvalDocuments
    tokenizer: Tokenizer
    train_length: int
    processes: Processes
    results: Path
    provenance: dict[str, Any]

    def said(self, command: str) -> dict[str, Any]:
        """What a suite's `run` says of it and of the command, and who shares the work."""
        return {
            "name": self.name,
            "train_length": self.train_length,
            "provenance": {"command": command, **self.provenance},
            "processes": self.processes,
        }


def open_subject(arguments: SubjectArguments) -> Subject:
    """Loads what the arguments name.

    Raises:
        ValueError: a word is missing or wrong, or the data does not fit the model.
        CheckpointError: the checkpoint is missing or damaged.
    """
    _full_fp32()
    if arguments.detokenize not in ("", "wikitext"):
        raise ValueError(
            f"detokenize={arguments.detokenize}: use detokenize=wikitext, or leave it out"
        )
    if arguments.hf:
        return _open_hf(arguments)
    if not arguments.run:
        raise ValueError("run= is missing; use run=runs/NAME contexts=64..8192")
    for key in ("out", "text"):
        if getattr(arguments, key):
            raise ValueError(f"{key}= goes with hf=; leave it out of run={arguments.run}")
    run_dir = Path(arguments.run)
    if not run_dir.is_dir():
        raise ValueError(f"run={run_dir}: no such folder; use a run directory such as runs/NAME")
    device = own_device(arguments.device)
    model, config, checkpoint = load_model(run_dir, arguments.tag)
    corpus = Corpus.open(
        arguments.data or config.data.path, arguments.split or config.data.val_split
    )
    if corpus.tokenizer.sha256 != checkpoint["tokenizer"]:
        raise ValueError(
            f"data={corpus.path}: its tokenizer ({corpus.tokenizer.sha256[:12]}) is not the one "
            f"that {run_dir} was trained with ({checkpoint['tokenizer'][:12]}); prepare this text "
            f"with tokenizer={config.data.path}/tokenizer.model"
        )
    start = start_id(config.data.mode, config.data.boundary)
    documents = from_corpus(corpus, arguments.limit, start)
    if arguments.detokenize:
        documents = wikitext.detokenized(documents, corpus.tokenizer.encode)
    processes = join()
    for note in checkpoint["passed_over"] if processes.is_main else []:
        print(f"passed over: {note}", file=sys.stderr)
    return Subject(
        name=config.name,
        model=LanguageModelScorer(model, device, arguments.precision),
        documents=documents,
        tokenizer=corpus.tokenizer,
        train_length=config.train.seq_len,
        processes=processes,
        results=run_dir / "eval",
        provenance={
            "commit": git_commit(),
            "path": str(run_dir),
            "checkpoint": Path(checkpoint["path"]).name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_steps": checkpoint["step"],
            "trained_tokens": checkpoint["tokens"],
            "seed": config.seed,
            "recipe_sha256": recipe_sha256(config),
            "layers": " ".join(config.model.layer_names()),
            "training_path": config.data.path,
            "training_split": config.data.train_split,
            "training_mode": config.data.mode,
            "training_boundary": config.data.boundary,
            "carried_state": config.train.carry_state,
        },
    )


def _open_hf(arguments: SubjectArguments) -> Subject:
    """A folder's model, on files of text or on the text of a prepared split."""
    folder = Path(arguments.hf)
    if not arguments.out or arguments.run or arguments.tag != "latest":
        raise ValueError(f"hf={folder} needs out= and no run= or tag=; use out=runs/NAME")
    if not folder.is_dir():
        raise ValueError(f"hf={folder}: no such folder; use a model's, with config.json")
    if bool(arguments.text) == bool(arguments.data):
        raise ValueError(f"hf={folder} needs one of text=FILES and data=CORPUS")
    limit = arguments.limit
    if arguments.data:
        corpus = Corpus.open(arguments.data, arguments.split or "validation")
        prepared = from_corpus(corpus, limit)
        texts = [prepared.text(doc).decode() for doc in range(len(prepared.tokens))]
        source = prepared.source
    else:
        rows = (
            row.text
            for _, path in find_files(arguments.text)
            for row in read_rows(path, arguments.text_field)
        )
        texts = list(itertools.islice(rows, limit))
        source = {"path": arguments.text, "split": arguments.split or "text", "limit": limit}
    tokenizer = HuggingFaceTokenizer(folder)
    if arguments.detokenize:
        read = [wikitext.detokenize(page) for page in texts]
        documents = encode_documents(read, tokenizer, source)
        documents = wikitext.counted_as_published(documents, texts)
    else:
        documents = encode_documents(texts, tokenizer, source)
    model = HuggingFaceScorer(folder, own_device(arguments.device), arguments.precision)
    if model.max_tokens is None:
        raise ValueError(f"hf={folder}: its config.json has no max_position_embeddings; add it")
    return Subject(
        name=Path(arguments.out).name,
        model=model,
        documents=documents,
        tokenizer=tokenizer,
        train_length=model.max_tokens,
        processes=join(),
        results=Path(arguments.out) / "eval",
        provenance={
            "commit": git_commit(),
            "path": str(folder),
            "architecture": type(model.model).__name__,
            "parameters": sum(p.numel() for p in model.model.parameters()),
        },
    )


def _full_fp32() -> None:
    """Products of fp32 without TF32, whatever the container set: its 10 bits of mantissa round by
    more than the gates' bounds for fp32, and by more than a quantiser's codes lie apart."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
