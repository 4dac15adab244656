"""The command end to end on a task that can be learned, its table, its resumption, its errors."""

import json
import re
import sys

import pytest
import torch

from data.folder_lock import lock_folder
from data.tokenizer import BytesTokenizer
from evals.downstream import outputs
from launch import finetune
from pretrain.config import load_config, save_config
from pretrain.finetuning.ranks import Ranks
from pretrain.models import build_model
from pretrain.training.manifest import content_files, file_entries
from tests.launch.last_letter import ENCODER_DECODER, MODEL, WORDS, write, write_examples


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A command line: is the last letter an a or a b? Test answers are mostly a."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(MODEL)
    write_examples(tmp_path)
    return {"model": str(tmp_path / "tiny.yaml"), "out": "out", **WORDS}


def run(words, **changes):
    return finetune.main([f"{key}={value}" for key, value in {**words, **changes}.items() if value])


def complaint(capsys, words, **changes):
    assert run(words, **changes) == finetune.BAD_INPUT
    return capsys.readouterr().err


def test_a_task_is_learned_and_beats_the_commonest_label(words, tmp_path, capsys):
    assert run(words, steps="60", check_every="20", seeds="2") == 0
    printed = capsys.readouterr().out
    assert "| majority class |" in printed
    assert "| out |" in printed
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    ours = {row["model"]: row for row in rows}
    assert ours["out"]["metrics"]["accuracy"]["value"] > 95
    assert ours["out"]["difference"]["low"] > 0
    assert len(ours["out"]["per_seed"]) == 2
    texts, examples = outputs.read(tmp_path / "out/seed_1/test.jsonl")
    assert len(texts) == len(examples) == 30
    assert {path.name for path in (tmp_path / "out/seed_0").iterdir()} == {
        "best.pt",
        "result.json",
        "test.jsonl",
    }


def test_an_encoder_decoder_is_fine_tuned_by_the_same_command(words, tmp_path, capsys):
    (tmp_path / "both.yaml").write_text(ENCODER_DECODER)
    assert run(words, model="both.yaml", beams="2") == 0
    assert "PairEncoderDecoder" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["tiny.yaml", "both.yaml"])
def test_a_head_names_labels_as_they_are_written_and_has_a_row_of_its_own(
    model, words, tmp_path, capsys
):
    (tmp_path / "both.yaml").write_text(ENCODER_DECODER)
    long = {"a": "alike ", "b": " ", "c": "álike"}
    for path in tmp_path.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write(path, [row | {"label": "label " + long[row["label"]]} for row in rows])
    assert run(words, model=model, out="text") == 0
    steps = {"steps": "60", "check_every": "20"}
    assert run(words, model=model, out="head", head="classifier", **steps) == 0
    assert "2 labels" in capsys.readouterr().out
    texts, examples = outputs.read(tmp_path / "head/seed_0/test.jsonl")
    assert texts == [example.references[0].strip() for example in examples]
    assert outputs.read_settings(tmp_path / "head")["labels"] == ["label", "label alike"]
    weights = torch.load(tmp_path / "head/seed_0/best.pt", weights_only=True)
    assert weights["head.weight"].shape == (2, 16)
    assert finetune.main(["table", "text", "head", "out=all"]) == 0
    rows = json.loads((tmp_path / "all/results.json").read_text())["rows"]
    names = ["majority class", "text", "head (head: classifier)"]
    assert [row["model"] for row in rows] == names
    assert rows[2]["metrics"]["invalid"]["value"] == 0


def test_what_is_done_is_not_done_again_and_more_seeds_are_added(words, tmp_path, monkeypatch):
    assert run(words) == 0
    table = (tmp_path / "out/table.md").read_text()
    trained, train = [], finetune.train

    def counted(*arguments):
        trained.append(arguments[4])
        return train(*arguments)

    monkeypatch.setattr(finetune, "train", counted)
    assert run(words) == 0
    assert (trained, (tmp_path / "out/table.md").read_text()) == ([], table)
    assert run(words, seeds="2") == 0
    assert trained == [1]


@pytest.mark.parametrize(
    ("head", "dropout"), [("text", "0.2"), ("classifier", "0.2"), ("text", "0")]
)
def test_a_killed_command_ends_like_one_that_was_not(head, dropout, words, tmp_path, monkeypatch):
    words |= {"head": head, "dropout": dropout}
    assert run(words, steps="6") == 0
    calls, score = [], finetune.contributions

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:  # the first is not of validation
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(finetune, "contributions", killed)
    with pytest.raises(KeyboardInterrupt):
        run(words, steps="6", out="other")
    assert (tmp_path / "other/seed_0/progress.pt").exists()
    assert run(words, steps="6", out="other") == 0
    whole, resumed = (tmp_path / name / "seed_0" for name in ("out", "other"))
    assert (whole / "test.jsonl").read_bytes() == (resumed / "test.jsonl").read_bytes()
    histories = [json.loads((f / "result.json").read_text())["history"] for f in (whole, resumed)]
    assert histories[0] == histories[1]
    weights = [torch.load(f / "best.pt", weights_only=True) for f in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_dropout_is_set_for_the_fine_tuning_and_changes_it(words, tmp_path, capsys):
    words |= {"steps": "2"}
    losses = []
    for out, dropout in (("none", {}), ("zero", {"dropout": "0"}), ("some", {"dropout": "0.5"})):
        assert run(words, out=out, **dropout) == 0
        result = json.loads((tmp_path / out / "seed_0/result.json").read_text())
        losses.append([check["loss"] for check in result["history"]])
    assert losses[0] == losses[1] != losses[2]
    assert run(words, out="more", dropout="1") == 2
    assert "model.dropout=1.0: must be at least 0 and less than 1" in capsys.readouterr().err


def test_several_fine_tunings_make_one_table_and_other_tests_none(words, tmp_path, capsys):
    assert run(words, out="one") == 0
    assert run(words, out="two", learning_rate="1e-4") == 0
    capsys.readouterr()
    assert finetune.main(["table", "one", "two", "out=both"]) == 0
    rows = json.loads((tmp_path / "both/results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["majority class", "one", "two"]
    assert rows[1]["difference"]["over"] == "two"
    assert run(words, out="less", test_examples="10", train_examples="16") == 0
    # A label that few examples miss is none the less valid.
    assert outputs.read_settings(tmp_path / "less")["labels"] == ["a", "b"]
    capsys.readouterr()
    assert finetune.main(["table", "one", "less"]) == finetune.BAD_INPUT
    assert "less: its test examples are not those of one" in capsys.readouterr().err


def test_the_table_of_several_tasks_begins_with_an_overview(words, tmp_path, capsys):
    other = {"task": "banking77", "metrics": "rougeL"}
    for name, changes in {"words": {}, "again": other}.items():
        for row, rate in {"a": "1e-2", "b": "1e-3"}.items():
            assert run(words, out=f"{name}/{row}", learning_rate=rate, **changes) == 0
    capsys.readouterr()
    folders = ["words/a", "again/b", "words/b", "again/a"]
    assert finetune.main(["table", *folders, "baseline=b", "out=all"]) == 0
    assert finetune.main(["table", *folders, "baseline=b", "out=processes", "workers=2"]) == 0
    both = [(tmp_path / f"{out}/results.json").read_text() for out in ("all", "processes")]
    assert both[0] == both[1]
    overview, _, *tables = (tmp_path / "all/table.md").read_text().split("\n\n")
    assert sum(part.startswith("| model |") for part in tables) == 2
    found = json.loads((tmp_path / "all/results.json").read_text())["rows"]
    lines = [
        line.removeprefix("| ").removesuffix(" |").split(" | ") for line in overview.splitlines()
    ]
    assert [line[0] for line in lines[2:]] == ["jsonl", "banking77"]  # in the order of the folders
    columns = lines[0][3:]
    for line in lines[2:]:
        for name, cell in zip(columns, line[3:], strict=True):
            rows = [r for r in found if (r["task"], r["model"]) == (line[0], name)]
            if not rows:  # another task's baseline
                assert cell == ""
                continue
            (row,) = rows
            assert cell.strip("*").startswith(f"{row['metrics'][line[1]]['value']:.1f}")
            gap = row.get("difference")
            assert (gap is None) == (name == "b")
            if gap:
                assert f"{gap['value']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}]" in cell
                assert cell.startswith("**") == (gap["low"] > 0 or gap["high"] < 0)


def test_bad_input_is_one_clear_line(words, tmp_path, capsys, monkeypatch):
    def told(**changes):
        text = complaint(capsys, words, **changes)
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        return text

    assert "did you mean 'sst2'" in told(task="sst-2")
    assert "has no field 'body'; it has text, label: set input_field=" in told(input_field="body")
    (tmp_path / "empty.jsonl").write_text("")
    assert "the validation split (empty.jsonl) has no example" in told(validation="empty.jsonl")
    assert "have more than 3 tokens, the longest 6; truncate=true" in told(max_input_tokens="3")
    assert "input_field= say the same" in told(input="{text}")
    assert "bach_size=3: not known; did you mean batch_size=?\n" in told(bach_size="3")
    assert "out=test.jsonl is a file; name a folder" in told(out="test.jsonl")
    assert "tokenizer= is missing" in told(tokenizer="")
    assert "give run=runs/NAME, or model=NAME" in told(model="")
    assert "run=nowhere: no such folder" in told(model="", run="nowhere")
    assert "batch_size=500 is more than the 90" in told(batch_size="500")
    assert "out= is missing" in told(out="")
    assert "metrics=f1 is for two classes, and there are 3" in told(
        metrics="f1",
        train=str(write(tmp_path / "c.jsonl", [{"text": t, "label": t} for t in "abc"])),
    )
    assert "patience=0 must be at least 1" in told(patience="0")
    assert "batch_size=0 must be at least 1" in told(batch_size="0")
    assert "learning_rate=-1 must be a positive number" in told(learning_rate="-1")
    assert "learning_rate=nan must be a positive number" in told(learning_rate="nan")
    assert "weight_decay=-1 must be at least 0" in told(weight_decay="-1")
    assert "warmup_fraction=3 must lie between 0 and 1" in told(warmup_fraction="3")
    assert "micro_batch_tokens=0 must be at least 1" in told(micro_batch_tokens="0")
    assert "epochs=inf must be a positive number" in told(epochs="inf")
    assert "length_penalty=nan must be at least 0" in told(length_penalty="nan")
    assert "head=linear is not known; use text or classifier" in told(head="linear")
    assert "task=stsb is a regression (spearman, pearson)" in told(
        head="classifier", task="stsb", train="", test="", input_field="", metrics=""
    )
    assert "task=jsonl is a generation (rougeL)" in told(head="classifier", metrics="rougeL")
    assert "beams= is of answers that are written" in told(head="classifier", beams="2")
    assert "all training examples of task=jsonl have the label 'a'" in told(
        head="classifier",
        train=str(write(tmp_path / "a.jsonl", [{"text": t, "label": "a"} for t in "abc"])),
    )
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert "the package rouge-score is missing" in told(metrics="rougeL")
    assert not (tmp_path / "out/seed_0/result.json").exists()
    assert "nothing at 'nowhere.jsonl'" in told(train="nowhere.jsonl")


@pytest.mark.parametrize(
    ("train_length", "changes", "told"),
    [
        (64, {"truncate": "true"}, "targets of 100 tokens leave no room for an input: the model"),
        (64, {"truncate": "true", "max_target_tokens": "62"}, "targets of 62 tokens leave no room"),
        (8, {"head": "classifier"}, "targets of 0 tokens leave no room"),
    ],
)
def test_a_target_that_fills_the_model_is_refused_before_anything_is_written(
    train_length, changes, told, words, tmp_path, capsys
):
    bst = f"filters: unstructured, train_length: {train_length}, chunk_size: 8, block_size: 8"
    text = MODEL.replace("default: swa", "default: bst")
    text = text.replace("swa: {n_heads: 2, window_size: 16}", f"bst: {{n_heads: 2, {bst}}}")
    (tmp_path / "tiny.yaml").write_text(text)
    rows = [{"text": "ab", "label": letter * 100} for letter in "ab" * 8]
    train = str(write(tmp_path / "long.jsonl", rows))
    assert told in complaint(capsys, words, train=train, **changes)
    assert not (tmp_path / "out").exists()


def test_a_damaged_newest_checkpoint_is_said_to_be_passed_over(words, tmp_path, capsys):
    config = load_config([f"model={words['model']}"])
    config.model.vocab_size = BytesTokenizer().vocab_size
    for step in (1, 2):
        checkpoint = tmp_path / f"run/checkpoints/step_0000000{step}"
        (checkpoint / "deepspeed").mkdir(parents=True)
        save_config(config, checkpoint / "config.yaml")
        weights = {"module": build_model(config.model).state_dict()}
        torch.save(weights, checkpoint / "deepspeed/mp_rank_00_model_states.pt")
        torch.save({}, checkpoint / "buffers.pt")
        facts = {"zero_stage": 1, "tokenizer": BytesTokenizer().sha256}
        (checkpoint / "training.json").write_text(json.dumps(facts))
        files = file_entries(checkpoint, content_files(checkpoint))
        content = {"step": step, "tokens": step, "files": files}
        (checkpoint / "manifest.json").write_text(json.dumps(content))
    (checkpoint / "buffers.pt").write_text("damaged")
    assert run(words, model="", run="run", steps="1") == 0
    passed_over = "passed over: step_00000002 is not complete: buffers.pt has 7 bytes"
    assert capsys.readouterr().out.startswith(passed_over)
    assert outputs.read_settings(tmp_path / "out")["model"]["checkpoint"] == "step_00000001"


def test_a_training_that_diverged_is_marked_and_its_result_is_json(words, tmp_path, capsys):
    assert run(words, learning_rate="1e30") == 0
    assert re.search(r"\| out \|.*\| \d+\.\d diverged \|", capsys.readouterr().out)
    text = (tmp_path / "out/seed_0/result.json").read_text()
    result = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["history"][-1]["loss"] is None
    other = {"task": "banking77", "metrics": "rougeL", "steps": "1"}
    assert run(words, out="other", **other) == 0
    assert finetune.main(["table", "out", "other"]) == 0
    assert re.search(r"\| jsonl \|.*\d\.\d diverged", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("settings.json", "; restore it, or choose another out="),
        ("seed_0/test.jsonl", "; delete out/seed_0 and run its command again"),
        ("seed_0/result.json", "; delete out/seed_0 and run its command again"),
    ],
)
def test_a_damaged_file_is_named(name, told, words, tmp_path, capsys):
    assert run(words, steps="1") == 0
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:-4])
    error = complaint(capsys, words, steps="1")
    assert error.startswith(f"error: out/{name}: damaged (")
    assert error.endswith(f"{told}\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\x03\x04damaged"])
def test_a_damaged_progress_is_named_and_goes_with_its_file(content, words, tmp_path, capsys):
    progress = tmp_path / "out/seed_0/progress.pt"
    progress.parent.mkdir(parents=True)
    progress.write_bytes(content)
    assert run(words, steps="1") == finetune.FAILED
    error = capsys.readouterr().err
    assert error.startswith("error: out/seed_0/progress.pt: cannot be read (")
    assert error.endswith("; if it is damaged, delete it, and this seed begins anew\n")
    assert error.count("\n") == 1
    progress.unlink()
    assert run(words, steps="1") == 0


def test_a_folder_keeps_its_settings(words, capsys):
    assert run(words) == 0
    assert "(steps was 4, is 5); choose another out=" in complaint(capsys, words, steps="5")
    assert "(head was 'text', is 'classifier')" in complaint(capsys, words, head="classifier")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_folder_keeps_its_examples(split, words, tmp_path, capsys):
    assert run(words, steps="1") == 0
    path = tmp_path / f"{split}.jsonl"
    kept = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    path.write_text(path.read_text().replace('"text": "', '"text": "y'))
    told = complaint(capsys, words, steps="1", seeds="2")
    assert f"other settings ({split} examples are others); choose another out=" in told
    assert kept == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}


def test_a_folder_from_before_a_key_goes_on_with_its_default(words, tmp_path, capsys):
    assert run(words) == 0
    settings = outputs.read_settings(tmp_path / "out")
    del settings["arguments"]["head"], settings["examples"]
    del settings["model"]["config"]["residual_in_fp32"]
    (tmp_path / "out/settings.json").write_text(json.dumps(settings))
    assert run(words, seeds="2") == 0
    assert len(outputs.read_settings(tmp_path / "out")["examples"]) == 3
    assert "(head was 'text', is 'classifier')" in complaint(capsys, words, head="classifier")
    texts, examples = outputs.read(tmp_path / "out/seed_1/test.jsonl")
    outputs.write(tmp_path / "out/seed_1", "test", texts[1:], examples[1:])
    told = complaint(capsys, words, seeds="2")
    assert "out/seed_1: its test examples are not those of out/seed_0; delete one" in told


@pytest.mark.parametrize("model", ["tiny.yaml", "both.yaml"])
def test_a_folder_of_a_model_with_a_layer_unlike_the_others_takes_more_seeds(
    model, words, tmp_path, capsys
):
    (tmp_path / "both.yaml").write_text(ENCODER_DECODER)
    text = (tmp_path / model).read_text()
    mixers = "swa: {n_heads: 2, window_size: 16}"
    text = text.replace("default: swa", "default: swa, at: {0: attention}")
    text = text.replace(mixers, f"{mixers}, attention: {{n_heads: 2}}")
    (tmp_path / model).write_text(text)
    assert run(words, model=model) == 0
    assert run(words, model=model, seeds="2") == 0
    assert (tmp_path / "out/seed_1/result.json").exists()
    (tmp_path / model).write_text(text.replace("0: attention", "0: swa"))
    assert "another model configuration" in complaint(capsys, words, model=model)


def test_two_fine_tunings_of_one_folder_exclude_each_other(words, tmp_path, capsys):
    with lock_folder(tmp_path / "out", AssertionError()):
        told = complaint(capsys, words)
    assert "out=out: another fine-tuning is writing there; wait for it" in told
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_keeps_its_labels(words, tmp_path, capsys):
    assert run(words, head="classifier") == 0
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "xc", "label": "c"}) + "\n")
    told = complaint(capsys, words, head="classifier", seeds="2")
    assert "labels are others, e.g. 'c'" in told


def test_several_processes_are_not_put_on_one_gpu(words):
    told = [f"{key}={value}" for key, value in {**words, "device": "cuda:0"}.items()]
    with pytest.raises(ValueError, match="device=cuda:0: 2 processes need one each"):
        finetune.prepare(told, Ranks(0, 2))
