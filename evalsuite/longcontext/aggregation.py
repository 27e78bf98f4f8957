"""Questions whose answer is spread over the whole prompt: following variables, counting words."""

from itertools import pairwise
from random import Random

from compress.evalsuite.longcontext.needles import Question
from compress.evalsuite.longcontext.vocabulary import NOISE, letters, number, words

HOPS = 4
COMMON_WORDS = 10
COMMON_COUNT, UNCOMMON_COUNT = 30, 3
FEWEST_COMMON = 6
CODED_WORDS = 50
ASKED_CODED = 3
LEAST_CODED = 200  # words of the text below which the counts of the first ones begin to be equal


def variable_tracking(draw: Random) -> Question:
    """``ruler_vt``: one chain of five variables, each assigned the one before; all of them are asked for."""
    example, _ = _chain(draw)
    chain, names = _chain(draw)
    places = sorted(draw.random() for _ in chain)

    def prompt(count: int) -> str:
        sentences = [f"{part}." for part in NOISE.rstrip(".").split(". ")]
        lines = [sentences[index % len(sentences)] for index in range(count)]
        for done, (place, line) in enumerate(zip(places, chain, strict=True)):
            lines.insert(round(place * count) + done, line)
        return f"{_track(example)}{_names(example)}\n\n{_track(lines, chain)}"

    return Question(prompt, tuple(names))


def _chain(draw: Random) -> tuple[list[str], list[str]]:
    """Assignments of a chain, and the names of its variables."""
    names: list[str] = []
    while len(names) <= HOPS:  # 26^5 words: a second draw is hardly ever needed
        names = list(dict.fromkeys([*names, letters(draw, 5)]))
    value = number(draw, 5)
    chain = [f"VAR {names[0]} = {value}.", *(f"VAR {name} = VAR {before}." for before, name in pairwise(names))]
    return chain, names


def _names(chain: list[str]) -> str:
    return " " + ", ".join(line.split()[1] for line in chain) + "."


def _track(lines: list[str], chain: list[str] | None = None) -> str:
    value = (chain or lines)[0].rstrip(".").split()[-1]
    return (
        "Follow the assignments of variables that are hidden in this text.\n\n"
        f"{' '.join(lines)}\n\n"
        f"Question: Which {HOPS + 1} variables have the value {value}, directly or through other variables?\n"
        "Answer: These variables have that value:"
    )


def common_words(draw: Random, length: int) -> Question:
    """``ruler_cwe``: ten words that come 30 times, among others that come three times.

    In prompts under 4,096 tokens the ten come less often, in proportion, but at least twice as often as the others.
    """
    seed = draw.getrandbits(64)
    repeats = max(FEWEST_COMMON, min(COMMON_COUNT, COMMON_COUNT * length // 4096))

    def prompt(count: int) -> str:
        again = Random(seed)
        common, others = words(again, COMMON_WORDS, count)
        text = common * repeats + others * UNCOMMON_COUNT
        again.shuffle(text)
        listed = " ".join(f"{index}. {word}" for index, word in enumerate(text, 1))
        return (
            "Below is a numbered list of words. Some of them come often. Memorize the ones that come most often.\n\n"
            f"{listed}\n\n"
            f"Question: What are the {COMMON_WORDS} words that come most often in the list?\n"
            f"Answer: The {COMMON_WORDS} words that come most often are:"
        )

    answers, _ = words(Random(seed), COMMON_WORDS, 0)
    return Question(prompt, tuple(answers))


def frequent_words(draw: Random) -> Question:
    """``ruler_fwe``: made-up words whose counts follow Zipf's law with exponent 2, the first of them being dots."""
    seed = draw.getrandbits(64)
    coded = sorted({letters(draw, 6).lower() for _ in range(CODED_WORDS)})
    draw.shuffle(coded)
    total = sum(rank**-2 for rank in range(1, len(coded) + 2))

    def prompt(count: int) -> str:
        ranked = ["...", *coded]
        text = [word for rank, word in enumerate(ranked, 1) for _ in range(max(1, round(count * rank**-2 / total)))]
        Random(seed).shuffle(text)
        return (
            "The text below is in code. Find out which coded words come most often. Dots don't count.\n\n"
            f"{' '.join(text)}\n\n"
            f"Question: What are the {ASKED_CODED} coded words that come most often in the text above?\n"
            f"Answer: The {ASKED_CODED} coded words that come most often are:"
        )

    return Question(prompt, tuple(coded[:ASKED_CODED]), least=LEAST_CODED)
