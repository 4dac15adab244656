"""The configuration of a run: dataclasses < files < command line, every problem reported at once.

`load_config(["experiment=quickstart_bst", "train.total_tokens=10B"])` lays over the defaults below,
each winning over those before: the files picked by `model=`, `data=` and `zero=`, the experiment
file, the `key=value` arguments. Names are of files under `configs/`, or end in .yaml. A file may
hold keys of other sections (models bring the learning rate of their size): they are defaults, which
an experiment that names them overrides. A pick on the command line takes the place of the
experiment's pick *and* of what the experiment says in that section, so that no option of another
model lingers in it. Derived values are properties and are stored nowhere.
"""

import difflib
import functools
import re
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config_problems import problems_of
from pretrain.files import replace_text
from pretrain.models.config import LanguageModelConfig

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
SECTIONS = ("model", "data", "zero")
TOKEN_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass
class MixtureEntry:
    """One of several corpora to train on."""

    path: str = ""  # folder written by launch/prepare.py
    split: str = "train"
    weight: float = 1.0  # of the tokens delivered; weights need not sum to 1


@dataclass
class MixturePhase:
    """Other weights from a place in training on."""

    from_tokens: int = 0  # begins with the first block of 4096 samples (lanes: step) from there on
    weights: list[float] = field(default_factory=list)  # one per entry of data.mixture


@dataclass
class DataConfig:
    """Which prepared corpora to read, and in which order; or which text to stream.

    `data=NAME` fills what `stream` needs from the file's section `prepare`, except a tokenizer that
    preparation would train first.
    """

    path: str = ""  # folder written by launch/prepare.py; with a mixture for validation only
    mixture: list[MixtureEntry] = field(default_factory=list)  # train on several corpora instead
    phases: list[MixturePhase] = field(default_factory=list)
    # lanes: documents stay contiguous in their lane | windows: shuffled |
    # stream: text, tokenised while training; needs no prepared corpus
    mode: str = "lanes"
    # Between documents; "" takes the mode's first. lanes: pad_block (padding to the model's reset
    # grid, and a reset) | pad_segment (to the segment's end) | cross (nothing: the state goes on).
    # windows: packed (neighbours see each other) | pad_block. stream: packed
    boundary: str = ""
    train_split: str = "train"
    val_split: str = "validation"
    prefetch_steps: int = 2  # read ahead by threads; 0: none
    loader_threads: int = 1  # each reads whole steps; their number changes nothing else

    # The rest is for mode=stream.
    source: Any = ""  # file, folder, glob, hf://datasets/OWNER/NAME/PATTERN, or a list of these
    val_source: Any = ""  # likewise, for the evaluation during training
    text_field: str = "text"  # column of the text, or several with commas
    tokenizer: str = ""  # path of a SentencePiece .model, or bytes
    streams: int = 8  # divides the rows of a step; the number of ranks must divide it
    shuffle_windows: int = 256  # of a stream; a resumed run reads so many again
    stream_threads: int = 2  # that read and tokenise, per rank
    tee: bool = False  # write shards to `path`, which the next epoch and the next run map
    hub_patience_seconds: float = 300.0  # how long a hub may be away


@dataclass
class TrainConfig:
    """Sizes in tokens; steps are derived."""

    seq_len: int = 512
    global_batch_tokens: int = 8192  # per optimizer step, over all ranks
    micro_batch_size: int = 8  # sequences per forward and rank
    total_tokens: int = 1_000_000
    init_from: str = ""  # another run, runs/NAME, whose newest weights this one begins with
    precision: str = "bf16"  # bf16: torch_autocast with fp32 parameters | fp32
    carry_state: bool = False  # truncated backpropagation: hand the state to the next segment
    compile: bool = False
    # Forward and backward of a micro-batch as one CUDA graph: for models and micro-batches so small
    # that starting kernels is the limit. Without gain at 350M parameters; costs memory.
    cuda_graphs: bool = False
    deterministic: bool = False
    max_consecutive_skips: int = 5  # steps with non-finite gradients in a row before giving up
    process_group_timeout_minutes: int = 10


@dataclass
class OptimConfig:
    """AdamW; the schedule scales each group's base rate."""

    learning_rate: float = 3e-3
    ssm_learning_rate: float = 1e-3  # base rate of state-space parameters (A, dt, D)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    grad_clip: float = 1.0  # 0 turns clipping off


@dataclass
class ScheduleConfig:
    """Learning-rate factor as a function of tokens seen; fractions are of train.total_tokens."""

    type: str = "wsd"  # wsd | cosine | constant
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2  # wsd only: the final linear decay
    final_ratio: float = 0.1


@dataclass
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: int = 1
    offload_optimizer: bool = False
    extra: dict[str, Any] = field(default_factory=dict)  # merged into DeepSpeed's configuration


@dataclass
class CheckpointConfig:
    """When to save and what to keep."""

    every_tokens: int = 0  # 0: only at the end and on SIGTERM
    keep_last: int = 2
    keep_every_tokens: int = 0  # 0: none beyond keep_last


@dataclass
class ResumeConfig:
    """`resume=auto` is short for `resume.mode=auto`."""

    mode: str = "auto"  # auto: newest complete checkpoint, else start | must | never
    reshard: bool = False  # allow another world size or ZeRO stage, via a universal checkpoint


@dataclass
class LoggingConfig:
    """Console line, metrics.jsonl and TensorBoard share one rhythm."""

    every_steps: int = 10
    tensorboard: bool = True


@dataclass
class EvalConfig:
    """A small fixed validation set during training: val/bpb, and val/context_gain@C.

    The gain is measured where a document holds at least two segments of train.seq_len tokens.
    """

    every_tokens: int = 0  # 0: at the end only
    documents: int = 8
    tokens_per_document: int = 4096


@dataclass
class ProfileConfig:
    """torch.profiler on the chosen optimizer steps, written to RUN/profile."""

    steps: str = ""  # "10:13" records steps 10, 11, 12


@dataclass
class RunConfig:
    """Everything that defines a run."""

    name: str = "run"
    out_dir: str = "runs"
    seed: int = 0
    world_size: int = 0  # 0: the launcher's; set it to plan a dry run for a cluster
    dry_run: bool = False
    # causal: the next token | for encoder-decoders, whose train.seq_len is the encoder's length:
    # span (T5's span corruption), ul2 (its mixture with prefix LM), gap (PEGASUS' gap sentences)
    objective: str = "causal"
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.out_dir) / self.name

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step; in lanes mode the number of lanes."""
        return self.train.global_batch_tokens // self.train.seq_len

    @property
    def total_steps(self) -> int:
        return -(-self.train.total_tokens // self.train.global_batch_tokens)

    def grad_accum_steps(self, world_size: int) -> int:
        return self.global_batch_size // (self.train.micro_batch_size * world_size)


class ConfigError(ValueError):
    """All problems of a configuration at once."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem(s) in the configuration:\n{lines}")


def load_config(arguments: list[str], *, config_dir: Path = CONFIG_DIR) -> RunConfig:
    """Builds the configuration of a run from `key=value` arguments.

    Raises:
        ConfigError: with every unknown key (and its closest match), wrong type, missing file and
            inconsistent value.
    """
    problems: list[str] = []
    picks, overrides = _split_arguments(arguments, problems)
    schema = OmegaConf.structured(RunConfig)

    experiment: dict[str, Any] = {}
    if "experiment" in picks:
        experiment = _read_yaml("experiment", picks.pop("experiment"), config_dir, problems)
    experiment_picks = experiment.pop("defaults", {})
    for section in sorted(set(experiment_picks) - set(SECTIONS)):
        problems.append(f"defaults.{section}: pick one of {', '.join(SECTIONS)}")
    experiment = {key: value for key, value in experiment.items() if key not in picks}

    chosen = experiment_picks | picks
    for section in SECTIONS:
        if section in chosen:
            content = _read_yaml(section, chosen[section], config_dir, problems)
            prepare = content.pop("prepare", None)  # launch/prepare.py's part of a data file
            if isinstance(prepare, dict):
                data = content.setdefault("data", {})
                content["data"] = {**_text_of(prepare, data), **data}
            _merge(schema, content, f"{section}={chosen[section]}", problems)
    _merge(schema, experiment, "the experiment file", problems)
    for key, value in overrides.items():
        _set(schema, key, value, "the command line", problems)
    if problems:
        raise ConfigError(problems)
    config = OmegaConf.to_object(schema)
    assert isinstance(config, RunConfig)
    found = problems_of(config)
    if found:
        raise ConfigError(found)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML."""
    replace_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_saved_config(path: Path) -> RunConfig:
    """Reads what `save_config` wrote.

    Raises:
        ConfigError: when the file is missing, damaged or written by an incompatible version.
    """
    problems: list[str] = []
    schema = OmegaConf.structured(RunConfig)
    if not path.is_file():
        raise ConfigError([f"{path}: no such file; is this a run directory?"])
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
        reason = "it holds no keys" if not isinstance(content, dict) or not content else ""
    except Exception as error:  # a YAML syntax error, whatever the parser calls it
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    if reason:
        raise ConfigError(
            [
                f"{path} is damaged ({reason}); put back a copy of it, which every checkpoint has "
                f"(checkpoints/step_*/config.yaml)"
            ]
        )
    _merge(schema, content, str(path), problems)
    if problems:
        raise ConfigError(problems)
    config = OmegaConf.to_object(schema)
    assert isinstance(config, RunConfig)
    return config


def differences(config: RunConfig, other: RunConfig | None = None) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose value differs: (in `other`, by default the schema's; in `config`)."""
    ours = _leaves(OmegaConf.to_container(OmegaConf.structured(config)))
    base = _leaves(OmegaConf.to_container(OmegaConf.structured(other or RunConfig())))
    changed = {key for key in {*ours, *base} if ours.get(key) != base.get(key)}
    # An empty mapping is a leaf on one side only; what is in it on the other is listed anyway.
    return {
        key: (base.get(key), ours.get(key))
        for key in sorted(changed)
        if {} not in (base.get(key), ours.get(key))
    }


def _split_arguments(
    arguments: list[str], problems: list[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Separates file picks (`model=bst_tiny`) from overrides (`model.d_model=64`)."""
    picks: dict[str, str] = {}
    overrides: dict[str, Any] = {}
    for argument in arguments:
        if argument.startswith("--local_rank"):  # appended by the deepspeed launcher
            continue
        key, separator, text = argument.partition("=")
        if not separator or not key:
            problems.append(f"argument '{argument}': write key=value, e.g. train.seq_len=1024")
        elif key in (*SECTIONS, "experiment"):
            picks[key] = text
        elif key == "resume":
            overrides["resume.mode"] = text
        elif not text or re.fullmatch(r"\d+(:\d+)+", text):
            overrides[key] = text  # YAML 1.1 reads 10:13 as a number to base 60, nothing as null
        else:
            try:
                parsed = OmegaConf.from_dotlist([f"value={text}"]).value
            except Exception:  # a YAML syntax error, whatever the parser calls it
                problems.append(f"{argument}: the value is not valid YAML; is a bracket missing?")
                continue
            overrides[key] = OmegaConf.to_object(parsed) if OmegaConf.is_config(parsed) else parsed
    return picks, overrides


def _read_yaml(section: str, pick: str, config_dir: Path, problems: list[str]) -> dict[str, Any]:
    path = Path(pick) if pick.endswith((".yaml", ".yml")) else config_dir / section / f"{pick}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in (config_dir / section).glob("*.yaml"))
        close = difflib.get_close_matches(pick, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(names)}"
        problems.append(f"{section}={pick}: no file {path}; {hint}")
        return {}
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # a YAML syntax error, whatever the parser calls it
        problems.append(f"{section}={pick}: {path} is not valid YAML: {error}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{section}={pick}: {path} must hold a mapping of keys to values")
        return {}
    return {str(key): value for key, value in content.items()}


def _text_of(prepare: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What `data.mode=stream` takes from the section that says how to prepare the same text."""
    default, splits = DataConfig(), prepare.get("splits", {})
    text = {
        "source": splits.get(data.get("train_split", default.train_split)),
        "val_source": splits.get(data.get("val_split", default.val_split)),
        "text_field": prepare.get("text_field"),
    }
    if prepare.get("tokenizer") == "bytes":
        text["tokenizer"] = "bytes"
    return {key: value for key, value in text.items() if value is not None}


def _merge(schema: DictConfig, content: Any, origin: str, problems: list[str]) -> None:
    for key, value in _leaves(content).items():
        _set(schema, key, value, origin, problems)


def _set(schema: DictConfig, key: str, value: Any, origin: str, problems: list[str]) -> None:
    """Sets one dotted key, or records in one line why it cannot be set."""
    known = _known_keys()
    # Below a mapping keys are free; its own name is the longest prefix that the schema knows.
    mapping = next((name for name, t in known.items() if t and key.startswith(f"{name}.")), None)
    if key not in known and mapping is None:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see pretrain/config.py for the keys"
        problems.append(f"{key}={value} (from {origin}): unknown key; {hint}")
        return
    known_problems = len(problems)
    value = _with_token_counts(key, value, origin, problems)
    if len(problems) > known_problems:
        return
    try:
        if mapping is not None and known[mapping] is int:  # a dotted path would make it a string
            OmegaConf.select(schema, mapping)[int(key.removeprefix(f"{mapping}."))] = value
        else:
            OmegaConf.update(schema, key, value, force_add=True)
    except (OmegaConfBaseException, ValueError) as error:
        reason = str(error).splitlines()[0]
        problems.append(f"{key}={value} (from {origin}): {reason}")


def _with_token_counts(key: str, value: Any, origin: str, problems: list[str]) -> Any:
    """`value` with 64K under a key *_tokens, also of a mapping in a list, as 64000."""
    if isinstance(value, list):
        return [
            {k: _with_token_counts(f"{key}[{i}].{k}", v, origin, problems) for k, v in item.items()}
            if isinstance(item, dict)
            else item
            for i, item in enumerate(value)
        ]
    if not key.endswith("_tokens") or not isinstance(value, str | float):
        return value  # YAML reads 1e9 as a float
    parsed = _parse_tokens(str(value))
    if parsed is None:
        problems.append(f"{key}={value} (from {origin}): write 4096, 64K, 1.5M, 10B or 1T")
        return 0
    return parsed


def _parse_tokens(text: str) -> int | None:
    unit = TOKEN_UNITS.get(text[-1:].upper(), 1)
    try:
        tokens = float(text[:-1] if unit > 1 else text) * unit
        return round(tokens) if unit > 1 or tokens.is_integer() else None
    except (ValueError, OverflowError):  # no number, or infinity
        return None


@functools.cache
def _known_keys(cls: type = RunConfig, prefix: str = "") -> dict[str, type | None]:
    """Every dotted leaf key of the schema; for a mapping the type of its free keys, else None."""
    keys: dict[str, type | None] = {}
    for name, hint in get_type_hints(cls).items():
        if isinstance(hint, type) and is_dataclass(hint):
            keys |= _known_keys(hint, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = get_args(hint)[0] if get_origin(hint) is dict else None
    return keys


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted keys; lists and empty mappings are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            leaves.update(_leaves(value, f"{name}."))
        else:
            leaves[name] = value
    return leaves
