import itertools

import pytest
import torch
from compress.calibrate import windows
from compress.calibrate.errors import InputError
from compress.calibrate.text import source_of
from compress.calibrate.windows import expand, token_windows

TEXT = "".join(f"{i:04d}" for i in range(1000))  # 4,000 tokens, every aligned window of four different


def cut(tokenizer, text=TEXT, samples=4, seq_len=64, seed=0):
    documents = [text] if isinstance(text, str) else text
    return token_windows(source_of("here", documents, "made up"), tokenizer, samples, seq_len, seed)


def test_windows_are_pieces_of_the_text_without_special_tokens(tokenizer):
    made = cut(tokenizer)
    assert made.ids.shape == (4, 64)
    assert made.ids.dtype == torch.int64
    assert all(tokenizer.decode(row) in TEXT for row in made.ids)
    assert (made.tokens, made.available, made.source, made.origin, made.notes) == (256, 4000, "here", "made up", ())


def test_seed_decides_and_the_global_generator_is_left_alone(tokenizer):
    state = torch.get_rng_state()
    one, same, other = cut(tokenizer), cut(tokenizer), cut(tokenizer, seed=1)
    assert one.digest == same.digest
    assert torch.equal(one.ids, same.ids)
    assert one.digest != other.digest
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("length", [256, 257, 300, 4000])
def test_windows_do_not_overlap_where_the_text_suffices(tokenizer, length):
    text = "".join(chr(0x4E00 + i) for i in range(length))  # three tokens each, all different
    for seed in range(5):
        made = cut(tokenizer, text, samples=12, seq_len=length // 4, seed=seed)
        positions = locate(tokenizer, text, made.ids)
        assert all(b - a >= length // 4 for a, b in itertools.pairwise(positions))


def tokens(tokenizer, text):
    return torch.tensor(tokenizer(text)["input_ids"])


def locate(tokenizer, text, ids):
    whole = tokens(tokenizer, text).unfold(0, ids.shape[1], 1)
    return sorted(int((whole == row).all(1).nonzero()[0]) for row in ids)


def test_documents_are_joined_by_a_blank_line(tokenizer):
    made = cut(tokenizer, ["ab", "cd", "ef"], samples=1, seq_len=10)
    assert tokenizer.decode(made.ids[0]) == "ab\n\ncd\n\nef"


def test_a_shortish_text_overlaps_evenly_and_says_so(tokenizer):
    made = cut(tokenizer, TEXT[:100], samples=6, seq_len=64)
    assert locate(tokenizer, TEXT[:100], made.ids) == [0, 7, 14, 22, 29, 36]
    assert "100 tokens where 384 are wanted" in made.notes[0]


def test_too_short_text_names_what_is_there_needed_and_fits(tokenizer):
    with pytest.raises(InputError) as caught:
        cut(tokenizer, TEXT[:200], samples=20, seq_len=64)
    message = str(caught.value)
    assert message.startswith("calibration.source=here: the text has 200 tokens, and 20 windows of 64 need 1,280")
    assert "calibration.samples=3 fits or calibration.seq_len=10 fits" in message
    cut(tokenizer, TEXT[:200], samples=3, seq_len=64)
    cut(tokenizer, TEXT[:200], samples=20, seq_len=10)


def test_text_shorter_than_one_window(tokenizer):
    with pytest.raises(InputError, match=r"63 tokens.*1 windows of 64 need 64; calibration.seq_len=63 fits"):
        cut(tokenizer, TEXT[:63], samples=1, seq_len=64)
    assert cut(tokenizer, TEXT[:64], samples=1, seq_len=64).ids.shape == (1, 64)


def test_of_a_long_source_a_random_part_is_tokenized(tokenizer, monkeypatch):
    monkeypatch.setattr(windows, "LEAST_TEXT", 1000)
    monkeypatch.setattr(windows, "TEXT_PER_TOKEN", 1)
    documents = [TEXT[i : i + 100] for i in range(0, 4000, 100)]
    made = cut(tokenizer, documents, samples=4, seq_len=64)
    assert 1000 <= made.available <= 1000 + 2 * 39
    assert "a random part of 1,000 characters of the 4,000" in made.notes[0]
    assert torch.equal(made.ids, cut(tokenizer, documents, samples=4, seq_len=64).ids)
    single = {cut(tokenizer, TEXT, samples=1, seq_len=1000, seed=seed).digest for seed in range(4)}
    assert len(single) == 4


def test_expansion_rolls_every_window():
    ids = torch.arange(16).view(2, 8)
    made = expand(ids, 4)
    assert made.shape == (8, 8)
    assert made[:4, 0].tolist() == [0, 6, 4, 2]
    assert torch.equal(made[5], ids[1].roll(2))
    assert torch.equal(expand(ids, 1), ids)
    for factor in (0, 9):
        with pytest.raises(ValueError, match="expansion factor"):
            expand(ids, factor)


def test_blocks_lose_nothing_and_end_at_line_breaks(tokenizer, monkeypatch):
    text = "".join(f"line {i}\n" for i in range(50)) + "x" * 100
    whole = cut(tokenizer, text, samples=1, seq_len=len(text))
    monkeypatch.setattr(windows, "BLOCK", 40)
    sizes = []

    def counting(block, **options):
        sizes.append(len(block))
        return tokenizer(block, **options)

    assert torch.equal(cut(counting, text, samples=1, seq_len=len(text)).ids, whole.ids)
    assert max(sizes) <= 40
    assert len(sizes) > 10
