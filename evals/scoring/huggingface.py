"""A causal language model and its tokenizer from a local Hugging Face folder, ready to be scored.

Shapes: B lanes, L inputs, V vocabulary.

Text is encoded by the model's own tokenizer, so its documents share nothing with a corpus of ours
but their text: compare by bits per byte. The state that is carried through a document is the cache
of keys and values, all of them, which the model's masks then cut to its windows; a model that
carries another state is refused. Nothing is fetched and no code of the folder is run.

Surprising: what tokens decode to is not the text. Tokenizers in the way of Llama put a space before
it, and an `<unk>` decodes to nothing. Bytes are those of the text: the space is none, and what the
`<unk>` stands for counts.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evals.scoring.documents import EvalDocuments, decode
from evals.scoring.score import state_dict_sha256
from pretrain.mixers.base import cat_states, index_state

LOGITS = 2**28
"""At most so many fp32 logits at once, 1 GiB; a single lane may need more."""


class KeysAndValues(NamedTuple):
    """Of each layer, (B, heads, tokens so far, head_dim)."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class HuggingFaceScorer:
    """A `ScoredModel` from a folder with config.json and safetensors.

    Args:
        folder: of the model.
        device: where it runs.
        precision: "fp32", or "bf16" for autocast matmuls; weights are fp32.

    Raises:
        ValueError: transformers is not installed, or the folder holds no causal language model.
    """

    reset_grid = 1

    def __init__(self, folder: Path, device: torch.device, precision: str = "fp32") -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={precision!r} is not known; use fp32 or bf16")
        transformers = _transformers(folder)
        try:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"hf={folder}: holds no causal language model that transformers knows "
                f"({_first_line(error)}); give a folder with config.json and model.safetensors"
            ) from error
        self.model = self.model.to(device).eval()
        self.new_cache = transformers.DynamicCache
        self.folder, self.device, self.precision = folder, device, precision
        self.vocab_size: int = self.model.config.vocab_size
        self.constant_state = False
        self.max_tokens: int | None = getattr(self.model.config, "max_position_embeddings", None)

    def nll(
        self, tokens: Tensor, state: KeysAndValues | None = None, *, score_from: int = 0
    ) -> tuple[Tensor, KeysAndValues]:
        n_targets = tokens.shape[1] - 1 - score_from
        lanes = max(1, LOGITS // (n_targets * self.vocab_size))
        parts = [
            self._lanes_nll(
                tokens[first : first + lanes],
                None if state is None else index_state(state, slice(first, first + lanes)),
                n_targets,
            )
            for first in range(0, len(tokens), lanes)
        ]
        losses, after = zip(*parts, strict=True)
        return torch.cat(losses), after[0] if len(after) == 1 else cat_states(list(after))

    def _lanes_nll(
        self, tokens: Tensor, state: KeysAndValues | None, n_targets: int
    ) -> tuple[Tensor, KeysAndValues]:
        cache = self.new_cache()
        for layer, (keys, values) in enumerate(zip(*state, strict=True) if state else ()):
            cache.update(keys, values, layer)
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        ):
            out = self.model(
                input_ids=tokens[:, :-1],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=n_targets,
            )
        targets = tokens[:, -n_targets:]
        losses = F.cross_entropy(
            out.logits.float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        return losses.view(targets.shape), self._keys_and_values(out)

    def _keys_and_values(self, out: Any) -> KeysAndValues:
        layers = getattr(out.get("past_key_values"), "layers", [])
        if not layers or not all(isinstance(getattr(x, "keys", None), Tensor) for x in layers):
            raise ValueError(
                f"hf={self.folder}: {type(self.model).__name__} carries another state than keys "
                "and values; evaluate a model whose layers all attend"
            )
        return KeysAndValues(tuple(x.keys for x in layers), tuple(x.values for x in layers))

    def fingerprint(self) -> str:
        return state_dict_sha256(self.model)


class HuggingFaceTokenizer:
    """The folder's tokenizer, as `data.tokenizer.Tokenizer` says what one is.

    Raises:
        ValueError: the folder has none, it has no BOS or EOS, or its tokens stand for no bytes that
            could be told.
    """

    kind = "huggingface"
    n_sentinels = 0

    def __init__(self, folder: Path) -> None:
        transformers = _transformers(folder)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True
            )
            content = self._tokenizer.backend_tokenizer.to_str()
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"hf={folder}: holds no tokenizer that transformers knows "
                f"({_first_line(error)}); give a folder with tokenizer.json"
            ) from error
        self.folder = folder
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        self.vocab_size = self.n_pieces = len(self._tokenizer)
        ids = [self._tokenizer.bos_token_id, self._tokenizer.eos_token_id]
        known = [i for i in ids if i is not None]
        if not known:
            raise ValueError(f"hf={folder}: its tokenizer has neither a BOS nor an EOS token")
        self.bos_id, self.eos_id = known[0], known[-1]
        self._decoders = set(_types(json.loads(content)["decoder"]))
        self._token_bytes = self._spell()

    def encode(self, text: str) -> np.ndarray:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array(ids, np.int32)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, and how many of its bytes each accounts for; these sum to all of them.

        Where tokens do not spell the text, their places in it count: a byte belongs to the first
        token that ends behind it, and what no token covers to the one after it, or to the last.

        Raises:
            ValueError: there is text, and it has no token.
        """
        found = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = np.array(found["input_ids"], np.int32)
        if decode(ids, self._token_bytes) == text.encode():
            return ids, np.array([len(self._token_bytes[i]) for i in ids], np.int64)
        if not len(ids):
            raise ValueError(f"hf={self.folder}: its tokenizer makes no token of {text[:20]!r}")
        ends = np.maximum.accumulate([end for _, end in found["offset_mapping"]])
        ends[-1] = len(text)
        bytes_before = np.concatenate([[0], np.cumsum([len(c.encode()) for c in text])])
        return ids, np.diff(bytes_before[ends], prepend=0)

    def decode(self, ids: Any) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self) -> list[bytes]:
        return self._token_bytes

    def _spell(self) -> list[bytes]:
        if not self._decoders & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(
                f"hf={self.folder}: its tokenizer is neither byte-level nor in the way of "
                "SentencePiece, so the bytes of a token are not known"
            )
        alphabet = _byte_level_alphabet() if "ByteLevel" in self._decoders else {}
        added = self._tokenizer.added_tokens_decoder
        table = []
        for i, piece in enumerate(self._tokenizer.convert_ids_to_tokens(range(self.vocab_size))):
            if i in added or i in self._tokenizer.all_special_ids:
                special = i not in added or added[i].special
                table.append(b"" if special else str(added[i]).encode())
            elif alphabet:
                table.append(bytes(alphabet[character] for character in piece))
            elif len(piece) == 6 and piece.startswith("<0x"):
                table.append(bytes([int(piece[3:5], 16)]))
            else:
                table.append(piece.replace("\u2581", " ").encode())
        return table


def encode_documents(
    texts: Sequence[str], tokenizer: HuggingFaceTokenizer, source: dict[str, Any]
) -> EvalDocuments:
    """Documents of a text each, EOS behind and BOS in front of it.

    Raises:
        ValueError: there is no text.
    """
    if not texts:
        raise ValueError("text=: there is no document; give files with at least one")
    encoded = [tokenizer.encode_with_bytes(text) for text in texts]
    tokens = [np.append(ids, tokenizer.eos_id).astype(np.int32) for ids, _ in encoded]
    digest = hashlib.sha256(f"2 {tokenizer.sha256}".encode())  # 2: bytes are the text's own
    for ids in tokens:
        digest.update(hashlib.sha256(ids.tobytes()).digest())
    return EvalDocuments(
        tokens=tokens,
        token_bytes=tokenizer.token_bytes(),
        bos_id=tokenizer.bos_id,
        fingerprint=digest.hexdigest(),
        tokenizer_sha256=tokenizer.sha256,
        raw_bytes=[len(text.encode()) for text in texts],
        source=source,
        texts=[text.encode() for text in texts],
        text_bytes=[np.append(n_bytes, -1) for _, n_bytes in encoded],
    )


def _transformers(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"hf={folder} needs transformers ({error}); use pip install 'longspan[hf]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # of loading weights
    return transformers


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _types(decoder: Any) -> list[str]:
    """The types of a decoder and of those that it is made of."""
    if not decoder:
        return []
    inner = [name for part in decoder.get("decoders", []) for name in _types(part)]
    return [decoder["type"], *inner]


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary, GPT-2's `bytes_to_unicode`:
    printable ones for themselves, the others moved behind 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(moved)}
