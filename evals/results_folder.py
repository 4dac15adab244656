"""The folder that an evaluation writes: one writer at a time, and nothing stale beside it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data.folder_lock import lock_folder
from evals import tensorboard
from evals.facts import FACTS
from evals.scoring.documents import EvalDocuments
from evals.scoring.processes import Processes


@contextmanager
def claim(
    out_dir: Path,
    documents: EvalDocuments,
    outputs: Sequence[str],
    processes: Processes | None,
) -> Iterator[Processes]:
    """The processes in a scope of their own, while the folder is theirs alone.

    Args:
        out_dir: the folder; rank 0 holds it.
        documents: what is to be evaluated.
        outputs: files in it that a failed evaluation must not leave from an earlier one; they go.
        processes: that share the work; None: this one alone.

    Raises:
        ValueError: another evaluation is writing there, or one of more documents stands there.
        ProcessLost: another process failed.
    """
    check_replaces_no_larger(out_dir, documents)
    taken = ValueError(
        f"{out_dir}: another evaluation is writing there; wait for it, or use name= to give this "
        "one a folder of its own"
    )
    with (processes or Processes()).scope() as among, ExitStack() as held:
        if among.is_main:
            held.enter_context(lock_folder(out_dir, taken))
            for stale in outputs:
                (out_dir / stale).unlink(missing_ok=True)
            tensorboard.clear(out_dir)
        yield among


def check_replaces_no_larger(out_dir: Path, documents: EvalDocuments) -> None:
    """A quick look at a few documents must not cost the evaluation of all.

    Raises:
        ValueError: `out_dir` holds an evaluation of more documents of the same text.
    """
    try:
        data = json.loads((out_dir / FACTS).read_bytes())["data"]
    except (OSError, ValueError, KeyError):
        return
    held, given = data["n_docs"], len(documents.tokens)
    same_text = (data["fingerprint"], data.get("split")) == (
        documents.fingerprint,
        documents.source.get("split"),
    )
    if same_text and held > given:
        raise ValueError(
            f"limit={given}: {out_dir} holds an evaluation of {held} documents, which this one "
            f"would replace; use name=quick, or delete the folder"
        )
