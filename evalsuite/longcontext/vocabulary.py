"""What is drawn: keys, values, words."""

import uuid
from random import Random

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The haystack that says nothing, of the passkey task and of RULER's first needle task."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# No word is part of another one, so that an answer can't hold a word by accident.
ADJECTIVES = _split(
    "amber ancient azure bitter bold brave brief bright brisk broad calm careful cheap clean clear clever cold cool "
    "crisp curious damp daring dark deep dense distant dry eager early easy elegant empty exact faint fair famous "
    "fast fierce fine firm flat fond formal fresh gentle giant glad golden grand great green happy hard heavy hidden "
    "hollow humble icy idle jolly keen kind large late lazy light lively lonely long loud loyal lucky mellow "
    "merry mild modern modest neat nimble noble novel odd open pale patient plain polite proud pure quick "
    "quiet rapid rare ready rich robust rough round royal rural sacred safe sharp shiny short shy silent silver "
    "simple sleepy slim slow small smart smooth soft solid sour spare steady steep still strange strong sturdy subtle "
    "sunny sweet swift tall tame tender thick thin tidy tiny tough urban useful vast vivid warm weary wide wild wise "
    "witty young"
)
NOUNS = _split(
    "acorn actor anchor apple apron arrow artist attic badge baker banjo barrel basket beach beacon bell bench berry "
    "bottle bridge bucket button cabin camel candle canoe canyon carpet castle cellar chair cherry circle clock "
    "coast comet copper coral corner cotton cradle crane crater cricket crown curtain dancer desert diamond dolphin "
    "dragon drum eagle engine falcon farmer feather fiddle field finger flame flute forest fountain garden garlic "
    "glove goose grape guitar hammer harbor harvest helmet hill honey horse island jacket jewel jungle kettle kitchen "
    "ladder lake lantern leaf lemon letter library lion magnet maple marble market meadow melon mirror mountain "
    "museum needle nest ocean olive orange otter owl oyster paddle palace panda paper parrot pebble pencil "
    "pepper piano pilot pirate planet pocket poet pond potato prairie prince pumpkin puzzle rabbit raven ribbon river "
    "robin rocket saddle sailor salmon school shadow shell ship singer spider spoon statue stone storm summer swan "
    "table temple thunder tiger tower train tulip tunnel turtle valley velvet village violin wagon walnut "
    "whale window winter wolf"
)


def words(draw: Random, asked: int, others: int) -> tuple[list[str], list[str]]:
    """Distinct English words: some to ask for, and others.

    Where there are too few, the others go on with pairs of words joined by a hyphen, none of which holds one of the
    words asked for.
    """
    single = [*ADJECTIVES, *NOUNS]
    draw.shuffle(single)
    chosen, rest = single[:asked], single[asked : asked + others]
    return chosen, rest + pairs(draw, others - len(rest), frozenset(chosen))


def pairs(draw: Random, count: int, without: frozenset[str] = frozenset()) -> list[str]:
    """Distinct ``adjective-noun`` names, none with certain words; numbered where even these are too few."""
    adjectives, nouns = ([word for word in kind if word not in without] for kind in (ADJECTIVES, NOUNS))
    kinds = len(adjectives) * len(nouns)
    found: list[str] = []
    for cycle in range(-(-count // kinds)):
        for index in draw.sample(range(kinds), min(kinds, count - len(found))):
            name = f"{adjectives[index // len(nouns)]}-{nouns[index % len(nouns)]}"
            found.append(f"{name}-{cycle}" if cycle else name)
    return found


def number(draw: Random, digits: int = 7) -> str:
    """A number of so many digits."""
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def identifier(draw: Random) -> str:
    """A UUID."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def letters(draw: Random, count: int) -> str:
    """A word of so many random letters, in upper case."""
    return "".join(draw.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(count))
