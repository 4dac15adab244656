"""What the trainer makes of data that cannot be read; all else about it is in tests/distributed."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.config import load_config
from pretrain.models import build_model
from pretrain.training import engine, trainer
from pretrain.training.engine import World
from pretrain.training.metrics import CorpusFacts
from pretrain.training.trainer import RankError, Trainer


class Unreadable:
    """A loader whose hub has gone away."""

    def state(self, step: int) -> dict[str, object]:
        raise ValueError("hub: away")


def test_a_position_that_cannot_be_found_is_an_error_of_this_rank_and_no_traceback() -> None:
    trainer = object.__new__(Trainer)
    trainer.loader, trainer.step = Unreadable(), 7
    trainer.world = SimpleNamespace(rank=3)
    with pytest.raises(RankError, match="rank 3 cannot read the data behind step 7: hub: away"):
        trainer._save()


def test_a_decoder_is_checked_with_as_many_tokens_as_targets_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Checked(Exception):
        pass

    def check(*_: object, target_length: int) -> None:
        raise Checked(target_length)

    monkeypatch.setattr(trainer, "plan_resume", lambda *_: None)  # asks all ranks
    monkeypatch.setattr(engine, "compile_blocks", lambda _: None)
    monkeypatch.setattr(engine, "verify_compiled", check)
    config = load_config(["model=spade_t5_tiny", "model.vocab_size=16", "train.compile=true"])
    world, facts = World(0, 1, torch.device("cpu")), CorpusFacts(None, "", target_length=29)
    with pytest.raises(Checked, match="29"):
        Trainer(config, build_model(config.model), Unreadable(), world, facts)
