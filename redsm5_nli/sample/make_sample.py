"""Make the sample beside this file: made-up posts with annotations, in the format of ReDSM5.

Every sentence is original and about nobody. A post mixes everyday sentences with some that show a criterion of a major
depressive episode (status 1), near misses that an expert would reject (status 0: over, someone else's, a plain cause)
and SPECIAL_CASE sentences, which are none of the nine. As in the real files, texts hold commas, quotes and paragraph
breaks, a prefix `s_<n>_` may have several posts, a few texts come twice, one is very long and one a single sentence.

    python redsm5_nli/sample/make_sample.py

writes redsm5_posts.csv and redsm5_annotations.csv next to this file, the same bytes every time. base_corpus() makes
other texts of the same everyday words, which make_model.py trains the tiny decoder on.
"""

import csv
import functools
import itertools
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SEED = 5
POSTS_BY_SHOWN = (214, 322, 142, 36)  # how many posts show 0, 1, 2 and 3 criteria, without the repeated ones
REPEATED = slice(200, 206)  # the posts whose text comes twice
TWICE, BOTH = 40, 8  # posts with two sentences of a criterion, and with a sentence and a near miss of the same
PREFIXES_BY_POSTS = {2: 60, 3: 50, 1: 450}  # how many prefixes have so many posts
NEAR_MISS_SHARE = (0.6, 0.3)  # in posts that show nothing, and in the others
SPECIAL_SHARE = 0.12
LONG_POST_WORDS = 1500
EMOJI = "🙂🎉🐱☕"
CORPUS_TEXTS = 40_000

# Wordings by topic; [a|b|c] is a choice. The sample's: + shows the topic, - is a near miss, = names it in explanations.
# The corpus's: * shows the topic, ! does not although it speaks of it, ? describes it.
WORDINGS = """
# DEPRESSED_MOOD
= low mood
+ I have felt [sad|empty|hopeless] [for weeks|every day|for months] and [nothing cheers me up|it will not go away].
+ Most [days|mornings|evenings] I am close to tears [without knowing why|for no reason|over nothing].
+ Everything [looks|feels] [grey|dark|hopeless] to me [lately|these days|this month].
+ I [cry|end up crying|start crying] [on the bus|in the shower|at my desk|in the car] nearly every day.
+ There is a [heavy|deep|constant] sadness in me that [stays all day|will not lift|never leaves].
+ I feel so [low|down|empty] [all day|from morning to night] that [I could cry|nothing cheers me up].
- I [cried|was in tears] at [a film|a song|a wedding] [on Sunday|last night], but it felt good.
- I was sad for [an evening|a day] when [my team lost|the holiday ended], then it was over.
- Years ago I felt [hopeless|empty|low] every day, but [that is long over|I am well again now].
- My [sister|friend|brother] feels [sad|low|down] [most days|at the moment], I am [fine|well] myself.
* My mood has been [low|dark|down] since [spring|summer|winter] and I feel [hopeless|sad|empty].
* I [get up|go to bed] [sad|in tears|hopeless] [again and again|nearly every day].
* All I feel is [a heavy|a deep|constant] sadness, [on the bus|at work|at home].
* Tears come [every evening|most days|every morning] [for no reason|over nothing].
* Nothing can cheer me up, I am [sad|empty|low] all the time and could cry.
* For [weeks|months] I have been feeling [hopeless|close to tears|so down], all is [grey|dark].
! I am not [sad|hopeless|low], my mood is [good|fine] these days.
! Once I felt [sad|down|empty] after [a film|the match], it was over the next day.
? [Low mood|Sad mood]: [sad|depressed|feeling empty], hopeless or close to tears [nearly every day|most days].
# ANHEDONIA
= a loss of interest
+ [Painting|Football|Reading|Cooking] used to be my favourite thing, now [it bores me|I feel no joy|I do not care].
+ I have lost [all interest|all pleasure|all joy] in [my hobbies|music|seeing friends|cooking].
+ Nothing is fun any more, not even [my guitar|football|the garden|music].
+ For [weeks|months] I have not enjoyed [anything|a single thing] that I [used to love|used to enjoy].
+ I gave up [painting|gaming|running|seeing friends] because I [no longer enjoy it|no longer see the point].
+ My [hobbies|games|books] just lie there, I have no [interest|wish] to touch them [any more|these days].
- I was bored at the [meeting|lecture|match] [on Friday|yesterday], it was [a dull one|far too long].
- I never liked [football|gaming|painting], that is a hobby of my [sister|brother|friend].
- In [spring|winter] I lost interest in [painting|music|running] for a while, luckily the joy is back.
- I have no time for [gaming|football|my guitar] because [exams are close|work is busy], I still love it.
* [Music|Football|Gaming] gives me no [pleasure|joy] now, I [used to enjoy it|used to love it].
* I enjoy nothing [any more|these days], my [hobbies|games|books] no longer interest me.
* There is no [joy|pleasure|fun] left in [cooking|painting|running|seeing friends].
* My interest in [my hobbies|the garden|music] is gone, it all bores me.
* I do not care about [my favourite things|my hobbies|football] now, I see no point in them.
* Things that were fun [leave me cold|bore me], I hardly enjoy [a song|a game|anything].
! I still enjoy [my hobbies|music|football] and find pleasure in [painting|cooking].
! [Gaming|Reading] was dull [once|yesterday], but my interest in it is [back|as big as ever].
? [No joy|Lost interest]: [hardly any interest|a loss of pleasure], things once enjoyed are dull [now|these days].
# APPETITE_CHANGE
= a change of appetite or weight
+ I have [hardly|barely] eaten [for weeks|for days|this month], food [tastes of nothing|makes me feel sick].
+ My appetite is gone [lately|these days], I leave my [lunch|dinner|breakfast] untouched nearly every day.
+ I eat [far too much|all evening|without stopping] [these days|lately] although I am not hungry.
+ I have [lost|gained] a lot of weight [this month|since spring|lately] without [trying|wanting to].
+ My [clothes|trousers] no longer fit because [I cannot eat|I keep eating|my weight changed so fast].
+ [Every night|Every evening] I [empty the fridge|eat and eat], my [hunger|appetite] is out of control.
- I missed [lunch|breakfast] [yesterday|on Friday] because [the meeting ran late|I had to catch the bus].
- I ate too much [cake|pizza] at [the wedding|the party], it was [delicious|worth it].
- I am on a diet [for the summer|with my brother] and lost [a little|some] weight, just as planned.
- My appetite was gone when I had [the flu|a cold], [now I eat well again|it came back quickly].
* I am [never|hardly ever] hungry now and eat [less|far less] than usual.
* My weight [went up|went down] a lot [since winter|this summer], my clothes are [too tight|too big].
* I keep eating [cake|pizza|without stopping], much more than usual, [every evening|all day].
* Food makes me feel sick, I [barely eat|cannot eat] [lunch|dinner|breakfast].
* My appetite has changed [for weeks|for months], I [gained|lost] weight without a diet.
* I have no appetite, [lunch|dinner|food] tastes of nothing [these days|this month].
! I eat well, my [appetite|weight] is [as usual|fine].
! I ate [less|more] than usual on [Sunday|Friday] because of [a cold|the party].
? [Appetite|Eating]: [eating far more or less|more or less hungry] than usual, or a [change|clear change] of weight.
# SLEEP_ISSUES
= trouble with sleep
+ I lie awake [until three|half the night|until it gets light] [nearly every night|most nights|night after night].
+ I cannot fall asleep [any more|lately|these days], no matter how [early|late] I go to bed.
+ I wake up [again and again|five times|every hour] each night and cannot get back to sleep.
+ I sleep [twelve hours|all day|far too long] most days and [stay in bed until noon|still do not want to get up].
+ For [weeks|months] my sleep has been [broken|a mess|terrible], I get [three|four] hours a night.
+ Insomnia again, I [stare at the ceiling|count the hours|watch the clock] every night until [morning|the alarm rings].
- I slept badly on [Sunday|Friday] because of [the neighbours' party|the heat|the storm].
- I stayed up late [on Friday|last night] to [finish a book|watch the match|finish a game], it was worth it.
- I had trouble sleeping [as a child|years ago], but [that is long over|now I sleep well].
- [The cat|The dog|The storm] woke me up [once|twice] last night, otherwise I sleep [well|fine].
* I have trouble [falling asleep|staying asleep] [every night|most nights], I am awake for hours.
* My sleep is [a mess|broken|terrible], I wake up at [three|four] and lie there until [morning|the alarm rings].
* I cannot sleep, I [watch the clock|stare at the ceiling] night after night.
* Most days I am asleep until noon and sleep [again in the evening|far too much].
* Insomnia keeps me awake [half the night|until three] [for weeks now|for months now].
* I go to bed [early|late] and never [fall asleep|stay asleep] before it gets light.
! I sleep [well|fine] and fall asleep [early|quickly].
! I was awake until [three|four] on [Friday|Sunday] because of [the party|the heat].
? [Bad sleep|Sleeping]: awake at night with trouble falling or staying asleep, or [sleeping|asleep] far too much.
# PSYCHOMOTOR
= being restless or slowed
+ [My boss|My sister|Everyone] says that I [move|walk|talk] so slowly [lately|these days].
+ I [cannot sit still|pace up and down] [all day|all week|every evening], people [notice it|ask what is wrong].
+ My body is so slow [lately|these days] that [getting dressed|walking to the door|lifting a cup] takes minutes.
+ I [wring my hands|tap my feet] so much [lately|these days] that [my boss|my friend|everyone] noticed.
+ I speak so [slowly|quietly] now that [people finish my sentences|my mother asks if I am there].
+ I am so restless that I pace [the room|the kitchen|the office] for hours and [others|my friends] can see it.
- I walked slowly [on Sunday|yesterday] because [my knee hurt|the path was wet|of the heat].
- I could not sit still before the [match|exam|wedding], I was just [excited|happy].
- The [dog|cat] was restless [on Sunday|last night] and ran around the [kitchen|garden] because of the storm.
- The coffee made me restless [this morning|yesterday] for [an hour|a while], then it was over.
* I move and [talk|speak] slowly, others [notice it|can see it|ask what is wrong].
* I am restless [all day|every evening], I pace up and down and [wring my hands|tap my feet].
* Sitting still is impossible, I [walk around the room|get up again and again] for hours.
* My [hands|feet] never stop moving, [my boss|my mother|everyone] noticed.
* [Walking|Talking|Moving] is so slow now that people [wait for me|notice it].
* I walk so slowly [these days|lately] that my [friend|sister|brother] asks what is wrong.
! I can sit still [for hours|all evening] and I am not restless.
! I moved slowly [yesterday|on Friday] because [of the heat|my knee hurt].
? [Restless or slow|Moving]: slow [movement|talking], or moving so [slowly|restlessly] that others can see it.
# FATIGUE
= fatigue
+ I am [exhausted|worn out|drained] [every single day|all the time] even though I [do nothing|rest a lot].
+ I have had no energy [for weeks|for months], [a shower|doing the dishes|making tea] wears me out.
+ Even [a shower|one phone call|making tea] [exhausts me|drains me|takes all my strength] [these days|lately].
+ I drag myself through [the day|every shift|the week], there is no [strength|energy] left.
+ I feel tired [to the bone|from morning to night|as soon as I get up] [every day|nearly every day].
+ My energy is gone [lately|these days] and I have to rest after [every small task|a short walk|doing the dishes].
- I was tired after the [long run|match|long walk] [on Sunday|yesterday], in a good way.
- The week was busy and I was worn out on Friday, [one free day|a good rest] fixed it.
- My [mother|friend|brother] is always tired, I have [plenty of|enough] energy [myself|at the moment].
- Last [winter|year] I had no energy because of the flu, now [it is back|I am well again].
* I am so tired, every [small task|phone call|short walk] is exhausting.
* I have no [strength|energy] left for [the dishes|work|a shower], I am drained.
* [Fatigue|Being tired] is with me [from morning to night|nearly every day], rest does not help.
* Work [exhausts me|drains me|wears me out] [every day|all the time], I need to rest after an hour.
* I get up [tired|exhausted|worn out] and drag myself to [work|the kitchen|the bus].
* Making [tea|lunch|dinner] takes all my energy [these days|this month].
! I have [a lot of|plenty of|enough] energy and am hardly ever tired.
! I was [exhausted|tired] after the [match|exam] on [Friday|Sunday], a rest fixed it.
? [Tired|No energy]: [exhausted|tired] nearly every day, without [energy|strength], small tasks are [too much|hard].
# WORTHLESSNESS
= feeling worthless or guilty
+ I feel [worthless|useless|like a failure] [every day|all the time|lately].
+ I keep blaming myself for [everything|every small mistake|things that are not my fault].
+ I am a [burden|disappointment] to [my family|my friends|everyone] and deserve nothing good.
+ The guilt [never stops|follows me all day|stays all day], I [feel like a bad person|am ashamed of who I am].
+ I am not good enough for [anyone|anything|my friends], I have no [value|worth].
+ I hate myself [lately|more every day], everything I [do|say|touch] is [wrong|a failure].
- I felt guilty for [forgetting a birthday|missing a call] [yesterday|on Friday], I said sorry and it was fine.
- I used to feel [worthless|useless|like a failure], but [that is long over|I like myself now].
- My old [phone|umbrella|bike] is [useless|worthless], I need a new one.
- It was my fault that we [lost the match|missed the bus], we laughed about it.
* I am [worthless|useless], a failure and a burden to [my family|everyone].
* I blame myself [all the time|every day] for [every mistake|things that are not my fault].
* Guilt is with me [all day|from morning to night], I deserve nothing.
* I am ashamed of myself, [everyone|anyone] is worth more than me.
* I feel like a [burden|disappointment|bad person] and hate who I am.
* I have no worth, nothing I [do|say] is ever good enough.
! I [like myself|am good enough] and do not blame myself.
! I felt [guilty|useless] on [Friday|Sunday] for missing [a call|the bus], we laughed about it.
? [Worth|Guilt]: [feeling worthless|worthlessness], or blaming oneself for [everything|things] more than is fair.
# COGNITIVE_ISSUES
= trouble thinking or concentrating
+ I cannot concentrate [on anything|for five minutes|on my work] [any more|lately|these days].
+ My head is [full of fog|foggy] [every day|all day|these days] and I forget [everything|simple words|what I was doing].
+ I read the same [page|line|message] [again and again|ten times] and understand nothing.
+ I can't decide [anything|what to wear|what to eat], even simple choices [take hours|feel impossible].
+ I [lose the thread|forget what I wanted to say] in every [meeting|call|lecture] [lately|these days].
+ My thoughts are [so slow|such a mess] that I cannot [follow a film|think clearly|finish a simple task].
- I could not concentrate [yesterday|this morning] because of the [noise|heat|storm] outside.
- I forgot my [keys|umbrella|phone] [at home|on the bus] [yesterday|on Friday], it happens.
- I still have to decide between two [phones|good jobs|bikes], a nice problem to have.
- The [lecture|book|exam] was so hard that [nobody|no one in class] could follow it.
* I cannot think clearly, my head is [foggy|full of fog|a mess].
* It is hard to [decide|concentrate|think], even simple [choices|words] are impossible.
* I forget [everything|what I read|every call] and lose the thread.
* I concentrate for [five minutes|a minute], then my thoughts are gone.
* Making a decision [takes hours|is impossible], I can't decide what to [eat|wear|say].
* I read [a page|a message|a book] and cannot follow it, I have to read it [ten|five] times.
! I can concentrate for hours and [think clearly|decide quickly].
! I forgot [a call|a birthday|my keys] once, otherwise my head is [clear|fine].
? [Thinking|Focus]: finding it hard to [think clearly|make decisions], bad concentration, being unable to decide.
# SUICIDAL_THOUGHTS
= thoughts of death
+ Lately I keep thinking it would be easier [not to be here any more|not to wake up|to be gone].
+ [Some nights|Most nights|Every evening] I wish I [would not wake up|could disappear|were not alive].
+ I think about death [every day|all the time|again and again] and [it scares me|I have told nobody].
+ I do not want to [live|be alive] any more, the thought [comes back every day|is always there].
+ [My family|Everyone|The world] would be better off without me, that thought [keeps coming|comes every night].
+ I keep thinking about [not being here|my own death|not being alive] [lately|these days].
- A film about death made me think [last night|on Sunday], it was [well made|a good film].
- I nearly died laughing [at the party|at the wedding|when the cat fell off the sofa].
- Years ago I did not want to live, [today I am glad to be here|with help that is long over].
- We talked about death in [class|the lecture] [yesterday|on Friday], it was [just a topic|interesting].
* I wish to [disappear|be gone] and not to live, [every night|again and again].
* Thoughts of [death|ending my life] come back [every day|most nights|all the time].
* I often think that I would be better off [gone|not alive].
* It scares me how often I think of [death|my own death|not being here].
* The thought that [my family|everyone] would be better off without me is always there.
* I do not want to wake up [any more|again], it would be easier to be gone.
! I am glad to be alive and want to live [a long life|for a long time].
! We saw a film about [death|the end of a life] [yesterday|on Friday], it was interesting.
? [Death|Life and death]: wishing not to live, [thoughts|thinking] of death or of ending one's [own life|life].
# SPECIAL_CASE
= something outside the nine criteria
+ I had a panic attack [on the bus|at work|in the shop] [yesterday|last night|on Friday].
+ I feel numb, as if I were [a robot|behind glass|watching myself on a screen].
+ My heart [races|pounds] and my hands shake [before every meeting|when the phone rings|in a crowd].
+ I worry for hours about [money|my health|what others say] [before work|at home].
+ I check the [door|oven|window] [ten times|again and again] before I [leave|go out].
# NEUTRAL
+ My [manager|boss] gave me a new [project|shift|desk] [on Monday|this week].
+ The weather is [cold|warm|wet|windy] here [today|this week].
+ I am [a student|a nurse|a teacher] and live in a small [town|flat|house] near [the sea|the river|the station].
+ My [cat|dog] likes to lie on the [sofa|carpet|balcony] in the sun.
+ I moved to a new [town|flat|city] [in spring|last summer|two years ago] for [work|my studies].
+ I study [history|maths|biology] in my [first|second|third] year.
+ We have a [big|small|new] garden with [tomatoes|roses|apple trees].
+ My [sister|brother|mother] lives [two hours away|next door|in another city] and works in a [shop|school|bank].
+ My manager wrote, "[please call me|see you on Monday|the report is late]", so I [called|wrote] back [at noon|at once].
+ My [sister|mother] always says, "[take it slow|one step at a time]", so [I am writing this|here I am].
+ The sign on the door said, "[closed|back soon|no dogs]", and we went [home|to the park|to the other shop].
+ The subject of the mail was, "[team lunch|new rota|summer plans]", and [nobody|my boss|half the office] had read it.
+ I take the [train|bus|bike] to [work|school|the office] [at seven|at eight|every morning].
+ We had [soup|rice|pasta] for [lunch|dinner] [on Tuesday|on Thursday].
+ This is my first post here, [hello to everyone|so please be kind|I hope that is all right].
+ [My flatmate|My neighbour|My cousin] is learning to [play the piano|drive|bake bread].
+ I bought a [blue|red|green] [jacket|lamp|chair] in the [market|sale] [on Saturday|on Tuesday].
+ The [train|bus] was [ten minutes late|on time|full] again on [Monday|Tuesday].
+ My parents have [two dogs|a farm|a small shop] in [the north|the south|the hills].
+ I have [a test|a presentation|a meeting] [on Monday|next week|on Thursday] about [trees|history|the budget].
+ My [uncle|aunt|cousin] visited us on [Saturday|Thursday] with [a plant|flowers|old photos].
+ We are painting the [kitchen|hall|bathroom] [white|yellow|green] [this week|next week].
+ The [library|pool|gym] in our street is open [until nine|on Saturday|again].
+ My [laptop|computer] is [five|three|four] years old and has [a loud fan|a new screen].
+ I work in [a bakery|a library|an office|a hospital] [on Tuesday and Thursday|four days a week].
+ Our [team|class|band] meets on [Monday|Thursday] in the [old school|town hall|park].
+ It [rained|snowed] [all morning|on Saturday|all week] and the [street|park] was [white|wet|quiet].
+ I made a list of [books|films|plants] for [my cousin|my aunt|next week].
* The new [project|report|rota] starts [on Monday|next week].
* It is [cold|warm|windy] today and the [river|sea|park] is quiet.
* My [cat|dog] has a new place on the [sofa|carpet].
* I went to the [market|library|gym] on [Saturday|Tuesday|Thursday].
* I live with my [cousin|sister|brother] in a [flat|house] near the [station|school|bank].
* My [aunt|uncle] has a [bakery|farm|shop] in the [north|south].
* There is a [test|presentation] about [biology|maths] on [Monday|Thursday].
* We planted [tomatoes|roses|flowers] in the garden [in spring|on Saturday].
* The [bus|train] to [work|the city] takes [an hour|ten minutes].
* My [boss|teacher|mother] said, "[hello|see you soon|please call back]", and went [home|out].
* I wrote [a mail|a list|a report] for [the team|my manager] this morning.
* My [flatmate|neighbour] plays the [piano|guitar] in a band.
* We want to paint the [hall|bathroom|kitchen] [blue|yellow|white].
* I bought [a lamp|a chair|a plant] for my [desk|balcony].
* My parents visited us [on Saturday|last summer] with [two dogs|my cousin].
* For [lunch|dinner] there was [soup|rice|bread] [at work|at home].
* It [rained|snowed] [on Monday|all week] in our [town|street].
* I study [history|biology] and work in a [shop|hospital|school].
* The [pool|office] is closed [this week|today|until Monday].
* My [laptop|jacket|bike] is [red|green|new|old].
* [Two|Three] years ago we had [apple trees|some plants] behind the [house|school].
* My [uncle|cousin] made [coffee|pasta] and [bread|soup] when we came [home|in].
* The sign at the [pool|shop] says it will be open [at seven|at eight|until nine].
* [Our first|The second|The third] class this year meets in [the hall|the old office].
* The subject of [the talk|her lecture|the meeting] was [trees|the weather|the budget].
* My [aunt|mother] lives in [the hills|another town] and works [as a nurse|with computers].
* The [student|nurse] gave [me|us] [one|two] of [her films|his photos|the plants].
* [My dog|Our cat] likes [the sun|the door|this window] [a lot|best], if it is [not wet|warm].
* [This post|My mail] is just about [learning|writing] [a few sentences|one step a day].
* I called [my boss|the school] about [the sale|my plans|the shift], and nobody was [there|right].
* The [loud fan|new screen|control] of the [computer|laptop] is [away|a problem|no worry].
* I hope [the storm|the lecture] will finish [at nine|in a moment], though [it matters little|I am busy].
* We check each other [twice|now], [the same way|step by step], while [the apple pie|the bread] bakes.
* [My sister studies|My brother studied] [quietly|in a nice room] and [we did|I wanted] the other thing.
* We walked through the [trees|door] in [twelve|seven] minutes, [luckily|although] it was [open|wet].
* I [take|drive] [some coffee|the same bike] to [the meeting|work] and [understand|like] [that kind|my way].
* [I had|He had] [a touch|one] of [flu|a cold] and stayed [in bed|in], [it happens|such is the world].
* The trousers [fit|did not fit], [the fridge|one cup] was [untouched|free], and [nobody ran|it was eaten].
* [It comes|What is coming] [between lunch and dinner|each week] is [a play|a start] for [the body|health].
"""


class Sentence(NamedTuple):
    text: str
    topic: str = "NEUTRAL"
    status: str = ""


Post = list[tuple[str, Sentence]]  # the white space before each sentence, and the sentence


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
CRITERIA = [topic for topic in TOPICS if topic not in ("SPECIAL_CASE", "NEUTRAL")]
QUOTED = [wording for wording in TOPICS["NEUTRAL"]["+"] if '"' in wording]


@functools.cache
def forms(wording: str) -> list[str]:
    """Every sentence that the wording stands for."""
    parts = re.split(r"\[([^]]*)\]", wording)  # plain text and choices by turns
    return ["".join(chosen) for chosen in itertools.product(*(part.split("|") for part in parts))]


def draw(rng: random.Random, topic: str, mark: str, count: int = 1) -> list[str]:
    """As many sentences, each from another wording."""
    return [rng.choice(forms(wording)) for wording in rng.sample(TOPICS[topic][mark], count)]


def text_of(post: Post) -> str:
    return "".join(gap + sentence.text for gap, sentence in post)


def count_words(post: Post) -> int:
    return len(re.findall(r"[\w'’]+", text_of(post)))


def least_used(rng: random.Random, used: Counter, count: int, without: list[str] = ()) -> list[str]:
    """Criteria that came least often so far, so that all get about equal support."""
    allowed = [criterion for criterion in CRITERIA if criterion not in without]
    chosen = sorted(allowed, key=lambda criterion: (used[criterion], rng.random()))[:count]
    used.update(chosen)
    return chosen


def join(sentences: list[Sentence], paragraphs: set[int] = frozenset()) -> Post:
    """The post, with a new paragraph before the sentences of these numbers."""
    return [("\n\n" if n in paragraphs else " " * (n > 0), sentence) for n, sentence in enumerate(sentences)]


def mix(rng: random.Random, marked: list[Sentence], quoted: bool, emoji: str) -> Post:
    """The marked sentences among neutral ones; `quoted` asks for quotes, a comma and a new paragraph."""
    n_neutral = rng.randint(max(1, 2 - len(marked)), max(1, min(3, 5 - len(marked))))
    neutral = draw(rng, "NEUTRAL", "+", n_neutral)
    if quoted and '"' not in "".join(neutral):
        neutral[0] = rng.choice(forms(rng.choice(QUOTED)))
    neutral[-1] += emoji
    sentences = [*marked, *map(Sentence, neutral)]
    rng.shuffle(sentences)
    return join(sentences, {rng.randrange(1, len(sentences))} if quoted or rng.random() < 0.08 else set())


def diary(rng: random.Random, marked: list[Sentence]) -> Post:
    """A very long post whose marked sentences stand at the start."""
    pool = [form for wording in TOPICS["NEUTRAL"]["+"] for form in forms(wording)]
    sentences = [*marked, *map(Sentence, rng.sample(pool, len(pool)))]
    while count_words(join(sentences)) > LONG_POST_WORDS:
        sentences.pop()
    return join(sentences, set(range(len(marked), len(sentences), 8)))


def curl_an_apostrophe(posts: list[Post]) -> None:
    """In the first post that can have one, as some keyboards type it."""
    for post in posts:
        if any("'" in sentence.text and sentence.status == "1" for _, sentence in post):
            post[:] = [(gap, sentence._replace(text=sentence.text.replace("'", "’"))) for gap, sentence in post]
            return


def make_posts(rng: random.Random) -> list[Post]:
    """The posts, then a few of them once more."""
    used, used_near = Counter(), Counter()
    n_shown = [n for n, posts in enumerate(POSTS_BY_SHOWN) for _ in range(posts)]
    rng.shuffle(n_shown)
    ones = [number for number, n in enumerate(n_shown) if n == 1]
    both, twice, single = ones[:BOTH], ones[BOTH : BOTH + TWICE], ones[-1]
    long = n_shown.index(2)

    posts = []
    for number, n in enumerate(n_shown):
        shown = least_used(rng, used, n)
        near = shown if number in both else []
        if not near and number != single and rng.random() < NEAR_MISS_SHARE[n > 0]:
            near = least_used(rng, used_near, 1, without=shown)
        plan = [(topic, "+", 1 + (number in twice)) for topic in shown] + [(topic, "-", 1) for topic in near]
        if n < 2 and number != single and rng.random() < SPECIAL_SHARE:
            plan.append(("SPECIAL_CASE", "+", 1))

        post = []
        emoji = f" {EMOJI[number // 90 % len(EMOJI)]}" if number % 90 == 7 else ""
        while not post or not (number in (long, single) or 15 <= count_words(post) <= 60):
            drawn = [(topic, mark, text) for topic, mark, count in plan for text in draw(rng, topic, mark, count)]
            marked = [Sentence(text, topic, "1" if mark == "+" else "0") for topic, mark, text in drawn]
            if number == long:
                post = diary(rng, marked)
            else:
                post = join(marked) if number == single else mix(rng, marked, number % 9 == 0, emoji)
        posts.append(post)
    curl_an_apostrophe(posts)
    return posts + posts[REPEATED]


def make_ids(rng: random.Random) -> list[str]:
    """Ids `s_<n>_<k>`; those whose prefix has one post only come last."""
    sizes = [size for size, prefixes in PREFIXES_BY_POSTS.items() for _ in range(prefixes)]
    numbers = rng.sample(range(1, 2701), len(sizes))
    return [f"s_{n}_{k}" for n, size in zip(numbers, sizes) for k in rng.sample(range(1, 41), size)]


def explanation(rng: random.Random, sentence: Sentence) -> str:
    about = TOPICS[sentence.topic]["="][0]
    if sentence.status == "1":
        return rng.choice((f"The sentence shows {about}.", f"The writer describes {about}."))
    return rng.choice((f"This is no sign of {about}.", f"It sounds like {about}, but it is nothing lasting."))


def base_corpus(size: int = CORPUS_TEXTS) -> list[tuple[str, str, str, bool]]:
    """Texts for a first training: sentences, a topic, its description, and whether the text shows it.

    Every topic comes equally often, shown and not; where it is not shown the text denies it or does not speak of it.
    """
    rng = random.Random(SEED + 1)
    texts = []
    for number in range(size):
        topic, shown = CRITERIA[number // 2 % len(CRITERIA)], number % 2 == 0
        mark = "*" if shown else rng.choice(("!", ""))
        n_others = rng.choice((0, 0, 1, 1, 2) if mark else (0, 1, 1, 2, 2, 3))
        sentences = draw(rng, topic, mark) if mark else []
        for other in rng.sample([other for other in CRITERIA if other != topic], n_others):
            sentences += draw(rng, other, rng.choice("**!"))
        sentences += draw(rng, "NEUTRAL", "*", rng.randint(not sentences, min(2, 4 - len(sentences))))
        rng.shuffle(sentences)
        texts.append((" ".join(sentences), topic, draw(rng, topic, "?")[0], shown))
    rng.shuffle(texts)
    return texts


def write_rows(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def main(folder: Path = HERE) -> None:
    rng = random.Random(SEED)
    posts = list(zip(make_ids(rng), make_posts(rng)))
    rng.shuffle(posts)
    annotations = [
        [post_id, f"{post_id}_{number}", sentence.text, sentence.topic, sentence.status, explanation(rng, sentence)]
        for post_id, post in posts
        for number, (_, sentence) in enumerate(post)
        if sentence.status
    ]
    texts = [[post_id, text_of(post)] for post_id, post in posts]
    write_rows(folder / "redsm5_posts.csv", [["post_id", "text"], *texts])
    header = ["post_id", "sentence_id", "sentence_text", "DSM5_symptom", "status", "explanation"]
    write_rows(folder / "redsm5_annotations.csv", [header, *annotations])


if __name__ == "__main__":
    main()
