"""What every evaluation says of itself, facts.json: of what model, on what text, where and when.

It stands beside what was scored, so that all other files can be derived again without the model.
"""

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.scoring.documents import EvalDocuments
from evals.scoring.protocols import Pass
from evals.scoring.score import ScoredModel
from evals.scoring.store import TokenTable

FACTS = "facts.json"


def header(
    model: ScoredModel,
    documents: EvalDocuments,
    train_length: int,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """What a result.json says first: what was evaluated, on what, where and when."""
    about_model = dict(provenance)
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": about_model.pop("command", ""),
        "model": {
            **about_model,
            "precision": model.precision,
            "vocab_size": model.vocab_size,
            "reset_grid": model.reset_grid,
            "train_length": train_length,
            "start_id": documents.bos_id,
        },
        "tokenizer": {
            "sha256": documents.tokenizer_sha256,
            "vocab_size": documents.vocab_size,
            "lossless": documents.lossless(),
        },
        "data": {
            **documents.source,
            "fingerprint": documents.fingerprint,
            "text_sha256": documents.text_sha256(),
            "n_docs": len(documents.tokens),
            "n_tokens": sum(documents.lengths),
            "n_bytes": sum(documents.raw_bytes),
        },
        "policy": {
            "start": "each document behind what preceded documents in the model's training",
            "documents": "isolated",
        },
        "env": environment(model.device),
    }


def protocol_record(scoring: Pass, table: TokenTable) -> dict[str, Any]:
    """What a result.json says of a pass."""
    return {
        "pass": scoring.name,
        "id": scoring.protocol,
        "context": scoring.context,
        "settings": scoring.settings,
        "identity": table.meta["identity"],
        "n_docs": len(np.unique(table.doc)),
        "n_tokens": len(table.nll),
        "context_seen": [int(table.context.min()), int(table.context.max())],
    }


def costs(tables: Mapping[str, TokenTable]) -> list[dict[str, Any]]:
    """Tokens, seconds and memory of every pass."""
    return [
        {"pass": key, "context": table.meta["context"], **table.meta["cost"]}
        for key, table in tables.items()
    ]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware behind the numbers."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "machine": platform.machine(),
    }


def read_facts(out_dir: Path, schema: str) -> dict[str, Any]:
    """The content of an evaluation's facts.json.

    Raises:
        ValueError: nothing was evaluated there, or another suite or format.
    """
    try:
        facts: dict[str, Any] = json.loads((out_dir / FACTS).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{out_dir / FACTS}: cannot be read ({error}); evaluate again, what is scored is kept"
        ) from error
    if facts["schema"] != schema:
        raise ValueError(
            f"{out_dir / FACTS}: schema={facts['schema']}, this code reads {schema}; evaluate again"
        )
    return facts


def load_facts(out_dir: Path, schema: str) -> tuple[dict[str, Any], list[TokenTable]]:
    """facts.json and the passes that it is about.

    Args:
        out_dir: the folder of an evaluation.
        schema: of the suite.

    Raises:
        ValueError: nothing was evaluated there, a pass is missing, or it is another one.
    """
    facts, tables = read_facts(out_dir, schema), []
    for record in facts["protocols"]:
        path = out_dir / "tokens" / f"{record['pass']}.npz"
        tables.append(TokenTable.load(path))
        if tables[-1].meta["identity"] != record["identity"]:
            raise ValueError(
                f"{path}: is not the pass that {FACTS} is about; evaluate again, what is scored is "
                "kept"
            )
    return facts, tables
