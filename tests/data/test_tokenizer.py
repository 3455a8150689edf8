import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecmoe.config import ConfigError
from ecmoe.data.tokenizer import BPE, END, Bytes, train_bpe

PARAGRAPHS = [f"Paragraph {i}: the cat sat on mat number {i * i % 97}; grüße, Welt!\n\n" for i in range(6000)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(PARAGRAPHS, 300, path)
    return BPE(path)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_inverts_encode(bpe, text):
    for tokenizer in (Bytes(), bpe):
        ids = tokenizer.encode([text + END])[0]
        assert tokenizer.decode(ids) == text + END
        assert tokenizer.byte_lengths[ids].sum() == len((text + END).encode())
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_half_a_character_is_shown_as_one_that_is_missing(bpe):
    assert Bytes().decode([*"ü".encode()][:1] + [65]) == "\ufffdA"


def test_end_is_one_token_of_its_own(bpe):
    for tokenizer in (Bytes(), bpe):
        ids = tokenizer.encode([f"mat.{END}"])[0].tolist()
        assert ids[-1] == 0 and 0 not in ids[:-1]


def test_bpe_is_the_same_again_and_shorter_than_bytes(bpe, tmp_path):
    train_bpe(PARAGRAPHS, 300, tmp_path / "again.json")
    again = BPE(tmp_path / "again.json")
    text = "".join(PARAGRAPHS[:50])
    assert (again.encode([text])[0] == bpe.encode([text])[0]).all()
    assert len(bpe.encode([text])[0]) < 0.6 * len(text) and bpe.vocab_size == 300


def test_bpe_of_too_small_a_text(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size=5000: the corpus gives only"):
        train_bpe(["one two three"], 5000, tmp_path / "t.json")
