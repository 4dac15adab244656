"""What is measured: one model at one length with one size of micro-batch, in one kind of loop."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig, load_config
from pretrain.training.environment import installed_version

PEERS = (
    *("llama", "llama_cudnn", "fla_swa", "fla_gla", "fla_mamba2", "mamba_ssm"),
    *("mega_pytorch", "block_recurrent_pytorch"),
)
LOOPS = ("plain", "deepspeed", "trainer")
PRECISIONS = ("bf16", "fp32", "bf16_weights")
DISTRIBUTIONS = (
    *("torch", "triton", "deepspeed", "transformers", "flash-attn-4", "quack-kernels"),
    *("flash-linear-attention", "mamba-ssm", "causal-conv1d", "Mega-pytorch"),
    "block-recurrent-transformer-pytorch",
)

_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Attributes:
        model: a file of configs/model, a path of such a file, or one of `PEERS`.
        like: the model whose width, depth, heads and vocabulary a peer takes; "" for ours.
        vocab_size: entries of the vocabulary.
        length: tokens per sequence.
        batch_size: sequences per micro-batch; an optimizer step has one micro-batch.
        loop: "plain" torch, our engine on "deepspeed", or the whole "trainer".
        precision: "bf16" autocast over fp32 weights, "fp32", or "bf16_weights" (peers only).
        compile: compile blocks; peers with kernels of their own have nothing to compile.
        checkpointing: recompute every block in the backward.
        residual_in_fp32: as in `LanguageModelConfig`; peers have their own ways.
        seconds: of the device to be timed; 3 to 20 steps.
        device: "cuda" or "cpu".
        profile: file for a table of kernels by time in one more step; "" for none.
        zero_stage: of the loops through DeepSpeed; in the plain one the default.
    """

    model: str
    like: str
    vocab_size: int
    length: int
    batch_size: int
    loop: str
    precision: str
    compile: bool
    checkpointing: bool
    residual_in_fp32: bool
    seconds: float
    device: str
    profile: str = ""
    zero_stage: int = 1

    @property
    def is_peer(self) -> bool:
        return self.model in PEERS

    @property
    def name(self) -> str:
        """Of the model, for people: no folder, no .yaml; bst_1.3b keeps its dot."""
        return Path(self.model).name.removesuffix(".yaml")

    @property
    def tokens(self) -> int:
        """Per micro-batch."""
        return self.length * self.batch_size

    def config(self, run_dir: Path = Path("runs/throughput")) -> RunConfig:
        """The run whose step this is; a peer's has the model that it is compared with.

        Raises:
            ConfigError: there is no such model, or it cannot be built.
        """
        return load_config(
            [
                f"model={self.like if self.is_peer else self.model}",
                f"model.vocab_size={self.vocab_size}",
                f"model.activation_checkpointing={self.checkpointing}",
                f"model.residual_in_fp32={self.residual_in_fp32}",
                f"train.seq_len={self.length}",
                f"train.micro_batch_size={self.batch_size}",
                f"train.global_batch_tokens={self.tokens}",
                f"train.total_tokens={10**6 * self.tokens}",  # the clock ends it before
                f"train.precision={'fp32' if self.precision == 'fp32' else 'bf16'}",
                f"train.compile={self.compile}",
                "data.mode=windows",  # random tokens come without resets, which blocks are told of
                "data.boundary=packed",
                # One rate in all loops: logits that are learned draw less power than a guess.
                "schedule.type=constant",
                "schedule.warmup_fraction=0",
                f"zero.stage={self.zero_stage}",
                f"out_dir={run_dir.parent}",
                f"name={run_dir.name}",
            ]
        )

    def identity(self, device_name: str) -> dict[str, Any]:
        """Everything that the result depends on; a result is used again where this is the same."""
        return {
            "settings": asdict(self) | {"profile": bool(self.profile)},
            "model": asdict(self.config().model),
            "device": device_name,
            "versions": installed_versions(),
            "source": source_digest(),
        }


def source_digest() -> str:
    """Of the code that runs: a commit would change with every document, and not with an edit."""
    digest = hashlib.sha256()
    for folder in ("pretrain", "evals/throughput"):
        for path in sorted((_REPOSITORY / folder).rglob("*.py")):
            digest.update(path.relative_to(_REPOSITORY).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def installed_versions() -> dict[str, str]:
    """Of everything that results depend on; "" where it is not installed."""
    return {name: installed_version(name) for name in DISTRIBUTIONS}
