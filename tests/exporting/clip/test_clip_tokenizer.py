"""open_clip's tokenizer and its conversion give the same ids for any text."""

import numpy as np
import pytest

from gog_edge.errors import CheckpointError
from gog_edge.exporting.clip.tokenizer import SAMPLES, check_tokenizer, convert_hf_tokenizer, convert_simple_tokenizer
from gog_edge.exporting.torchvision_shim import import_torchvision


@pytest.fixture(scope="module")
def original():
    import_torchvision()
    import open_clip

    return open_clip.SimpleTokenizer(context_length=77)


@pytest.fixture(scope="module")
def converted(original):
    return convert_simple_tokenizer(original)


def test_difficult_samples_have_equal_ids(original, converted):
    check_tokenizer(converted, original, 77, SAMPLES)


def test_truncated_texts_keep_their_end_token(original, converted):
    check_tokenizer(converted, original, 8, ["word " * 40, "one", "x" * 99])


def test_random_texts_have_equal_ids(original, converted):
    rng = np.random.default_rng(3)
    alphabet = list("abcXYZ019 .,'!?-_/\\\n\t@#$%^*(){}[]|~`+=:;éßøя日ع🙂\u0301\u200d")
    texts = ["".join(rng.choice(alphabet, size=int(rng.integers(0, 60)))) for _ in range(300)]
    check_tokenizer(converted, original, 77, texts)


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
def test_other_cleaning_modes_have_equal_ids(clean):
    import open_clip

    tokenizer = open_clip.SimpleTokenizer(context_length=32, clean=clean)
    texts = ["The_Flag, of: (France)!", "The Flag  of\tFrance", "I'M", "a-b"]
    check_tokenizer(convert_simple_tokenizer(tokenizer, clean=clean), tokenizer, 32, texts)


def test_a_difference_is_an_error(original):
    wrong = convert_simple_tokenizer(original, clean="whitespace")
    with pytest.raises(CheckpointError, match="gives"):
        check_tokenizer(wrong, original, 77, ["CAPITALS"])


def test_an_unknown_cleaning_is_refused(original, tmp_path):
    with pytest.raises(CheckpointError, match="whitespace, lower, canonicalize"):
        convert_simple_tokenizer(original, clean="scrub")


def test_texts_are_cleaned_before_a_given_tokenizer(converted, tmp_path):
    converted.save(str(tmp_path / "tokenizer.json"))
    tokenizer = convert_hf_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("  a \n flag ").ids == tokenizer.encode("a flag").ids
