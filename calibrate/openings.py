"""How a document may begin: short openings of many kinds, from which a model writes on.

A model that starts from nothing writes what it likes best; varied openings make it show more of what it knows, and so
of the activations that it has. The wording is our own.
"""

import random

SUBJECTS = (
    "the river trade", "a suspension bridge", "the honey bee", "coastal erosion", "the printing press", "a violin",
    "the siege of the old town", "volcanic islands", "the vaccine", "a lighthouse", "the wheat harvest", "chess",
    "the northern railway", "deep-sea fish", "the parliament", "a stone circle", "glass making", "the comet",
    "the tax reform", "a marathon", "the opera house", "soil bacteria", "the cavalry", "solar panels", "the cathedral",
    "a hurricane", "the silk road", "football", "the novel", "antibiotics", "the desert fox", "an orchestra",
    "the steam engine", "public libraries", "the lunar calendar", "a battleship", "inflation", "the rain forest",
    "an earthquake", "the film festival", "the apprentice", "a small bakery", "electric motors", "the glacier",
    "a court ruling", "the folk song", "the space probe", "migratory birds", "the cotton mill", "a school board",
)  # fmt: skip
NAMES = (
    "Margaret", "Tomas", "Dr. Okafor", "Elena Petrova", "Captain Reed", "Yusuf", "Ingrid", "Professor Lin", "Samuel",
    "Amara", "the governor", "Kenji", "old Walter", "Priya", "Sister Agnes", "Luis Ortega",
)  # fmt: skip
PLACES = (
    "the Baltic coast", "northern Chile", "Kyoto", "a village near Lyon", "Nairobi", "the Ohio valley", "Glasgow",
    "southern India", "the Black Sea", "New Zealand", "Cairo", "the Alps", "Boston", "western Australia", "Prague",
    "the Mekong delta",
)  # fmt: skip
KINDS: dict[str, tuple[str, ...]] = {
    "encyclopedia": (
        "{Subject} is",
        "The history of {subject} in {place} begins in {year}, when",
        "{Subject} was first described in {year} by",
        "In {year}, {subject} became",
        "{Name} (born {year} in {place}) was",
        "The {year} season was",
        "Situated in {place}, the area is known for {subject}. It",
        "After the war, {name} returned to {place} and",
        "Critics received {subject} well. Writing in",
        "The structure of {subject} consists of",
    ),
    "news": (
        "{PLACE} - Officials said on Tuesday that {subject}",
        "A new report on {subject} has found that",
        '"We did not expect this," said {name}, who',
        "Residents of {place} woke on Monday to",
        "Shares in the company behind {subject} fell after",
    ),
    "story": (
        "{Name} had not thought about {subject} for years, until",
        "The door opened, and {name} saw",
        'It was raining in {place}. "You are late," said {name}.',
        "Nobody in {place} remembered who had brought {subject}, but",
        "When I was young, my mother told me that {subject}",
    ),
    "essay": (
        "Why does {subject} matter? To begin with,",
        "It is often said that {subject} is overrated. However,",
        "There are three reasons to study {subject}. First,",
        "What I learned from {subject} in {place}:",
    ),
    "howto": (
        "How to prepare for {subject}\n\n1.",
        "Before you start with {subject}, make sure that",
        "Ingredients:\n- 2 cups of",
        "# A short guide to {subject}\n\n",
    ),
    "science": (
        "Abstract. We study {subject} using",
        "The results of the experiment on {subject} show that",
        "Let x be the number of",
        "Question: If {name} has {number} apples and gives away half of them,",
        "The chemical properties of",
    ),
    "code": (
        "def count_{word}(items):\n    ",
        "#include <stdio.h>\n\n",
        "import os\nimport sys\n\nclass {Word}:\n    ",
        "SELECT name, year FROM {word} WHERE",
    ),
}
REQUESTS = (
    "Tell me about {subject}.",
    "Explain {subject} to a child of ten.",
    "Write a short story in which {name} discovers {subject}.",
    "What are the advantages and drawbacks of {subject}?",
    "I am travelling to {place} next month. What should I see?",
    "Write an email in which {name} asks a colleague for help with {subject}.",
    "Summarize what happened in {place} in {year}.",
    "Write a Python function that returns the {number} largest numbers of a list.",
    "What is {number} times {number}, and how do you work it out?",
    "Make a list of ideas for a talk on {subject}.",
)


def opening(rng: random.Random) -> str:
    """A random beginning of a document; every kind is equally likely."""
    return _filled(rng.choice(KINDS[rng.choice(tuple(KINDS))]), rng)


def request(rng: random.Random) -> str:
    """A random request to an assistant."""
    return _filled(rng.choice(REQUESTS), rng)


def _filled(template: str, rng: random.Random) -> str:
    subject, name, place = rng.choice(SUBJECTS), rng.choice(NAMES), rng.choice(PLACES)
    word = subject.split()[-1]
    return template.format(
        subject=subject,
        Subject=subject[0].upper() + subject[1:],
        name=name,
        Name=name[0].upper() + name[1:],
        place=place,
        PLACE=place.upper(),
        word=word,
        Word=word.capitalize(),
        year=rng.randint(1780, 2015),
        number=rng.randint(3, 24),
    )
