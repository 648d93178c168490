"""Make the sample beside this file: made-up posts and the sentences an expert marked in them, in the format of ReDSM5.

Every sentence is original and about nobody. A post mixes everyday sentences with evidence for a criterion of a major
depressive episode (status 1) and with near misses that an expert would reject (status 0: over now, someone else's, a
plain cause); SPECIAL_CASE marks what is none of the nine criteria. The real files' awkward cases occur as well: TRAPS
below lists them.

    python evidence_spans/sample/make_sample.py

writes redsm5_posts.csv and redsm5_annotations.csv next to this file, the same bytes every time.
"""

import csv
import itertools
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 11
POSTS_BY_SHOWN = (149, 238, 148, 59)  # posts that show 0, 1, 2 and 3 criteria, without the copied ones
AUTHORS_BY_POSTS = {2: 40, 3: 20}  # authors of several posts; all others wrote one
TWO_SENTENCES = 57  # (post, criterion) pairs with two evidence sentences
NEAR_MISSES, BESIDE = 120, 26  # posts with a near miss; in the latter it stands beside evidence for the same criterion
SPECIAL = 12  # posts with a SPECIAL_CASE sentence
PARAGRAPH_SHARE = 0.15  # posts with a blank line

# What a reader of the real files stumbles over, with the number of posts; each concerns the post's one evidence row.
TRAPS = {
    "other case": 7,  # the annotation is all lower case, the post is not
    "dotted": 3,  # the same, and an "İ" stands before: its lower case has length 2, so offsets in text.lower() shift
    "other space": 10,  # a line break or two spaces inside the sentence, where the annotation has one space
    "absent": 4,  # the annotated sentence is not in the post, which says it in other words
    "same sentence": 2,  # the sentence stands twice in the post and is annotated once
    "same row": 2,  # the annotation row comes twice
}
TWO_CRITERIA = 5  # one sentence is annotated for two criteria, so here it is two rows a post
COPIED = 6  # the post and its rows come again under another author
LONG_POST, LONG_POST_EVIDENCE = 60, 54  # sentences of the one very long post, and the number of its evidence
# and two posts are a single sentence: one is evidence, the other is not

# By topic; [a|b|c] is a choice. + shows the topic, - is a near miss, = names the topic in explanations.
WORDINGS = """
# DEPRESSED_MOOD
= low mood
+ [Since March|For many weeks|All this autumn] I have been [sad|miserable|gloomy|tearful] without a reason.
+ I start each day [sad|tearful|unhappy], and the sadness stays [for hours|until evening|with me|week after week].
+ [On the train|In the kitchen|At the sink|At my desk] I suddenly [weep|burst into tears|start to weep] again.
+ My mood has been [dark|bleak|gloomy] [since March|all this autumn|for two months|for many weeks], and I see no hope.
+ I feel so [hopeless|bleak|unhappy] that even [good news|sunshine|a kind letter] leaves me [sad|tearful].
+ Why am I so [unhappy|sad|miserable|gloomy], when [my life is fine|nothing bad happened|others are cheerful]?
+ A [dark|black] cloud of [sadness|sorrow|despair] [hangs over me|sits on my chest|covers everything].
- I was sad on [Tuesday|Friday] because [our goldfish died|my team lost|the film ended badly], but it passed.
- My [aunt|neighbour|cousin] is often [tearful|gloomy|unhappy] in the evening, while I feel cheerful.
- Two years ago I was [miserable|hopeless|gloomy] for months, but my mood is [bright|good] again.
# ANHEDONIA
= a loss of interest
+ I used to love [painting|chess|hiking|dancing], but now it [bores me|means nothing to me|gives me no pleasure].
+ Nothing [interests|excites|delights] me any longer, not even [concerts|my hobbies|a new novel|hiking].
+ [Chess|Dancing|The choir|My guitar] no longer brings me any [joy|pleasure|delight].
+ I have lost interest in [my friends|my hobbies|chess|films] and [decline|avoid|refuse] all invitations.
+ My [guitar|camera|paintbox|football] gathers dust, because I don't [enjoy|like|care about] it any more.
+ Even my favourite [songs|games|hobbies|jokes] feel [dull|flat|pointless] to me now.
+ I [pretend|try|only pretend] to have fun at [parties|concerts|weddings|games], but I enjoy nothing.
- I found the [concert|novel|film|game] dull, but I still love my [hobbies|guitar].
- My [cousin|neighbour|uncle] lost interest in [chess|football|the choir], so I play alone now.
- I stopped [hiking|dancing|painting] for a month because of [exams|a cold], and miss the fun.
# APPETITE_CHANGE
= a change of appetite or weight
+ I [hardly touch|leave|push away] my [dinner|lunch|breakfast|plate], because I have no appetite.
+ Food [tastes like paper|disgusts me|has no taste], so I eat [almost nothing|a few bites|one cracker|too little] a day.
+ I have lost [five|six|eight|ten] kilos [since March|in two months|this autumn] without dieting.
+ I stuff myself with [biscuits|crisps|chocolate|bread] [every night|all evening|for hours], even when I am full.
+ My [trousers|jeans|clothes|shirts] [hang loose|are too tight|no longer fit], my weight changed so quickly.
+ Since [March|autumn|the move|last winter] I have been [hungry all the time|never hungry|eating twice as much].
+ I [skip|forget|can't face] [meals|lunch|dinner|breakfast] nearly every day, my hunger has vanished.
- I skipped [lunch|breakfast] on [Monday|Friday] because the [meeting|train] was late, and ate well later.
- My [aunt|uncle|cousin] eats very little and lost [six|ten] kilos, but my appetite is fine.
- I ate too much [chocolate|bread|cake] at the [wedding|market], and it tasted wonderful!
# SLEEP_ISSUES
= trouble with sleep
+ [Until two|Until four|Until dawn] I toss and turn in bed, [almost every night|on most nights|without any sleep|again].
+ It takes me [two|three|four] hours to doze off, [even with ear plugs|whatever I try|night after night|again].
+ At [two|three|four|five] in the night I am wide awake, and sleep [won't return|doesn't come back|is over].
+ I oversleep [every day|all the time|again and again] and stay asleep for [eleven|twelve|thirteen|fourteen] hours.
+ My nights are [sleepless|broken|wakeful], I [nap|doze] for only [an hour|two hours] at a time.
+ [Herbal tea|Warm milk|Ear plugs|Counting sheep] can't help, my insomnia [stays|gets worse|is back every night].
+ Why can't I sleep through [one night|a single night|any night], [like others do|even in silence|just once|ever]?
- The [storm|neighbours|baby next door] kept me awake on [Saturday|Tuesday], otherwise I sleep soundly.
- My [uncle|neighbour|aunt] has insomnia and [dozes at noon|naps at noon], but I sleep like a stone.
- As a student I slept badly before exams, but [now my nights are calm|that ended years ago].
# PSYCHOMOTOR
= being agitated or slowed
+ My [wife|teacher|colleague|doctor] noticed that I [move|speak|walk] in slow motion now.
+ I fidget [constantly|without a break|all through meals], my [fingers|knees|legs|feet] never keep still.
+ I pace around the [table|yard|corridor|office] [all evening|for hours|again and again], quite agitated.
+ My steps have become so slow that [children|old people|my parents|all others] [overtake|pass|outrun] me.
+ "[Please keep still|Stop fidgeting|Stop pacing]," my [wife|colleague|teacher|boss] says [all day|again and again].
+ My [speech|voice|talking] has slowed down, [a short answer|one reply|a greeting|a simple word] takes me ages.
+ I keep [tapping|rubbing|twisting|shaking] my [fingers|hands|feet] so much that others stare.
- I walked slowly on [Sunday|Wednesday], because my [knees|feet] hurt after the [race|hike].
- My [nephew|dog|little cousin] never keeps still and fidgets [all through meals|all evening].
- I paced the corridor before my [exam|interview], afterwards I was [calm|relaxed] and sat still.
# FATIGUE
= fatigue
+ I am [exhausted|weary|drained] after [a shower|ten stairs|one errand|folding shirts], as if I had run a race.
+ My [arms|legs|limbs] feel like lead, and I have no energy for [chores|cooking|anything|errands].
+ I am so [tired|weary|worn out] that [brushing my teeth|folding shirts|a shower|one errand] costs all my strength.
+ However much I rest, [I stay tired|my energy is gone|my strength is gone], [day after day|all week|again|every day].
+ [Every chore|Each errand|The laundry|Washing up] [drains|exhausts|tires] me, so I rest on the sofa all afternoon.
+ I have been [tired|weary|exhausted|worn out] [since March|for weeks|all autumn], without energy for chores.
+ By [noon|midday|ten] my strength is [gone|used up|spent], and I [can hardly stand|must lie down].
- I was tired after the [hike|race|long drive] on [Sunday|Saturday], but fresh again on Monday.
- My [wife|nephew|uncle] is exhausted from [night shifts|the new baby], I have energy to spare.
- The flu left me [weary|drained|worn out] in spring, but my strength came back.
# WORTHLESSNESS
= feeling worthless or guilty
+ I am a [failure|loser|disgrace] as a [son|parent|friend|colleague], and I let everyone down.
+ I feel guilty about [everything|every mistake|the smallest things], even [years later|now|on good days|in my dreams].
+ I [despise|dislike|am ashamed of] myself, I have [no worth|no value|nothing to give|no talent].
+ It is all my fault, I [ruin|spoil|wreck] every [party|friendship|project|family visit].
+ My [family|boss|team|wife] deserves someone better than [worthless me|useless me|a failure like me].
+ I keep apologising for [being me|old mistakes|taking up space], because I feel so [worthless|guilty|inferior|useless].
+ Compared with [others|my colleagues|my brother|my friends] I am [worthless|useless|inferior], and I am ashamed.
- I felt guilty on [Friday|Thursday] because I [broke a cup|forgot a birthday], but my sister laughed.
- My old [laptop|radio|umbrella] is useless, so I deserve a better one!
- As a [child|teenager] I felt like a [failure|loser], today I am proud of myself.
# COGNITIVE_ISSUES
= trouble thinking or concentrating
+ I can't focus on [a recipe|an email|one paragraph|the news] for more than [a minute|two minutes|a moment].
+ My [mind|memory|brain] goes blank whenever I [must decide|try to think|plan something|have to choose].
+ I forget [names|dates|passwords|appointments] [within a minute|all the time|again and again], my memory fails me.
+ Choosing between [tea and juice|two shirts|two shops] is [hard|impossible|a struggle|beyond me], I am so indecisive.
+ I reread every [paragraph|email|sentence|recipe] [five|six|four] times, because my attention drifts away.
+ My thinking is [muddled|foggy|clouded], so I make [silly|careless] mistakes in [every sum|simple sums|emails].
+ I lose track of [conversations|the plot|every story] because I can't [concentrate|think straight|pay attention|focus].
- I forgot [a password|the date|a name] on [Monday|Wednesday], but remembered it within a minute.
- I could not focus this morning because of the [drill|builders|loud radio] outside.
- My [grandmother|uncle] forgets names and dates, while my own memory is [sharp|reliable].
# SUICIDAL_THOUGHTS
= thoughts of death
+ I often think that [everyone|my family|the world] would be [better off|happier|relieved|lighter] without me.
+ [Some mornings|At times|Many evenings|Often] I wish I had never [been born|existed|come into the world].
+ I [imagine|picture|think about] my own [funeral|death] [on many evenings|quite often|more and more].
+ [Life|Living|Being alive|This life] is not worth it, and I [would rather be dead|think of death|wish it would end].
+ I wish I could [vanish|disappear|be gone] [for good|for ever|and never return|from this world].
+ Would anyone [miss|mourn|remember] me if I [were dead|died|no longer lived|were gone for ever]?
+ I [told my doctor|told my sister|admitted] that I have thoughts of [dying|death|not living on|ending my life].
- The [novel|film|play] was about [life and death|a funeral] in old Rome, and I liked it.
- I nearly died of [laughter|boredom] at the [wedding|meeting] on [Friday|Thursday].
- Years ago I wished I was dead, but [today I love being alive|those thoughts are gone now].
# SPECIAL_CASE
= something outside the nine criteria
+ My heart hammers and I [sweat|tremble] [in crowded shops|on full buses|in every lift].
+ I count all the [windows|stairs|tiles] [four|six] times before I can go out.
+ I worry about [bills|germs|burglars] from Monday to Sunday.
# FILLER
+ My [sister|brother|cousin] works in a [bakery|museum|bank] near the [harbour|station|cathedral].
+ On [Monday|Tuesday|Wednesday|Thursday] I have a meeting with my [boss|teacher|landlord].
+ We moved from [London|Berlin|Toronto] to [Dublin|Lisbon|Oslo] last [spring|summer|year].
+ The [bus|train|tram] to [Dublin|work|town] was late again, as usual.
+ My neighbour asked, "[Is the lift broken again|Have you seen my cat|When does the library open]?"
+ Hello everyone, this is my [first|second|third] post in this [group|forum]!
+ "[See you on Monday|Call me back soon|The door is open]," my [landlord|cousin|brother] wrote.
+ Our flat has a [tiny|sunny|green] [balcony|kitchen|hall] and a view of the [river|harbour|park].
+ It [rained|snowed] all [morning|weekend|Wednesday], so the [park|street|market] was empty.
+ I bought [tulips|a lamp|a blue scarf|two plants] at the [market|station] on Saturday.
+ Our [dog's|cat's] name is [Rex|Oscar|Luna], after [an old king|my uncle's boat].
+ I study [law|history|physics] in my [first|second|third] year in [Leeds|Oslo|Berlin].
+ Does anyone here come from [Leeds|Lisbon|Toronto|Norway], by any chance?
+ The [landlord|plumber] will repair the [roof|heating|lift] [next week|on Thursday|in April].
+ My parents run a small [farm|shop|hotel] in [Wales|Norway|the hills].
+ We're painting the [hall|fence|balcony] [green|white|blue] next [weekend|month].
+ My [cat|dog] likes the [windowsill|carpet|garden] when the sun is out.
+ The [library|pool|bank] in our street closes at [six|eight|noon] on Friday.
+ My [laptop|phone|printer] needed a new [cable|battery|cover] on [Sunday|Tuesday|Friday].
+ I've lived in [Leeds|Wales|Lisbon] for [two|six|ten] years, in a [flat|house] by the [river|park].
+ Our [landlord|teacher] comes from [Norway|Toronto|Rome] and collects [stamps|maps|coins].
+ The new [bridge|cinema|school] in [town|Dublin|Leeds] opens [in April|on Saturday|next month]!
+ I take the [tram|bike|ferry] to [work|school|town] at [seven|eight|nine] o'clock.
+ My cousin's wedding is in [May|June|April], and the [band|hall] is already booked.
+ We planted [tomatoes|tulips|roses] behind the [house|garage|fence] in [May|April].
+ It's [cold|windy|warm] in [Leeds|Oslo|Dublin] today, typical for [April|May].
# DOTTED
+ A card from [İzmir|İstanbul] came on [Monday|Sunday], with greetings from my cousin.
# DEPRESSED_MOOD WORTHLESSNESS
+ I am sad and tearful all day, because I feel so worthless and guilty.
# SLEEP_ISSUES FATIGUE
+ I toss and turn in bed until dawn, exhausted and without any energy.
# ANHEDONIA APPETITE_CHANGE
+ I have no appetite for any food, and no interest in my hobbies either.
# FATIGUE COGNITIVE_ISSUES
+ I am too exhausted to concentrate, without energy, and my mind goes blank.
# WORTHLESSNESS SUICIDAL_THOUGHTS
+ I feel like a worthless failure, and often wish I had never been born.
"""


@dataclass(frozen=True)
class Sentence:
    """A sentence as it stands in the post, its (topic, status) labels, and the text of its rows where that differs."""

    text: str
    labels: tuple[tuple[str, str], ...] = ()
    annotated: str = ""

    def shows(self) -> bool:
        return any(status == "1" and topic in CRITERIA for topic, status in self.labels)


Post = list[Sentence]


def read_wordings(text: str) -> dict[str, dict[str, list[str]]]:
    """The wordings by topic and mark."""
    topics = {}
    for line in text.strip().splitlines():
        mark, wording = line.split(" ", 1)
        if mark == "#":
            topics[wording] = topic = defaultdict(list)
        else:
            topic[mark].append(wording)
    return topics


TOPICS = read_wordings(WORDINGS)
CRITERIA = [topic for topic in TOPICS if "-" in TOPICS[topic]]
PAIRS = [topic for topic in TOPICS if " " in topic]  # the headings of sentences that show two criteria


def forms(wording: str) -> list[str]:
    """Every sentence that the wording stands for."""
    parts = re.split(r"\[([^]]*)\]", wording)  # plain text and choices by turns
    return ["".join(chosen) for chosen in itertools.product(*(part.split("|") for part in parts))]


def draw(rng: random.Random, used: Counter, topic: str, mark: str = "+", count: int = 1) -> list[Sentence]:
    """As many labelled sentences, each from another wording, in forms little used so far: few come in two posts."""
    wordings = rng.sample(TOPICS[topic][mark], count)
    texts = [min(forms(wording), key=lambda text: (used[text], rng.random())) for wording in wordings]
    used.update(texts)
    plain = topic in ("FILLER", "DOTTED")
    labels = () if plain else tuple((one, "1" if mark == "+" else "0") for one in topic.split())
    return [Sentence(text, labels) for text in texts]


def least_used(rng: random.Random, used: Counter, count: int, without: list[str] = ()) -> list[str]:
    """Criteria that came least often so far, so that all get about equal support."""
    allowed = [criterion for criterion in CRITERIA if criterion not in without]
    chosen = sorted(allowed, key=lambda criterion: (used[criterion], rng.random()))[:count]
    used.update(chosen)
    return chosen


def plain_posts(rng: random.Random) -> list[Post]:
    """The posts before any trap but two criteria in one sentence, one very long post and two single sentences."""
    used, used_near = Counter(), Counter()
    n_shown = [n for n, posts in enumerate(POSTS_BY_SHOWN) for _ in range(posts)]
    numbers = {n: [number for number, shown in enumerate(n_shown) if shown == n] for n in range(4)}
    long, evidence, other = numbers[1].pop(), numbers[1].pop(), numbers[0].pop()
    several = rng.sample(numbers[1] + numbers[2][TWO_CRITERIA:], TWO_SENTENCES)
    near = set(rng.sample(list(itertools.chain(*numbers.values())), NEAR_MISSES))
    beside = set(rng.sample(sorted(near - set(numbers[0])), BESIDE))
    special = rng.sample(numbers[0] + numbers[1], SPECIAL)
    pairs = dict(zip(numbers[2], PAIRS))
    posts = []
    for number, n in enumerate(n_shown):
        if number in pairs:
            shown = pairs[number].split()
            used.update(shown)
            marked = draw(rng, used, pairs[number])
        else:
            shown = least_used(rng, used, n)
            counts = [1 + (number in several and place == 0) for place in range(n)]
            drawn = [draw(rng, used, topic, "+", count) for topic, count in zip(shown, counts)]
            marked = list(itertools.chain(*drawn))
        if number in near:
            topics = [rng.choice(shown)] if number in beside else least_used(rng, used_near, 1, without=shown)
            marked += draw(rng, used, topics[0], "-")
        if number in special:
            marked += draw(rng, used, "SPECIAL_CASE")
        n_filler = rng.randint(max(1, 3 - len(marked)), 7 - len(marked))  # three to seven sentences in all
        post = marked + draw(rng, used, "FILLER", count=n_filler)
        rng.shuffle(post)
        posts.append(post)
    evidence_late = draw(rng, used, "COGNITIVE_ISSUES")
    everyday = [Sentence(form) for wording in TOPICS["FILLER"]["+"] for form in forms(wording)]
    posts[long] = rng.sample(everyday, LONG_POST - 1)
    posts[long][LONG_POST_EVIDENCE:LONG_POST_EVIDENCE] = evidence_late
    posts[evidence], posts[other] = draw(rng, used, "SLEEP_ISSUES"), draw(rng, used, "FILLER")
    return posts


def set_trap(rng: random.Random, trap: str, turn: int, post: Post) -> Post:
    """The post with the trap at its one evidence sentence; `turn` counts the posts of this trap."""
    number = next(number for number, sentence in enumerate(post) if sentence.shows())
    evidence, before, after = post[number], post[:number], post[number + 1 :]
    if trap == "same sentence":
        copy = [Sentence(evidence.text)]
        return copy + post if turn % 2 else post + copy
    if trap == "dotted":
        before = draw(rng, Counter(), "DOTTED") + before
    if trap in ("other case", "dotted"):
        evidence = replace(evidence, annotated=evidence.text.lower())
    if trap == "other space":
        words = evidence.text.split(" ")
        place = rng.randrange(1, len(words))
        text = " ".join(words[:place]) + ("\n", "  ")[turn % 2] + " ".join(words[place:])
        evidence = Sentence(text, evidence.labels, evidence.text)
    if trap == "absent":  # another form of the same wording
        wordings = map(forms, TOPICS[evidence.labels[0][0]]["+"])
        alike = next(texts for texts in wordings if evidence.text in texts)
        evidence = replace(evidence, annotated=rng.choice([text for text in alike if text != evidence.text]))
    if trap == "same row":
        evidence = replace(evidence, labels=evidence.labels * 2)
    return [*before, evidence, *after]


def make_posts(rng: random.Random) -> list[tuple[str, Post]]:
    """All posts with their texts, the copied ones last."""
    posts = plain_posts(rng)
    labels = [[label for sentence in post for label in sentence.labels] for post in posts]
    simple = [number for number, post in enumerate(posts) if 3 <= len(post) <= 6 and len(labels[number]) == 1]
    simple = [number for number in simple if any(sentence.shows() for sentence in posts[number])]
    rng.shuffle(simple)
    for trap, count in TRAPS.items():
        for turn in range(count):
            number = simple.pop()
            posts[number] = set_trap(rng, trap, turn, posts[number])
    joined = [(join(rng, post), post) for post in posts]
    return joined + [joined[number] for number in simple[:COPIED]]


def make_ids(rng: random.Random, n_posts: int) -> list[str]:
    """Ids `s_<n>_<k>`, those of authors with one post last, so that a copied post has another author."""
    sizes = [size for size, authors in AUTHORS_BY_POSTS.items() for _ in range(authors)]
    sizes += [1] * (n_posts - sum(sizes))
    authors = rng.sample(range(1, 2800), len(sizes))
    return [f"s_{author}_{k}" for author, size in zip(authors, sizes) for k in rng.sample(range(1, 41), size)]


def join(rng: random.Random, post: Post) -> str:
    """The text of the post, some with a blank line between two sentences."""
    gaps = [" "] * (len(post) - 1)
    if gaps and rng.random() < PARAGRAPH_SHARE:
        gaps[rng.randrange(len(gaps))] = "\n\n"
    return post[0].text + "".join(gap + sentence.text for gap, sentence in zip(gaps, post[1:]))


def annotate(post_id: str, post: Post) -> list[list[str]]:
    """The annotation rows of a post."""
    rows = []
    for number, sentence in enumerate(post):
        for topic, status in sentence.labels:
            about = TOPICS[topic]["="][0]
            why = f"The writer describes {about}." if status == "1" else f"This is no lasting sign of {about}."
            rows.append([post_id, f"{post_id}_{number}", sentence.annotated or sentence.text, topic, status, why])
    return rows


def write_rows(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def main(folder: Path = HERE) -> None:
    rng = random.Random(SEED)
    posts = make_posts(rng)
    numbered = list(zip(make_ids(rng, len(posts)), posts))
    rng.shuffle(numbered)
    rows = [row for post_id, (_, post) in numbered for row in annotate(post_id, post)]
    texts = {post_id: text for post_id, (text, _) in numbered}
    write_rows(folder / "redsm5_posts.csv", [["post_id", "text"], *map(list, texts.items())])
    header = ["post_id", "sentence_id", "sentence_text", "DSM5_symptom", "status", "explanation"]
    write_rows(folder / "redsm5_annotations.csv", [header, *rows])


if __name__ == "__main__":
    main()
