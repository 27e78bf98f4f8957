"""A profile of heads as one HTML file: a chart a score, layers by KV heads, and how the scores agree."""

from compress.evalsuite.report import draw
from compress.evalsuite.report.blocks import Block, Chart, Facts, Note, Page, Scale, Section, Summary, Table, Tile
from compress.evalsuite.report.page import to_html
from compress.evalsuite.report.svg import RAMP, Drawing
from compress.heads.profile import TOP, HeadProfile, short

MEANING = {
    "echo": "Attention to earlier copies of the same token, on random tokens. Mean mass, 0 to 1.",
    "induction": "Attention to what stood behind earlier copies of the token, on random tokens. Mean mass, 0 to 1.",
    "distant": "Attention outside the first and the newest tokens, at the end of long prompts. Mean mass, 0 to 1.",
    "retrieval": "How much of a hidden pass phrase a head copies while the model says it. 0 to 1.",
    "mean_qk": "Baseline: area under the attention of mean query and mean key, which sees positions only.",
    "influence": "Change of the loss, at first order, where a head sees its first and newest tokens only.",
    "blend": "Mean rank among all heads by influence and mean_qk, above 0 to 1.",
    "gauss_newton": "Squared change of the last hidden states with a head's gate, at second order.",
    "gates": "Gates optimised as in DuoAttention: 1 keeps full attention, 0 streams.",
}
"""What known scores say; others are shown without."""


def profile_page(profile: HeadProfile, name: str) -> str:
    """The page of a profile.

    Args:
        profile: with one score at least.
        name: of the model or file, for the heading.
    """
    mark = profile.fingerprint
    tiles = (
        Tile("KV heads", str(mark.layers * mark.kv_heads), f"{mark.layers} layers of {mark.kv_heads}"),
        Tile("scores", str(len(profile.scores)), ", ".join(profile.scores)),
        Tile("time", f"{sum(profile.seconds.values()):.0f} s", "for all scores together"),
    )
    sections = [_score(profile, score) for score in profile.scores]
    if len(profile.scores) > 1:
        sections.append(_agreement(profile))
    return to_html(
        Page(
            title=name,
            kicker="Which KV heads need far tokens",
            verdict=(Note("Scores say how much a head looks far back. They don't say what leaving that out costs."),),
            summaries=(Summary(tiles),),
            sections=(*sections, _origin(profile)),
            foot="Made by compress from a profile of heads (head_profile.json).",
        )
    )


def _score(profile: HeadProfile, score: str) -> Section:
    values = profile.scores[score]
    low, high = min(map(min, values)), max(map(max, values))
    cells = {
        (head, layer): draw.Cell(f"cool-{_step(value, low, high)}", "", f"layer {layer}, head {head}: {value:.3g}")
        for layer, row in enumerate(values)
        for head, value in enumerate(row)
    }
    layers, heads = ([str(index) for index in range(count)] for count in (len(values), len(values[0])))

    def drawn(width: int) -> Drawing:
        """Layers across on a page, down on a phone."""
        if width < draw.WIDE:
            turned = {(layer, head): cell for (head, layer), cell in cells.items()}
            return draw.grids(width, [("", turned)], layers, heads, ("layer", "KV head"))
        return draw.grids(width, [("", cells)], heads, layers, ("KV head", "layer"))

    scale = Scale("cool", short(low, high), short(high, high))
    reading = "Every field is one KV head; equal steps of the colour are equal steps of the score."
    blocks: list[Block] = [Chart(f"score-{score}", f"{score} by layer and KV head", drawn, (), scale, reading)]
    rows = tuple((f"layer {layer}, head {head}", f"{value:.4g}") for layer, head, value in profile.ranking(score)[:TOP])
    blocks.append(Table(f"The {len(rows)} largest", ("head", score), rows, frozenset({1}), folded=True))
    return Section(score, score, score, MEANING.get(score, "More where far tokens matter more."), tuple(blocks))


def _agreement(profile: HeadProfile) -> Section:
    """How many of the first tenth of the heads two scores share."""
    names = tuple(profile.scores)
    tops = {name: profile.top(name) for name in names}
    size = len(tops[names[0]])
    rows = tuple((name, *(str(len(tops[name] & tops[other])) for other in names)) for name in names)
    caption = f"Heads that are among the {size} largest of both scores"
    table = Table(caption, ("", *names), rows, frozenset(range(1, len(names) + 1)))
    return Section("agreement", "Agreement", "agreement", "Whether scores choose the same heads.", (table,))


def _origin(profile: HeadProfile) -> Section:
    entries = {
        "model": str(profile.fingerprint),
        "prompts": f"{', '.join(map(str, profile.lengths)) or 'none'} tokens, seed {profile.seed}",
        "hash of the prompts": profile.items,
        "seconds": ", ".join(f"{name} {seconds:g}" for name, seconds in profile.seconds.items()),
        "settings": ", ".join(f"{key} {value}" for key, value in profile.settings.items() if value is not None),
    }
    facts = Facts({key: value for key, value in entries.items() if value}, frozenset({"hash of the prompts"}))
    return Section("origin", "What it was made from", "origin", "A profile holds for this model and prompts.", (facts,))


def _step(value: float, low: float, high: float) -> int:
    return RAMP // 2 if high <= low else min(RAMP - 1, int(RAMP * (value - low) / (high - low)))
