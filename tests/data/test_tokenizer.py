import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import (
    BOS_ID,
    CHUNK_CHARS,
    EOS_ID,
    N_SPECIALS,
    PAD_ID,
    UNK_ID,
    BytesTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)

VOCAB_SIZE = 350


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request: pytest.FixtureRequest, texts: list[str]) -> SentencePieceTokenizer:
    model = train_sentencepiece(texts, model_type=request.param, vocab_size=VOCAB_SIZE)
    return SentencePieceTokenizer(model, n_sentinels=40)


def test_training_twice_gives_the_same_model(texts: list[str]) -> None:
    models = [train_sentencepiece(texts, vocab_size=VOCAB_SIZE) for _ in range(2)]
    assert models[0] == models[1]


def test_texts_survive_a_round_trip(trained: SentencePieceTokenizer, texts: list[str]) -> None:
    odd = [" leading", "trailing ", "\n\n a\r\n\tb\n", "unseen: 海 🜁 \x00", "<s> </s> <unk>", ""]
    for text in texts + odd:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert (ids >= N_SPECIALS).all(), "a lossless text has no unknown tokens"
        assert (ids < N_SPECIALS + trained.n_pieces).all()


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_bytes_round_trip_every_text(text: str) -> None:
    tokenizer = BytesTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_cutting_at_newlines_does_not_change_ids(
    trained: SentencePieceTokenizer, texts: list[str]
) -> None:
    text = "".join(texts)
    assert len(text) > 2 * CHUNK_CHARS
    whole = trained._to_ours[trained._processor.EncodeAsIds(text)]
    np.testing.assert_array_equal(trained.encode(text), whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"add_dummy_prefix": True, "user_defined_symbols": ["\n"]},  # a space before the text
        {"add_dummy_prefix": False, "user_defined_symbols": ["\n", ".\nsea", "\n\n"]},
    ],
)
def test_a_given_model_that_sees_a_cut_gets_the_text_whole(settings: dict) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    text = "the sea.\nsea of seas\n\nthe \n" * 700
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(text[:3000].split("\n")),
        model_writer=model,
        vocab_size=275,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        minloglevel=2,
        **settings,
    )
    given = SentencePieceTokenizer(model.getvalue())
    assert len(text) > 2 * CHUNK_CHARS
    whole = given._to_ours[given._processor.EncodeAsIds(text)]
    np.testing.assert_array_equal(given.encode(text), whole)


def test_token_bytes_join_to_the_text(trained: SentencePieceTokenizer, texts: list[str]) -> None:
    for tokenizer in (trained, BytesTokenizer(n_sentinels=3)):
        table = tokenizer.token_bytes()
        assert len(table) == tokenizer.vocab_size
        for text in (*texts, "unseen: 海 🜁\n"):
            assert b"".join(table[i] for i in tokenizer.encode(text)) == text.encode()


def test_a_long_line_is_encoded_whole(trained: SentencePieceTokenizer) -> None:
    for text in ("sea " * CHUNK_CHARS, "a\n" + "sea " * CHUNK_CHARS + "\nb"):
        assert trained.decode(trained.encode(text)) == text


def test_vocabulary_layout(trained: SentencePieceTokenizer) -> None:
    assert (PAD_ID, BOS_ID, EOS_ID, UNK_ID) == (0, 1, 2, 3)
    assert trained.n_pieces == VOCAB_SIZE - N_SPECIALS
    assert trained.vocab_size == 512  # 350 and 40 sentinels, up to the next multiple of 128
    assert BytesTokenizer().vocab_size == 384
    assert trained.encode("\n").tolist() == [N_SPECIALS]


def test_specials_sentinels_and_padding_ids_decode_to_nothing(
    trained: SentencePieceTokenizer,
) -> None:
    ids = trained.encode("sea").tolist()
    behind_pieces = N_SPECIALS + trained.n_pieces
    around = [BOS_ID, *ids, EOS_ID, PAD_ID, behind_pieces, trained.vocab_size - 1]
    assert trained.decode(around) == "sea"


def test_foreign_special_ids_move_into_our_layout(texts: list[str]) -> None:
    """A model with T5's ids (pad 0, eos 1, unk 2, no bos) keeps its pieces in their order."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts[1].split("\n")),
        model_writer=model,
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = SentencePieceTokenizer(model.getvalue())
    assert ours.n_pieces == 40 - 3
    assert ours.encode("the captain").tolist() == [i + 1 for i in theirs.EncodeAsIds("the captain")]
    assert UNK_ID in ours.encode("the ☃")
    assert ours.decode(ours.encode("the captain")) == "the captain"


def test_identity_is_the_hash_of_the_model_file(trained: SentencePieceTokenizer) -> None:
    assert trained.sha256 == hashlib.sha256(trained.model).hexdigest()


def test_too_large_a_vocabulary_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=9000: .*choose a smaller"):
        train_sentencepiece(["a small text"], vocab_size=9000)


def test_a_path_that_is_no_model_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer=.*missing\.model: cannot be read"):
        load_tokenizer(tmp_path / "missing.model")
    (tmp_path / "text.model").write_text("this is no model")
    with pytest.raises(ValueError, match="no SentencePiece model"):
        load_tokenizer(tmp_path / "text.model")
