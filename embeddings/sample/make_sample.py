"""Make the sample beside this file: NLI-like triplets, graded sentence pairs and a small search collection.

Every sentence is made up from a few hundred words of everyday life. Its meaning is an event: who did what to what, and
perhaps which one, whose, where, when and how. Each part has two to four wordings that share no word, and the event has
several structures (active, passive, clefts, two sentences), so that the same meaning comes in other words and another
meaning in nearly the same ones: what a positive has to say apart from the words is what a hard negative lacks.

    train.jsonl                anchor, positive (follows from it) and negative (contradicts it, or is another event)
    sts-dev.csv, sts-test.csv  pairs in STS-B's format, graded by the share of the meaning that the two have in common
    beir/                      documents, questions and relevance in BEIR's format

No event of a pair or of the search collection stands in train.jsonl. base_corpus() makes texts of the same world, none
of whose sentences stands in the sample: from them a tiny language model learns its words before it sees any triplet.

    python embeddings/sample/make_sample.py

writes the files next to this one, the same bytes every time.
"""

import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SEED = 11
TRIPLETS, PAIRS, DOCUMENTS, QUERIES = 2_200, 250, 200, 40
REPEATED = 100  # anchors that come a second time, as premises of NLI do
CORPUS_TEXTS = 24_000

# A line is a value of the part: its wordings, or two values that are opposites, with = between.
# A verb is past/base[/participle].
WORLD = """
# agent
child|kid|youngster
doctor|physician|medic
teacher|schoolmaster|instructor
officer|policeman|cop
cook|chef
lawyer|attorney|solicitor
sailor|seaman|mariner
woman|lady
soldier|trooper|fighter
tourist|sightseer|holidaymaker
shopkeeper|merchant|trader
writer|author|novelist
# action
bought/buy|purchased/purchase|paid for/pay for = sold/sell|got rid of/get rid of|auctioned/auction
found/find|discovered/discover|tracked down/track down = lost/lose|misplaced/misplace|mislaid/mislay
repaired/repair|fixed/fix|mended/mend = broke/break/broken|damaged/damage|wrecked/wreck
hid/hide/hidden|concealed/conceal|covered up/cover up = showed/show/shown|displayed/display|exhibited/exhibit
lifted/lift|picked up/pick up|raised/raise = dropped/drop|let go of/let go of|put down/put down
loved/love|admired/admire|adored/adore = hated/hate|detested/detest|despised/despise
stole/steal/stolen|made off with/make off with|snatched/snatch = returned/return|gave back/give back/given back
pulled/pull|dragged/drag|hauled/haul = pushed/push|shoved/shove
# object
bicycle|bike|two-wheeler
car|automobile|motor
picture|painting|canvas
sofa|couch|settee
phone|mobile|handset
coat|jacket|anorak
lamp|lantern|light
book|volume|paperback
jewel|gemstone|precious stone
boat|dinghy|small ship
stove|oven|cooker
violin|fiddle
box|crate|chest
computer|laptop
# which
large|big|huge = tiny|little|very small
ancient|worn|very old = brand-new|modern|recent
expensive|costly|dear = cheap|low-priced
beautiful|pretty|lovely = ugly|hideous
red|scarlet|crimson
blue|azure
# where
at home|in the living room|inside the house
on the beach|at the seaside|along the shore
in the woods|in the forest|among the trees
downtown|in the city centre|in the middle of town
at the station|on the train platform
in the mountains|high up in the hills
at school|in the classroom
at the market|in the bazaar|between the stalls
at the hospital|in the clinic
# when
at dawn|early in the morning|at sunrise = around midnight|late at night|in the small hours
in summer|during the hot months = in winter|when there was snow|in the cold season
long ago|many years back|in the distant past = last week|just recently|a few days ago
at noon|at midday
# how
quickly|in a hurry|at great speed = slowly|without haste
happily|with a smile|cheerfully = sadly|in tears|full of grief
alone|without any help|single-handed = together with friends|in a group
quietly|without a sound|silently = noisily|with a loud bang
"""
WEIGHTS = {"action": 2.0, "agent": 1.0, "object": 1.0}  # of a part in the grade of a pair
WEIGHTS |= dict.fromkeys(("which", "whose", "where", "when", "how"), 0.5)
CORE, EXTRAS = list(WEIGHTS)[:3], list(WEIGHTS)[3:]
FRAMES = ["They say that", "I heard that", "We were told that", "According to the paper,", "As everyone knows,"]
STRUCTURES = ["active", "front", "passive", "passive front", "who", "that", "two"]
NEGATIONS = ["did not", "never", "failed to"]
LINKS = ["In other words,", "That is,", "To say it again,", "Put differently,"]

Meaning = dict[str, str]  # part -> the first wording of its value; "not": "" or "not"


class Text(NamedTuple):
    """A sentence or two, with what was chosen to say it."""

    text: str
    meaning: Meaning
    words: dict[str, str]


def read_world(text: str) -> tuple[dict[str, dict[str, list[str]]], dict[str, str]]:
    """The wordings of each part's values, and the opposite of each value that has one."""
    wordings, opposites = {}, {}
    for line in text.strip().splitlines():
        if line.startswith("# "):
            wordings[line[2:]] = part = {}
            continue
        values = [value.split("|") for value in line.split(" = ")]
        part.update((value[0], value) for value in values)
        if len(values) == 2:
            opposites |= {values[0][0]: values[1][0], values[1][0]: values[0][0]}
    return wordings | {"whose": wordings["agent"]}, opposites


WORDINGS, OPPOSITES = read_world(WORLD)


def draw_meaning(rng: random.Random, extras: int) -> Meaning:
    """An event with so many of its optional parts."""
    parts = CORE + rng.sample(EXTRAS, extras)
    meaning = {part: rng.choice(list(WORDINGS[part])) for part in parts}
    if "whose" in meaning:
        meaning["whose"] = rng.choice([value for value in WORDINGS["agent"] if value != meaning["agent"]])
    return meaning | {"not": "not" if rng.random() < 0.12 else ""}


def change(rng: random.Random, meaning: Meaning, part: str) -> Meaning:
    """The meaning with another value of a part: the opposite, the denial or anything else; whose: the two swapped."""
    if part == "whose" and rng.random() < 0.6:
        return meaning | {"agent": meaning["whose"], "whose": meaning["agent"]}
    if part == "action" and rng.random() < 0.3:
        return meaning | {"not": "" if meaning["not"] else "not"}
    value = meaning[part]
    if value in OPPOSITES and rng.random() < 0.7:
        return meaning | {part: OPPOSITES[value]}
    taken = {meaning.get("agent"), meaning.get("whose")} if part in ("agent", "whose") else {value}
    return meaning | {part: rng.choice([other for other in WORDINGS[part] if other not in taken])}


def grade(one: Meaning, other: Meaning) -> float:
    """From 0 to 5: the share of the parts, by weight, in which both agree. One that only one of them names counts half.

    An event and its denial do not agree in the action.
    """
    shared = total = 0.0
    for part, weight in WEIGHTS.items():
        if part in one and part in other:
            same = one[part] == other[part] and (part != "action" or one["not"] == other["not"])
            shared, total = shared + weight * same, total + weight
        elif part in one or part in other:
            total += weight / 2
    return 5 * shared / total


def core(meaning: Meaning) -> tuple[str, ...]:
    return tuple(meaning[part] for part in CORE)


def forms(verb: str) -> tuple[str, str, str]:
    """Past tense, base form and participle."""
    past, base, *participle = verb.split("/")
    return past, base, (participle or [past])[0]


def noun_phrase(words: dict[str, str]) -> str:
    """The object with its attribute and its owner."""
    noun = f"{words['which']} {words['object']}" if "which" in words else words["object"]
    if "whose" not in words:
        return f"{words['a']} {noun}"
    return words["owner"].format(words["whose"], noun)


def clause(words: dict[str, str]) -> str:
    """The event without its circumstances."""
    past, base, participle = forms(words["action"])
    agent, thing, denial = f"{words['the']} {words['agent']}", noun_phrase(words), words["not"]
    structure = words["structure"].split()[0]
    if denial:
        past = f"never {past}" if denial == "never" else f"{denial} {base}"
    if structure == "passive":
        was = {"": "was", "never": "was never"}.get(denial, "was not")
        return f"{thing} {was} {participle} by {agent}"
    if structure == "who":
        return f"it was {agent} who {past} {thing}"
    if structure == "that":
        return f"it was {thing} that {agent} {past}"
    return f"{agent} {past} {thing}"


def finish(text: str) -> str:
    """With the right article and a capital letter."""
    text = re.sub(r"\b(a|A) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


def say(rng: random.Random, meaning: Meaning, like: Text | None = None, same: float = 0.0) -> Text:
    """The meaning in words; `same` is the chance of each of like's choices to be kept where it still fits.

    The others are made anew, and in another way than there.
    """
    words = {}
    options = {part: WORDINGS[part][value] for part, value in meaning.items() if part in WORDINGS}
    options |= {"structure": STRUCTURES, "frame": ["", *FRAMES], "not": NEGATIONS if meaning["not"] else [""]}
    options |= {"the": ["a", "the"], "a": ["a", "the"]}
    options |= {"owner": ["the {}'s {}", "the {1} of the {0}", "the {1} that belonged to the {0}"]}
    circumstances = [part for part in ("where", "when", "how") if part in meaning]
    options["order"] = [" ".join(circumstances), " ".join(circumstances[::-1])]
    for name, choices in options.items():
        before = like.words.get(name) if like else None
        if before in choices and rng.random() < same:
            words[name] = before
        else:
            words[name] = rng.choice([choice for choice in choices if choice != before] or choices)
    if rng.random() < 0.5 and not (like and same):
        words["frame"] = ""
    parts = [words[part] for part in words["order"].split()]
    text = clause(words)
    if words["structure"].endswith("front") and parts:
        text = f"{parts[0]}, {text}"
        parts = parts[1:]
    if words["structure"] == "two" and parts and not meaning["not"]:
        text += ". This happened"
    text = " ".join([words["frame"], text, *parts]).strip()
    return Text(finish(text) + ".", meaning, words)


def pairs(rng: random.Random) -> Iterator[tuple[Text, Text]]:
    """Pairs with every number of differing parts equally often; those that mean the same share the fewest words."""
    while True:
        meaning = draw_meaning(rng, rng.choice((1, 2, 2, 3)))
        parts = [part for part in meaning if part in WEIGHTS]
        other = dict(meaning)
        differing = rng.sample(parts, rng.randint(0, len(parts)))
        if rng.random() < 0.25:  # another event in the same circumstances
            differing = CORE
        for part in differing:
            other = change(rng, other, part)
        if not differing or rng.random() < 0.3:  # one of the two leaves something out
            dropped = rng.choice([part for part in parts if part in EXTRAS])
            if differing or rng.random() < 0.5:
                other.pop(dropped)
        first = say(rng, meaning)
        second = say(rng, other, first, same=0.2 if grade(meaning, other) > 4.5 else 0.35)
        if rng.random() < 0.5:
            first, second = second, first
        yield first, second


def triplet(rng: random.Random, anchor: Text) -> tuple[Text, Text]:
    """A text that follows from the anchor, in other words, and one that does not, in mostly the same words."""
    meaning = anchor.meaning
    extras = [part for part in meaning if part in EXTRAS]
    dropped = {part for part in extras if rng.random() < 0.3}
    positive = say(rng, {part: value for part, value in meaning.items() if part not in dropped}, anchor, same=0.1)
    parts = [part for part in meaning if part in WEIGHTS]
    count = rng.choice((1, 1, 1, 2, 2, 3))
    changed = rng.sample(parts, count, counts=[4 if part in CORE else 1 for part in parts])
    other = meaning
    for part in dict.fromkeys(changed):
        other = change(rng, other, part)
    return positive, say(rng, other, anchor, same=0.85)


def ask(text: Text) -> str:
    """The text's event as a question."""
    words = text.words
    parts = [words[part] for part in words["order"].split()]
    _, base, _ = forms(words["action"])
    return finish(" ".join(["did", words["the"], words["agent"], base, noun_phrase(words), *parts])) + "?"


def make_pairs(rng: random.Random, taken: set[str], held_out: set[tuple], year: str) -> list[list[str]]:
    """Rows of an STS file, whose grades cover 0 to 5 evenly."""
    rows, bins = [], [0] * 6
    for first, second in pairs(rng):
        score = grade(first.meaning, second.meaning)
        texts = {first.text, second.text}
        bin_ = min(5, int(score + 0.5))
        if len(texts) == 2 and not texts & taken and bins[bin_] <= PAIRS // 6:
            bins[bin_] += 1
            taken |= texts
            held_out |= {core(first.meaning), core(second.meaning)}
            number = f"{len(rows) + 1:04d}"
            rows.append(["main-everyday", "made-up", year, number, f"{score:.3f}", first.text, second.text])
        if len(rows) == PAIRS:
            return rows


def make_search(rng: random.Random, taken: set[str], held_out: set[tuple]) -> tuple[list, list, list]:
    """Documents, questions and relevance: 2 for the same event, 1 for the same action and object by someone else."""
    notes = ["More on page two.", "Nobody knows why.", "A neighbour told us.", "The weather was fine.", "That is all."]
    questions, texts = [], []
    while len(questions) < QUERIES:
        question = say(rng, draw_meaning(rng, 1) | {"not": ""})
        if core(question.meaning)[::2] in {core(other.meaning)[::2] for other in questions}:
            continue
        questions.append(question)
        for changed in [[]] * rng.choice((1, 1, 2)) + [["agent"]] * rng.randint(0, 2) + [["action"], ["object"]]:
            meaning = {part: value for part, value in question.meaning.items() if part not in EXTRAS}
            meaning = draw_meaning(rng, 2) | meaning
            meaning.pop("whose", None)
            for part in changed:
                meaning = change(rng, meaning, part)
            texts.append(say(rng, meaning, question, same=0.8 if changed in (["action"], ["object"]) else 0.1))
    while len(texts) < DOCUMENTS:
        texts.append(say(rng, draw_meaning(rng, 2)))
    rng.shuffle(texts)
    documents, relevance = [], [("query-id", "corpus-id", "score")]
    for number, text in enumerate(texts, 1):
        title = f"{text.words['object']} {'not ' * bool(text.meaning['not'])}{forms(text.words['action'])[2]}"
        note = f" {rng.choice(notes)}" if rng.random() < 0.5 else ""
        documents.append({"_id": f"d{number}", "title": finish(title), "text": text.text + note})
    for number, question in enumerate(questions, 1):
        for other, text in enumerate(texts, 1):
            if all(text.meaning[part] == question.meaning[part] for part in ("action", "object", "not")):
                relevance.append((f"q{number}", f"d{other}", 1 + (text.meaning["agent"] == question.meaning["agent"])))
    taken |= {text.text for text in texts}
    held_out |= {core(text.meaning) for text in texts + questions}
    asked = [{"_id": f"q{number}", "text": ask(question)} for number, question in enumerate(questions, 1)]
    return documents, asked, relevance


def make_triplets(rng: random.Random, taken: set[str], held_out: set[tuple]) -> list[dict[str, str]]:
    """Rows of train.jsonl, without the events that are held out."""
    rows, anchors = [], []
    while len(rows) < TRIPLETS:
        again = len(rows) >= TRIPLETS - REPEATED
        anchor = say(rng, draw_meaning(rng, rng.choice((0, 1, 1, 2, 2, 3))))
        if again:
            anchor = anchors[len(rows) - TRIPLETS + REPEATED]
        texts = (anchor, *triplet(rng, anchor))
        new = {text.text for text in texts[again:]}
        if len(new) < 3 - again or new & taken or any(core(text.meaning) in held_out for text in texts):
            continue
        taken |= new
        anchors.append(anchor)
        rows.append(dict(zip(("anchor", "positive", "negative"), (text.text for text in texts))))
    rng.shuffle(rows)
    return rows


@functools.cache
def make_rows() -> tuple[dict[str, list], frozenset[str]]:
    """The rows of each file, and the texts that stand in them."""
    rng = random.Random(SEED)
    taken: set[str] = set()
    held_out: set[tuple] = set()
    splits = (("sts-dev.csv", "2025"), ("sts-test.csv", "2026"))
    rows = {name: make_pairs(rng, taken, held_out, year) for name, year in splits}
    names = ("beir/corpus.jsonl", "beir/queries.jsonl", "beir/qrels/test.tsv")
    rows |= zip(names, make_search(rng, taken, held_out))
    rows["train.jsonl"] = make_triplets(rng, taken, held_out)
    return rows, frozenset(taken)


def first_sentence(text: str) -> str:
    """The text without a second sentence, which says only where, when and how."""
    return text.split(". This happened")[0].removesuffix(".")


def entry(rng: random.Random) -> str:
    """The wordings of a value as a thesaurus lists them, with those of its opposite."""
    part = rng.choice(list(WORDINGS))
    value = rng.choice(list(WORDINGS[part]))
    form = rng.randrange(3)
    lists = []
    for one in (value, OPPOSITES.get(value)):
        if one:
            words = [forms(word)[form] if part == "action" else word for word in WORDINGS[part][one]]
            lists.append(", ".join(rng.sample(words, len(words))))
    return finish("; not ".join(lists)) + "."


def base_corpus(size: int = CORPUS_TEXTS) -> list[str]:
    """Texts for a first training: an event said twice in other words, asked and confirmed, or before another one, and
    entries of a thesaurus."""
    rng = random.Random(SEED + 1)
    taken = {first_sentence(text) for text in make_rows()[1]}
    texts = []
    while len(texts) < size:
        kind = rng.choice(("thesaurus", "again", "again", "question", "other"))
        if kind == "thesaurus":
            texts.append(" ".join(entry(rng) for _ in range(3)))
            continue
        first = say(rng, draw_meaning(rng, rng.choice((0, 0, 1, 1, 2))))
        second = say(rng, draw_meaning(rng, 1)) if kind == "other" else say(rng, first.meaning, first)
        if {first_sentence(first.text), first_sentence(second.text)} & taken:
            continue
        again = second.text if second.text.startswith("I ") else second.text[0].lower() + second.text[1:]
        if kind == "other":
            texts.append(f"{first.text} {second.text}")
        elif kind == "question" and not first.meaning["not"]:
            texts.append(f"{ask(first)} Yes, {again}")
        else:
            texts.append(f"{first.text} {rng.choice(LINKS)} {again}")
    return texts


def main(folder: Path = HERE) -> None:
    for name, rows in make_rows()[0].items():
        if name.endswith(".jsonl"):
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        else:
            lines = ["\t".join(map(str, row)) for row in rows]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
