"""What the names of tasks, metrics and figures mean, for a reader who meets them for the first time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task in plain words.

    Attributes:
        title: its usual name.
        about: what it asks, as a clause.
        guess: the share that guessing gets right, where there is a fixed number of choices.
    """

    title: str
    about: str = ""
    guess: float | None = None


TASKS = {
    "perplexity": Task("Perplexity", "how surprised the model is by real text"),
    "arc_easy": Task("ARC-Easy", "school science, four choices", 0.25),
    "arc_challenge": Task("ARC-Challenge", "harder school science, four choices", 0.25),
    "piqa": Task("PIQA", "everyday physics, two choices", 0.5),
    "hellaswag": Task("HellaSwag", "how a scene goes on, four choices", 0.25),
    "winogrande": Task("WinoGrande", "who a pronoun means, two choices", 0.5),
    "boolq": Task("BoolQ", "yes or no about a passage", 0.5),
    "openbookqa": Task("OpenBookQA", "science facts applied, four choices", 0.25),
    "sciq": Task("SciQ", "science exam, four choices", 0.25),
    "copa": Task("COPA", "cause and effect, two choices", 0.5),
    "mmlu": Task("MMLU", "57 subjects, four choices", 0.25),
    "lambada_openai": Task("LAMBADA", "the last word of a passage"),
    "gsm8k": Task("GSM8K", "school arithmetic in words"),
    "ifeval": Task("IFEval", "instructions that can be checked"),
    "passkey": Task("Passkey", "a number hidden in repeated noise"),
    "niah_single_1": Task("Needle 1", "one number in repeated noise"),
    "niah_single_2": Task("Needle 2", "one number in running text"),
    "niah_single_3": Task("Needle 3", "one long code in running text"),
    "niah_multikey_1": Task("Needle, many keys 1", "one of several needles"),
    "niah_multikey_2": Task("Needle, many keys 2", "one needle among nothing but needles"),
    "niah_multikey_3": Task("Needle, many keys 3", "one long code among nothing but codes"),
    "niah_multivalue": Task("Needle, many values", "all values of one key"),
    "niah_multiquery": Task("Needle, many questions", "the values of several keys"),
    "ruler_vt": Task("Variable tracking", "a chain of assignments followed through the text"),
    "ruler_cwe": Task("Common words", "the ten commonest words of a list"),
    "ruler_fwe": Task("Frequent words", "the three most frequent coded words"),
    "line_retrieval": Task("Line retrieval", "the number on a named line"),
}

METRICS = {
    "acc": "accuracy",
    "acc_norm": "accuracy, corrected for length",
    "exact_match": "exact answers",
    "em": "exact answers",
    "f1": "F1",
    "mcc": "Matthews correlation",
    "score": "score",
}

EFFICIENCY = {
    "weight_bytes_on_disk": ("Weights on disk", "size of the files"),
    "weight_bytes_in_memory": ("Weights in memory", "bytes allocated once loaded"),
    "peak_memory": ("Peak memory", "the most held at any moment, loading included"),
    "peak_memory_generating": (
        "Peak memory while answering",
        "the most held at any moment after loading",
    ),
    "time_to_first_token": ("Time to first token", "the wait before an answer begins"),
    "prefill_tokens_per_second": ("Reading speed", "prompt tokens per second"),
    "decode_tokens_per_second": ("Writing speed", "answer tokens per second"),
}

MODULES = {
    "q_proj": "attention queries",
    "k_proj": "attention keys",
    "v_proj": "attention values",
    "o_proj": "attention output",
    "gate_proj": "MLP gate",
    "up_proj": "MLP in",
    "down_proj": "MLP out",
}


def task(name: str) -> Task:
    """What is known of a task; its own name if nothing is."""
    return TASKS.get(name, Task(name))


def efficiency(name: str) -> tuple[str, str]:
    """A figure of speed or memory in words, and what it means; its own name if nothing is known of it."""
    return EFFICIENCY.get(name, (name.replace("_", " "), ""))


def metric(name: str) -> str:
    """A metric in words; ``exact_match,strict-match`` keeps its filter, ``perplexity@1024`` tells its window."""
    base, comma, filtered = name.partition(",")
    if base.startswith("perplexity@"):
        window = base.partition("@")[2]
        prompt, colon, whole = window.partition(":")
        if colon:
            return f"windows of {whole}, behind a prompt of {prompt} tokens"
        return f"windows of {int(window):,} tokens" if window.isdecimal() else f"windows of {window}"
    words = METRICS.get(base, base.replace("_", " "))
    return f"{words} ({filtered})" if comma else words
