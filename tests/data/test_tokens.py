from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from iprox.data.tokens import token_pieces


def byte_level():
    """Every byte a token: characters beyond ASCII are several."""
    alphabet = {symbol: place for place, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(alphabet, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def sentence_piece():
    """Words with the space before them, as SentencePiece has them."""
    words = {"<unk>": 0, "▁the": 1, "▁answer": 2, "▁is": 3, "▁": 4, "s": 5, "4": 6}
    core = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


BYTES = byte_level()


@settings(deadline=None)
@given(st.text(max_size=40))
def test_pieces_put_together_are_the_text(text):
    ids = BYTES(text)["input_ids"]
    pieces = token_pieces(BYTES, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == BYTES.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_is_whole():
    ids = BYTES("a€b")["input_ids"]
    assert token_pieces(BYTES, ids) == ["a", "", "", "€", "b"]


def test_a_token_that_is_no_character_is_told_as_such_and_the_next_as_itself():
    (euro,) = [ids[0] for ids in [BYTES("€")["input_ids"]]]
    pieces = token_pieces(BYTES, [euro, *BYTES("abcdef")["input_ids"]])
    assert "".join(pieces).endswith("bcdef")
    assert pieces[-3:] == ["d", "e", "f"]


def test_spaces_of_sentencepiece_stay():
    assert token_pieces(sentence_piece(), [1, 2, 5, 3, 4, 6]) == ["the", " answer", "s", " is", " ", "4"]


def test_nothing_has_no_pieces():
    assert token_pieces(BYTES, []) == []
