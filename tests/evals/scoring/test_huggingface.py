"""A Hugging Face folder is scored like our model with the same weights, and its bytes are right."""

import hashlib
import json
import sys

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from evals.scoring import protocols
from evals.scoring.huggingface import HuggingFaceScorer, HuggingFaceTokenizer, encode_documents
from evals.scoring.models import LanguageModelScorer
from evals.scoring.score import score
from launch import evaluate
from tests.evals.toy_models import Uniform
from tests.pretrain.models.test_transformers import like_llama, mistral

CPU = torch.device("cpu")
TEXTS = ["the cat sat on the mat and " * 6, "a dog ran off. every book is long, " * 4]
MAX_TOKENS = 96


def save_tokenizer(folder, backend):
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def characters():
    """A vocabulary of single characters, with a mark for spaces."""
    symbols = ["<s>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyz.,"]
    vocabulary = {symbol: k for k, symbol in enumerate(symbols)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    return tokenizer


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: k for k, symbol in enumerate(["<s>", "</s>", *alphabet])}
    vocabulary["\u0120t"] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("\u0120", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback():
    symbols = ["<s>", "</s>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"aei"]
    vocabulary = {symbol: k for k, symbol in enumerate(symbols)}
    model = models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Mistral with a window of 8 tokens and a tokenizer of characters, as it would be published."""
    path = tmp_path_factory.mktemp("mistral")
    torch.manual_seed(0)
    model = mistral()[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.config.max_position_embeddings = MAX_TOKENS
    model.save_pretrained(path)
    save_tokenizer(path, characters())
    (path / "one.txt").write_text(TEXTS[0])
    (path / "two.txt").write_text(TEXTS[1])
    return path


def test_losses_are_those_of_our_model_with_the_same_weights(folder):
    theirs = HuggingFaceScorer(folder, CPU)
    ours = mistral()[1]
    ours.load_state_dict(like_llama(theirs.model.state_dict()))
    documents = encode_documents(TEXTS, HuggingFaceTokenizer(folder), {})
    for scoring in (
        *protocols.fixed(documents.lengths, [16, 64]),
        *protocols.stream(documents.lengths, 20, 90),
        *protocols.nonoverlap(documents.lengths, 32),
    ):
        expected = score(LanguageModelScorer(ours, CPU), documents, scoring)
        table = score(theirs, documents, scoring)
        assert table.same_tokens(expected)
        np.testing.assert_allclose(table.nll, expected.nll, atol=1e-4, err_msg=scoring.name)


def test_lanes_in_turn_score_like_lanes_at_once(folder, monkeypatch):
    scorer = HuggingFaceScorer(folder, CPU)
    tokens = torch.randint(0, 30, (5, 21), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, state = scorer.nll(tokens)
        monkeypatch.setattr("evals.scoring.huggingface.LOGITS", 2 * 20 * scorer.vocab_size)
        parts, other = scorer.nll(tokens)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(scorer.nll(tokens, other)[0], scorer.nll(tokens, state)[0])


def test_the_command_evaluates_a_folder_on_files(folder, tmp_path, capsys):
    words = [f"hf={folder}", f"text={folder}/*.txt", "segment_tokens=32", "stream_tokens=90"]
    assert evaluate.main([*words, f"out={tmp_path}/mistral", "contexts=8,32", "device=cpu"]) == 0
    page = capsys.readouterr().out.splitlines()[-1]
    assert page == f"{tmp_path}/mistral/eval/perplexity/report.html"
    result = json.loads((tmp_path / "mistral/eval/perplexity/result.json").read_text())
    assert result["name"] == "mistral"
    assert result["tokenizer"]["lossless"]
    assert result["data"]["n_bytes"] == sum(map(len, TEXTS))
    by_name = {m["name"]: m for m in result["metrics"] if m["protocol"].startswith("nonoverlap")}
    # One byte a token.
    assert by_name["bpb"]["value"] == pytest.approx(by_name["nll"]["value"] / np.log(2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=x"], "needs one of text=FILES and data=CORPUS"),
        (["text=TEXT"], "needs out="),
        (["out=x", "text=TEXT", "contexts=64,128"], "the model takes 96"),
        (["out=x", "text=TEXT", "contexts=8"], "use stream_tokens=96"),
        (["out=x", "text=TEXT", "suite=extrapolation"], "length (96 tokens), and this model"),
        (["out=x", "text=TEXT", "suite=all"], "suite=perplexity, then suite=recall"),
        (["out=x", "text=TEXT", "hf=nowhere"], "hf=nowhere: no such folder"),
        (["out=x", "text=TEXT", "hf=EMPTY"], "holds no tokenizer"),
    ],
)
def test_bad_input_is_one_clear_error(folder, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"TEXT": f"{folder}/*.txt", "EMPTY": str(tmp_path)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert evaluate.main([f"hf={folder}", "device=cpu", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_without_transformers_the_error_names_the_extra(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert evaluate.main([f"hf={folder}", f"out={tmp_path}", f"text={folder}/*.txt"]) == 2
    assert "pip install 'longspan[hf]'" in capsys.readouterr().err


def test_a_model_with_another_state_is_refused(tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4}
    config = Mamba2Config(**sizes, head_dim=8, state_size=8, n_groups=1)
    Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    scorer = HuggingFaceScorer(tmp_path, CPU)
    with pytest.raises(ValueError, match="carries another state than keys and values"):
        scorer.nll(torch.zeros(1, 9, dtype=torch.int64))


def like_llama_2():
    """A space in front of every text, and words that no other symbol spells are unknown."""
    symbols = ["<s>", "</s>", "<unk>", "\u2581", *"acghimnortuy", "<0x0A>"]
    model = models.BPE({symbol: k for k, symbol in enumerate(symbols)}, [], unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("text", "lossless"),
    [
        ("a cat ran", True),
        ("caf\u00e9 in \u6771\u4eac, \U0001f600", False),
        ("\u6771\u6771\u6771 \u6771", False),
        ("a</s>cat", False),
    ],
)
def test_bytes_are_the_texts_own_whatever_its_tokens_decode_to(text, lossless, tmp_path):
    GPT2Config(vocab_size=300).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, like_llama_2())
    documents = encode_documents([text, "no"], HuggingFaceTokenizer(tmp_path), {})
    assert documents.text(0) == text.encode()
    assert documents.text_sha256() == plain_sha256([text, "no"])
    assert documents.lossless() == lossless
    (scoring,) = protocols.position(documents.lengths, 100)
    table = score(Uniform(documents.vocab_size), documents, scoring)
    bits, n_bytes = table.bits_and_bytes()
    assert n_bytes.tolist() == [len(text.encode()), 2]
    # Every token but EOS is charged, those that stand for no byte or an unknown one too.
    charged = np.array(documents.lengths) - 1
    np.testing.assert_allclose(bits, charged * np.log2(documents.vocab_size), rtol=1e-6)


def plain_sha256(texts):
    each = (hashlib.sha256(text.encode()).digest() for text in texts)
    return hashlib.sha256(b"".join(each)).hexdigest()


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_token_bytes_join_to_the_text(kind, tmp_path):
    GPT2Config(vocab_size=300).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, kind())
    text = "I bought the thé\n at 東京 \U0001f600"
    documents = encode_documents([text], HuggingFaceTokenizer(tmp_path), {})
    assert documents.text(0) == text.encode()
    assert documents.lossless()
    assert documents.token_bytes[documents.bos_id] == b""
