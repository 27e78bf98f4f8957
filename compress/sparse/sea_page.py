"""What SEA's estimators guess, as one HTML file: attention of some heads beside their own, and every layer's KL."""

from collections.abc import Sequence
from functools import partial

from compress.evalsuite.report.blocks import Block, Chart, Facts, Note, Page, Scale, Section, Summary, Table, Tile
from compress.evalsuite.report.page import to_html
from compress.evalsuite.report.svg import Drawing
from compress.sparse.sea_file import Learned
from compress.sparse.sea_map import FAINT, AttentionMap, draw


def sea_page(learned: Learned, maps: Sequence[AttentionMap], tokens: int) -> str:
    """The page of estimators.

    Args:
        learned: the estimators.
        maps: what is drawn; their head 0 is the first that searches in its layer.
        tokens: of the text that the maps are of.
    """
    figures = learned.header.figures
    better = sum(found.after < found.mean_map for found in figures.values())
    mean = sum(found.after for found in figures.values()) / len(figures)
    tiles = (
        Tile("layers", str(len(figures)), f"{sum(map(len, learned.header.heads.values()))} KV heads"),
        Tile("KL to the model", f"{mean:.2f}", "nats a row, mean over layers, on held-out text"),
        Tile(
            "better than a mean map", f"{better} of {len(figures)}", "layers whose estimator says more than an average"
        ),
    )
    reading = (
        "Each field is the mass that a token gives to some keys; colours are logarithmic, the darkest is all of it."
    )
    blocks: list[Block] = [
        Chart(
            f"map-{found.layer}",
            f"Layer {found.layer}, KL {found.divergence:.2f} nats a row",
            partial(_drawn, found),
            (),
            Scale("warm", f"{FAINT:g}", "1"),
            reading,
        )
        for found in maps
    ]
    drawn = Section("maps", "Attention", "maps", f"On {tokens:,} tokens that nothing was learnt from.", tuple(blocks))
    verdict = Note("The estimate chooses which keys are attended; attention over these is exact.")
    return to_html(
        Page(
            title=str(learned.header.fingerprint),
            kicker="Estimated attention (SEA)",
            verdict=(verdict,),
            summaries=(Summary(tiles),),
            sections=(drawn, _layers(learned), _origin(learned)),
            foot="Made by compress from estimators of attention (sea.safetensors).",
        )
    )


def _drawn(found: AttentionMap, width: int) -> Drawing:
    return draw(width, found)


def _layers(learned: Learned) -> Section:
    rows = tuple(
        (str(layer), f"{found.before:.3f}", f"{found.after:.3f}", f"{found.mean_map:.3f}", f"{found.grid:.3f}")
        for layer, found in learned.header.figures.items()
    )
    names = ("layer", "before", "estimator", "mean map", "grid")
    table = Table("KL divergence, nats a row, on held-out text", names, rows, frozenset(range(len(names))))
    about = (
        "A mean map is the average of a head's attention, whatever it reads; the grid is what no estimate gets below."
    )
    return Section("layers", "Layers", "layers", about, (table,))


def _origin(learned: Learned) -> Section:
    shape = learned.header.shape
    entries = {
        "model": str(learned.header.fingerprint),
        "columns": str(shape.width),
        "longest text": f"{shape.length:,} tokens",
        "steps a layer": f"{max(found.steps for found in learned.header.figures.values()):,.0f}",
    }
    return Section(
        "origin", "What it was made from", "origin", "Estimators hold for this model.", (Facts(entries, frozenset()),)
    )
