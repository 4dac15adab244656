"""Configuration: precedence, every problem at once, and what is saved is what is loaded."""

from pathlib import Path

import pytest

import data.loader
from pretrain.config import (
    ConfigError,
    MixtureEntry,
    MixturePhase,
    RunConfig,
    differences,
    load_config,
    load_saved_config,
    save_config,
)
from pretrain.config_problems import BOUNDARIES


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    files = {
        "model/small.yaml": "model: {d_model: 64, mixers: {swa: {window_size: 32}}}",
        "model/other.yaml": "model: {d_model: 96}",
        "model/large.yaml": "model: {d_model: 128}\noptim: {learning_rate: 6e-4}",
        "zero/zero3.yaml": "zero: {stage: 3}",
        "experiment/of_large.yaml": "defaults: {model: large}",
        "experiment/own_rate.yaml": "defaults: {model: large}\noptim: {learning_rate: 2e-3}",
        "experiment/mine.yaml": (
            "defaults: {model: small, zero: zero3}\n"
            "train: {seq_len: 128, global_batch_tokens: 1K}\n"
            "model: {n_layers: 6}"
        ),
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("1K", "1024"))
    return tmp_path


def test_precedence_is_defaults_then_files_then_command_line(config_dir: Path) -> None:
    config = load_config(
        ["experiment=mine", "train.total_tokens=10B", "model.d_model=80", "--local_rank=0"],
        config_dir=config_dir,
    )
    assert config.optim.learning_rate == RunConfig().optim.learning_rate
    assert (config.zero.stage, config.train.seq_len, config.model.n_layers) == (3, 128, 6)
    assert config.model.mixers == {"swa": {"window_size": 32}}
    assert config.model.d_model == 80
    assert config.train.total_tokens == 10_000_000_000


def test_step_range_is_text_and_not_a_number_to_base_60(config_dir: Path) -> None:
    assert load_config(["profile.steps=10:13"], config_dir=config_dir).profile.steps == "10:13"


def test_model_picked_on_the_command_line_replaces_the_experiments(config_dir: Path) -> None:
    config = load_config(["experiment=mine", "model=other"], config_dir=config_dir)
    assert config.model.d_model == 96
    assert config.model.mixers == {}
    assert config.model.n_layers == RunConfig().model.n_layers


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        (["model=large"], 6e-4),
        (["experiment=of_large"], 6e-4),
        (["experiment=mine", "model=large"], 6e-4),
        (["experiment=own_rate"], 2e-3),
        (["experiment=own_rate", "model=large"], 2e-3),
        (["experiment=own_rate", "optim.learning_rate=1e-3"], 1e-3),
        (["optim.learning_rate=1e-3", "model=large"], 1e-3),
        (["experiment=of_large", "model=other"], RunConfig().optim.learning_rate),
    ],
)
def test_a_models_learning_rate_is_a_default_that_whoever_names_it_overrides(
    arguments: list[str], rate: float, config_dir: Path
) -> None:
    assert load_config(arguments, config_dir=config_dir).optim.learning_rate == rate


def test_all_problems_are_reported_at_once_with_the_closest_match(config_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            ["model=smal", "train.seqlen=128", "zero.stage=two", "nonsense", "data.path=x"],
            config_dir=config_dir,
        )
    message = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "did you mean 'small'?" in message
    assert "did you mean 'train.seq_len'?" in message
    assert "zero.stage=two" in message
    assert "'nonsense': write key=value" in message


def test_layers_are_chosen_by_integer_keys_from_file_and_command_line(config_dir: Path) -> None:
    (config_dir / "model" / "mixed.yaml").write_text(
        "model: {layers: {default: swa, at: {1: bst}}}"
    )
    config = load_config(["model=mixed", "model.layers.at.3=s4d"], config_dir=config_dir)
    assert config.model.layers.at == {1: "bst", 3: "s4d"}
    with pytest.raises(ConfigError, match=r"model\.layers\.at\.top=bst"):
        load_config(["model.layers.at.top=bst"])


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (
            [
                "train.global_batch_tokens=500000",
                "train.seq_len=4096",
                "train.micro_batch_size=4",
                "zero.stage=5",
            ],
            ["4096*4*1 = 16384", "nearest: 491520 or 507904", "zero.stage=5"],
        ),
        (["train.carry_state=true", "data.mode=windows"], ["use data.mode=lanes"]),
        (
            ["data.boundary=packed", "data.mode=lanes"],
            ["data.boundary=packed: must be one of pad_block, pad_segment, cross"],
        ),
        (
            [
                "data.mixture=[{path: a, weight: -1}, {weight: 1}]",
                "data.phases=[{from_tokens: 2M, weights: [1]}, {from_tokens: 1M, weights: [1, 2]}]",
            ],
            [
                "data.mixture[0].weight=-1.0: must not be negative",
                "data.mixture[1].path='': name a folder",
                "data.path='' with data.mixture: name the corpus to validate on",
                "data.phases[0].weights=[1.0]: give one for each of the 2 entries",
                "data.phases begin at from_tokens=[2000000, 1000000]: must be above 0",
            ],
        ),
        (
            ["data.phases=[{from_tokens: soon, weights: []}]"],
            ["data.phases[0].from_tokens=soon (from the command line): write 4096, 64K"],
        ),
        (
            ["data.source=''", "data.mode=stream"],
            ["name text, e.g.", "data.tokenizer='' with", "data.val_source='' with"],
        ),
        (["data.mode=stream", "train.carry_state=true"], ["shuffled windows have no"]),
        (
            ["data.mixture=[{path: a}]", "data.mode=stream"],
            ["data.mixture with data.mode=stream: a mixture is of prepared corpora"],
        ),
        (
            ["data.hub_patience_seconds=900", "data.mode=stream"],
            ["the other ranks give up on a waiting one after 600 s"],
        ),
        (["profile.steps=10"], ["profile.steps=10: write FIRST:LAST"]),
        (["train.precision=fp16"], ["must be one of bf16, fp32"]),
        (["schedule.warmup_fraction=1.5"], ["between 0 and 1"]),
        (["world_size=4"], ["1 process(es) were started"]),
        (["train.total_tokens=0"], ["greater than 0"]),
        (["train.total_tokens=ten"], ["write 4096, 64K"]),
        (["train.total_tokens=inf"], ["write 4096, 64K"]),
        (["train.total_tokens=1.5"], ["write 4096, 64K"]),
        (["optim.learning_rate=.nan"], ["greater than 0"]),
        (["optim.betas=[0.9,1.5]"], ["[0.9, 1.5]: must lie between 0 and 1"]),
        (["eval.documents=-1"], ["must not be negative"]),
        (["schedule.warmup_fraction=0.9"], ["decay_fraction = 1.1: more than the run"]),
        (["zero.offload_optimizer=true", "zero.stage=0"], ["use zero.stage=1, 2 or 3"]),
        (["profile.steps=13:10"], ["profile.steps=13:10: write FIRST:LAST"]),
        (["profile.steps=0:3"], ["the first is 1"]),
        (["model.layers.pattern=[swa,bst"], ["not valid YAML; is a bracket missing?"]),
    ],
)
def test_inconsistent_values_name_key_value_reason_and_fix(
    arguments: list[str], fragments: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert arguments[0].split("=")[0] in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_mixture_is_read_and_saved_with_its_phases(tmp_path: Path) -> None:
    config = load_config(
        [
            "data.path=v",
            "data.mixture=[{path: a, weight: 7}, {path: b, split: test, weight: 3}]",
            "data.phases=[{from_tokens: 1.5M, weights: [1, 9]}]",
        ]
    )
    assert config.data.mixture == [MixtureEntry("a", "train", 7), MixtureEntry("b", "test", 3)]
    assert config.data.phases == [MixturePhase(1_500_000, [1, 9])]
    save_config(config, tmp_path / "config.yaml")
    assert load_saved_config(tmp_path / "config.yaml") == config


def test_boundaries_are_those_of_the_loader() -> None:
    assert BOUNDARIES == data.loader.BOUNDARIES | {"stream": ("packed",)}


@pytest.mark.parametrize(
    "arguments",
    [["schedule.type=cosine", "schedule.warmup_fraction=0.9"], ["data.prefetch_steps=0"]],
)
def test_values_that_fit_are_not_refused(arguments: list[str]) -> None:
    load_config(arguments)


def test_a_stream_takes_its_text_from_where_it_would_be_prepared_from() -> None:
    data = load_config(["data=pg19", "data.mode=stream", "data.tokenizer=my.model"]).data
    assert data.source.startswith("hf://datasets/emozilla/pg19@c021754c")
    assert data.source.endswith("/data/train-*.parquet")
    assert data.val_source.endswith("/data/validation-*.parquet")
    assert load_config(["data=glue"]).data.text_field == "premise,hypothesis"
    enwik8 = load_config(["data=enwik8", "data.mode=stream", "data.source=mine.txt"]).data
    assert (enwik8.source, enwik8.tokenizer) == ("mine.txt", "bytes")


@pytest.mark.parametrize("text", ["2000000", "2M", "2m", "0.002B", "2e6", "2_000_000"])
def test_tokens_are_written_in_many_ways(text: str) -> None:
    assert load_config([f"train.total_tokens={text}"]).train.total_tokens == 2_000_000


def test_saved_config_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(["train.seq_len=256", "model.mixers.swa.window_size=8", "seed=3"])
    save_config(config, tmp_path / "config.yaml")
    assert load_saved_config(tmp_path / "config.yaml") == config
    assert set(differences(config)) == {"train.seq_len", "model.mixers.swa.window_size", "seed"}


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"a: [", b"\xff\xfe\x00"])
def test_a_damaged_config_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged.*put back a copy"):
        load_saved_config(path)


def test_every_shipped_config_loads() -> None:
    """But models, which tests/pretrain/training/test_catalogue.py loads and builds."""
    root = Path(__file__).resolve().parents[2] / "configs"
    for section in ("experiment", "data", "zero"):
        for path in sorted((root / section).glob("*.yaml")):
            load_config([f"{section}={path.stem}"])
