"""Make raw/ beside this file: made-up comments, tweets, reports and lines of dialogue in the formats of four data sets.

raw/goemotions has the 28 GoEmotions labels with the long tail of the original, raw/semeval2018_ec, raw/isear and
raw/meld the fewer labels of the sources that add rows for training. Every text is original and about nobody: sentences
that show an emotion, put together from the wordings below, for some rows with an everyday sentence before or behind.

What makes it hard is what makes the real data hard: several emotions in one text; wordings that one annotator calls
anger and the next annoyance (headings with `|`); near misses, where the emotion is denied, over or somebody else's
(marked `-`, labelled neutral); labels with 30 examples. The awkward cases of the real files are there as well:
quotation marks that quote nothing, `[NAME]`, and in isear.csv a `|` inside the text, the line-break artefact `á ` and
rows that say "[ No response.]". No text of dev or test comes again in training, but for three in the extra sources,
which leak removal has to find.

    python emotions/sample/make_sample.py

writes the files next to this one, the same bytes every time.
"""

import csv
import io
import itertools
import random
import re
import string
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 28
ROWS = {"train": 1600, "dev": 450, "test": 450}  # of GoEmotions
PAIR_SHARE, TRIPLE_SHARE = 0.12, 0.012  # rows with two and three emotions
WITH_NEUTRAL = {"train": 9, "dev": 2, "test": 2}  # rows where annotators gave an emotion and neutral
EVERYDAY_SHARE = 0.4  # emotional clauses that have an everyday sentence beside them
DISPUTED_SHARE = 0.12  # rows of one emotion whose wording would pass for another one too
NEAR_MISS_SHARE = 0.25  # neutral rows with a near miss
BESIDE_SHARE = 0.04  # rows of one emotion with a near miss of another one

# Percent of GoEmotions' rows; neutral gets the rows that are left.
SHARES = {
    "admiration": 7.0, "approval": 5.5, "gratitude": 5.0, "annoyance": 5.0, "amusement": 4.5, "curiosity": 4.5,
    "love": 4.2, "disapproval": 4.0, "optimism": 3.6, "anger": 3.6, "joy": 3.4, "confusion": 3.2, "sadness": 3.2,
    "disappointment": 3.0, "realization": 2.8, "caring": 2.8, "surprise": 2.8, "excitement": 2.5, "disgust": 2.4,
    "desire": 2.3, "fear": 2.2, "remorse": 2.1, "embarrassment": 2.0, "nervousness": 1.9, "relief": 1.9, "pride": 1.9,
    "grief": 1.9,
}  # fmt: skip
LABELS = [*sorted(SHARES), "neutral"]
COMBINATIONS = """
anger annoyance, anger disgust, anger disapproval, annoyance disapproval, annoyance confusion, disapproval disgust
admiration gratitude, admiration love, admiration approval, admiration surprise, admiration desire, admiration amusement
joy excitement, joy relief, joy gratitude, joy pride, joy love, amusement joy, amusement embarrassment, pride love
curiosity confusion, curiosity surprise, curiosity desire, excitement nervousness, excitement optimism, desire optimism
sadness disappointment, sadness grief, sadness remorse, remorse embarrassment, grief love, caring optimism
caring sadness, fear nervousness, fear disgust, relief gratitude, realization surprise, realization confusion
realization embarrassment, approval optimism, approval gratitude, disappointment annoyance, caring love
admiration gratitude love, anger annoyance disgust, joy excitement pride, sadness grief love, relief joy gratitude
curiosity confusion surprise, realization remorse embarrassment, fear nervousness optimism
"""
COMBINATIONS = [tuple(words.split()) for words in COMBINATIONS.replace("\n", ",").split(",") if words.strip()]

# [a|b|c] is a choice; {it} (a {thing} or an {event}), {who}, {day} and {kid} are slots.
# + shows the label, - is a near miss, which is neutral.
WORDINGS = """
# admiration
+ {who} [did|has done] [brilliant|superb|outstanding|impressive] work on {it}
+ what a [brilliant|superb|gorgeous|splendid] job on {it}
+ {thing} [looks|is] [gorgeous|stunning|splendid|superb|beautiful]
+ I [really look up to|admire|have great respect for] {who}
+ such [talent|skill|class|elegance], nobody handles {it} [better|so well]
+ {who} is [so talented|so gifted|a genius|a true artist|incredibly skilled]
+ [hats off to|bravo to|well done to|kudos to] {who} for {it}
+ that is one of the [best|finest|most beautiful] things I've seen [all year|in ages|in my life]
+ I'm [impressed|in awe] by how well {who} handled {it}
+ {thing} is a [masterpiece|work of art|great achievement]
+ [great|excellent|impressive|amazing] effort, {who} deserves [a medal|the praise|every prize]
+ {who} has such a [lovely|beautiful|powerful] voice, it was [perfect|flawless]
+ [amazing|awesome|fantastic|wonderful] [drawing|photo|speech|goal], you are [good|great] at this
- {who} [used to be|was once] called talented, [back then|years ago]
- nobody [called|has called] {thing} a masterpiece
# amusement
+ [haha|lol|lmao|hahaha], {it} [got|gets] me every time
+ I [laughed|giggled|chuckled|cracked up] so [hard|loudly] at {it}
+ {it} is [hilarious|so funny|comedy gold|a riot]
+ [that joke|this pun|his impression|her story] [had me in stitches|made me laugh|made me giggle|cracked me up]
+ {who} [slipping|falling|dancing|singing] at {event} was [hilarious|so funny|pure comedy]
+ [lol|haha], {who} [thought|really thought] {it} was [a fish|a hat|edible|in Spain]
+ I can't stop [laughing|giggling|chuckling] about {it}
+ [the funniest|the silliest] thing {day} was {who} with {it}
+ {who} [tells|told] the [funniest|silliest] jokes about {it}
+ this [cracked me up|made me snort|made my whole office laugh] [lol|haha|]
+ [my sides hurt|I'm crying with laughter|I nearly choked laughing] after {who} explained {it}
- {who} told a joke about {it}, [nobody laughed|but it wasn't funny]
- I don't find {it} [funny|hilarious] [at all|either]
# anger
+ I'm [furious|livid|enraged|seething|raging] about {it}
+ {who} makes me [so mad|furious|so angry|livid]
+ how dare {who} [touch|ruin|take|mess with] {thing}
+ [damn|to hell with] {who} and {it}
+ I [hate|curse|want to scream at] {who} for {it}
+ {who} [lied to me|cheated me|stole from me] {day}, I'm [boiling|raging|seething]
+ [shut up|get lost|go to hell], you [liar|idiot|fool|moron]
+ I [slammed the door|smashed a plate|yelled at everyone] because of {it}
+ this makes my blood boil, {who} is a [liar|thief|damn fool]
+ I've had it with {who}, I was [screaming|shouting|yelling] {day}
+ I [will never forgive|hate] {who}, that [traitor|liar|thief]
+ what an [outrage|insult], {who} [should be fired|must pay for this]
+ you [idiot|moron|fool], you broke {thing}
- I'm not [angry|mad|furious] about {it} [any more|at all]
- {who} was [furious|angry|livid] about {it} {day}
# annoyance
+ {it} is [so annoying|a nuisance|really irritating|getting on my nerves]
+ ugh, {who} [keeps|won't stop] [humming|interrupting|calling|texting|complaining]
+ [stop|can you stop|please quit] [posting|whining|talking] about {it} already
+ I'm [sick of|tired of|fed up with] {it}
+ why must {who} always [be late|be so loud|bring up] {day}, it's [annoying|irritating|tiresome]
+ [ugh|argh], {it} again, [so tedious|give me a break|leave me alone]
+ {who} [bugs|annoys|irritates|bothers] me with {it}
+ it [bugs|irks|annoys|bothers] me that {it} [is never on time|never works|takes for ever]
+ can't {who} [mind their own business|be quiet for once|leave it]
+ [oh great|oh perfect], {it} is [broken|late|delayed] again, [typical|as always]
+ I [rolled my eyes|groaned] at {it}, how [petty|tedious|irritating]
- {who} [isn't|was never] annoyed by {it}
- {it} [used to annoy me|annoyed people], [years ago|not now]
# approval
+ I [agree|fully agree|completely agree] with {who} about {it}
+ {who} is [right|absolutely right|correct] about {it}
+ [yes|yep|exactly], that's [how it should be|the right way|a fair point|a good point]
+ [good|sensible|fair|solid] [idea|plan|choice|decision], {it} [makes sense|will do|is worth it]
+ I [support|approve of|back] {it}
+ [exactly|indeed|true], [well said|couldn't agree more|that's spot on]
+ it's [fine|okay|right] to [want|like|ask for|choose] {it}
+ I'd [recommend|vote for] {it}, it's [a solid choice|a sensible option|decent]
+ {who} [has a point|makes a valid point|makes a fair point] there
+ [that's correct|that's true|agreed], {it} [is the better option|makes sense]
+ [sounds good|sounds right|works for me], go with {it}
- {who} asked whether I agree about {it}
- it is not known who approved {it}
# caring
+ [take care|stay safe|look after yourself] and [rest|sleep|eat] well
+ I'm [here for you|here if you need me|always here to listen], [whatever happens|any time]
+ I [hope|pray] {who} [gets well|recovers|heals] soon
+ [please|do] [be gentle with yourself|don't be so hard on yourself|be kind to yourself]
+ let me [help you with|carry|take care of] {thing}, [you need rest|you should lie down]
+ [sending|here come] [hugs|warm hugs|strength] to {who}
+ [are you okay|are you all right|did you eat], can I [help|bring you soup|do anything]?
+ {who} needs [a hug|our support|some comfort], let's [look after them|be there for them]
+ you [deserve|need] [rest|comfort|support], don't carry {thing} alone
+ [drive|walk|get home] [safely|carefully] and [call me|text me] if you need [help|anything]
+ I'll [look after|watch over|take care of] {who} until {event} is over
- the [nurse|clinic] that cares for {who} opens at nine
- {who} works in [child care|health care] near {event}
# confusion
+ I [don't understand|don't get|can't make sense of] {it}
+ [wait|sorry|hm], [what|who|which] do you mean by {it}?
+ I'm [confused|puzzled|baffled|lost], {it} [makes no sense|doesn't add up]
+ {it} is [confusing|puzzling|baffling|a mystery to me]
+ [huh|what], I thought {event} was [over|cancelled|tomorrow|closed]?
+ I have no [idea|clue] what {who} [means|meant|is on about]
+ [am I missing something|did I miss something|is it just me], or is {it} [unclear|odd|illogical]?
+ I'm not sure [what|how|which] {it} is [supposed to mean|meant to do]
+ {who} [lost me|confused me|puzzled me] with {it}
+ it's [unclear|hard to follow] why {who} [did that|said that|left], I'm [lost|puzzled]
- {who} explained {it}, so it's [no longer confusing|clear now]
- the [sign|map] of {event} confuses [tourists|visitors]
# curiosity
+ I [wonder|was wondering|keep wondering] [how|why|when] {who} [found|made|bought] {thing}
+ I'm [curious|so curious] [about|to hear about|to know about] {it}
+ [how|where|when] did you [find|get|learn about|choose] {thing}?
+ [does anyone know|can anyone tell me|has anyone heard] [what happened to|more about|who made] {thing}?
+ [out of curiosity|just curious|just wondering], [how old|how big|how much] is {thing}?
+ [tell me more|I'd like to know more|do tell us more] about {it}
+ what [is|was] {it} like, and [who made it|where is it from|how does it work]?
+ [so|and], what does {who} [think|say] about {it}?
+ {it} sounds [intriguing|interesting], is there [a link|a source|more to read]?
+ [could you explain|may I ask|mind if I ask] how {who} [did|does|learned] that?
- {who} asked me [how old|how big] {thing} is
- there was a question about {it} {day}
# desire
+ I [want|really want|need] {thing} [so badly|in my life|right now]
+ I [wish|only wish] I [had|owned|could afford] {thing}
+ [if only I had|I'd give anything for|what I'd do for] {thing}
+ I'm [craving|longing for|yearning for|dying for] {thing}
+ I would [love|like] to [try|own|have] {thing} [one day|some day]
+ {thing} is [on my wish list|all I want|what I dream of]
+ I've [always wanted|been dying|been longing] to [meet|travel with|work with] {who}
+ [gimme|take my money], I [need|want] {thing}
+ my mouth waters at [the apple pie|the pumpkin soup|the cheese platter|the honey], I [crave|want] [one|more]
- {who} has no wish to own {thing}
- I don't [want|need] {thing}, [I have one|thanks]
# disappointment
+ {it} was [a letdown|such a letdown|disappointing|underwhelming]
+ I'm [disappointed|let down|so disappointed] [by|in] {who}
+ I [expected|had hoped for] [more|better] from {it}
+ {who} [let me down|broke the promise|let us all down] {day}
+ what a [shame|pity|letdown], {event} was [cancelled|mediocre|half empty]
+ [sadly|unfortunately], {it} [never lived up to the hype|fell flat|didn't meet my hopes]
+ I waited [weeks|months] for {it} and [got nothing|it was mediocre|it fell flat]
+ too bad, {who} [didn't come|cancelled|forgot me] {day}
+ {it} could have been so good, [sadly it isn't|what a waste|but it fell flat]
+ we lost [again|once more], {who} [missed|wasted] every chance
- I was not disappointed by {it}
- {who} wrote that {it} was [a letdown|underwhelming]
# disapproval
+ I [disagree|don't agree|strongly disagree] with {who} about {it}
+ {who} [shouldn't|should not] [do that|talk like that|decide on {thing}]
+ that's [wrong|not okay|unacceptable|not right], whatever {who} says
+ {it} is a [bad|terrible|poor|foolish] [idea|plan|choice|decision]
+ [no|nope], that's [not true|false|incorrect|not how {event} works]
+ I [object to|don't support|am against|oppose] {it}
+ [you can't just|nobody should|one must not] [move|close|change] {event}
+ there is no excuse for {it}, [it's wrong|I won't support it|shame on them]
+ {who} is wrong [about this|here], {it} is [no excuse|unfair|unacceptable]
+ I don't [like|approve of] how {who} [runs|treats|handles] {it}
- {who} and I don't disagree about {it}
- the council [objected to|opposed] {it} in 1990
# disgust
+ {thing} [smells|tastes] [disgusting|rotten|foul|revolting]
+ [eww|yuck|gross], {who} [licked|spat on|sneezed on] {thing}
+ {it} makes me [sick|gag|want to vomit|queasy]
+ [that's|this is] [disgusting|gross|revolting|nasty|vile]
+ {who} is [a creep|repulsive|vile|disgusting]
+ there was [mould|slime|a dead rat|hair] in {thing}, [yuck|so gross|eww]
+ I nearly [vomited|gagged|threw up] over {thing}
+ the [stench|smell|slime] of {thing} was [revolting|foul|nauseating]
+ {who} picks his nose near {thing}, how [nasty|gross|vile]
- {thing} doesn't smell [rotten|foul] [at all|any more]
- {who} read a text on [mould|slime] {day}
# embarrassment
+ I [blushed|went red|cringed] when {who} [saw|read out|mentioned] {thing}
+ [how|so] [embarrassing|awkward|mortifying], I [dropped|forgot|sat on] {thing}
+ I'm [embarrassed|mortified|ashamed] about {it}
+ I wanted to [sink into the floor|hide under the table|disappear] when {who} [laughed|turned round]
+ I [waved at|hugged|winked at] a stranger [thinking|because I thought] it was {who}, [awkward|so awkward]
+ everyone [stared|turned round] because my [trousers ripped|stomach growled|phone rang], I [blushed|cringed]
+ I cringe [whenever|every time] I think of {it}
+ my face went [red|scarlet] in front of {who}
+ [ashamed|embarrassed] to admit that I [called {who} mum|forgot {it}|tripped over {thing}]
- {who} wasn't [embarrassed|ashamed] about {it}
# excitement
+ I'm [so excited|thrilled|pumped|hyped] for {event}
+ I can't wait [for|to see|to try] {it}
+ [woohoo|yay|omg|wow], {event} [starts|opens|is] {day}
+ [counting the days|counting the hours] until {event}
+ {event} is going to be [epic|awesome|so exciting|thrilling]
+ I'm [buzzing|bouncing|jumping up and down] because {who} [is coming|got tickets|booked {event}]
+ so [hyped|excited|pumped], we [leave|start|play] tomorrow
+ [finally|at last], {event} is coming, [let's go|here we go|I'm thrilled]
+ {who} and I are [thrilled|excited] to [join|see|start] {event}
- {who} isn't excited about {event}
- nobody is [hyped|pumped] for {event} now
# fear
+ I'm [scared|afraid|terrified|frightened] of {it}
+ {it} [scares|terrifies|frightens] me
+ I was [terrified|so scared|frozen with fear] when {who} [screamed|vanished|fell]
+ {it} is [terrifying|scary|frightening|creepy], I [ran|hid|screamed]
+ [help|oh no], [something is moving|someone is breathing|I hear steps] behind {thing}
+ I [dread|have nightmares about|panic at the thought of] {it}
+ I'm afraid that {who} [will hurt me|is in danger|won't survive]
+ my [blood ran cold|heart stopped] when I saw {it}, [so scary|I was terrified]
+ I hardly dare to [go near|touch|look at] {it}, it's [scary|creepy|dangerous]
- I'm not [scared|afraid] of {it} [any more|at all]
- {who} was once afraid of {it}
# gratitude
+ [thanks|thank you|many thanks] for {it}
+ [thank you so much|thanks a lot|thanks a million], {who} [loved|needed] that
+ I'm [grateful|so grateful|thankful] for {it}
+ I [appreciate|really appreciate] {it}
+ I owe {who} [a lot|so much|a big thank you]
+ [thanks|cheers] for [explaining|sharing|fixing|the tip about] {it}
+ how [kind|generous] of {who} to help me with {it}, [thank you|much appreciated]
+ {who} helped me out {day}, I'm [so thankful|forever grateful]
+ [much appreciated|thanks again|cheers mate], that [helped|was useful]
+ bless {who} for {it}, [thanks|I'm thankful]
- {who} never [said thanks|thanked us] for {it}
- the card says [thank you|thanks] in [Welsh|Dutch]
# grief
+ we [buried|lost] {who} {day}, [rest in peace|I can't stop mourning]
+ [rest in peace|rip], {who}, [we will never forget you|gone too soon|for ever missed]
+ I'm still [mourning|grieving for|in mourning for] {who}
+ {who} [died|passed away] {day} and [my world ended|I'm lost without them|I can't stop mourning]
+ {who} is gone for ever, the [grief|mourning|loss] [never ends|is unbearable|breaks me]
+ at the [funeral|grave|wake] {day} I [wept|couldn't speak|broke down]
+ since {who} passed away I [grieve|mourn|weep] [every night|every day]
+ I carry {thing} of my late [father|mother|wife|husband] everywhere, the [loss|grief] stays
+ [my condolences|deepest condolences], the death of {who} [breaks my heart|is such a loss]
- the [funeral|wake] of the old mayor was in 1950
# joy
+ I'm [so happy|delighted|overjoyed|glad] about {it}
+ {it} [made my day|makes me so happy|fills me with joy|brightened my day]
+ what a [happy|joyful|wonderful|delightful] [day|evening|surprise party|weekend] with {who}
+ I [smiled|sang|danced] all day [because of|thanks to] {it}
+ we had [so much fun|a great time|a blast|a wonderful time] with {it}
+ [yay|hooray|happy days], {it} [worked|is back|is mine]
+ {who} and I are [so happy|overjoyed|delighted] with {it}
+ life is [good|wonderful|sweet] with {who} and {it}
+ I'm in such a [happy|cheerful|sunny] mood [today|since {it}]
+ I [enjoyed|so enjoyed] every [minute|moment] of {it}
+ happy [birthday|new year|anniversary] to {who}
- {who} isn't happy with {it}
- I asked {who} if the [happy hour|fun fair] is {day}
# love
+ I [love|adore|cherish] {who} [so much|with all my heart|more than words can say]
+ I [love|adore] {it}
+ {who} is the love of my life
+ I'm [in love|head over heels] [with|for] {who}
+ {it} is my [favourite|absolute favourite] thing [ever|in the world]
+ my [darling|sweetheart|beloved], I [love you|miss your kisses|adore you]
+ [aww|oh], I [love|adore] how {who} [smiles|talks|laughs]
+ {who} [kissed|hugged] me and said I love you, [I love them too|my heart melts]
+ nothing beats {it}, I [simply love it|adore it|love every bit]
+ {who} [stole my heart|has my whole heart], I'm [smitten|in love]
- {who} doesn't love {it}
- the word love stands on the [wall|cover] of {thing}
# nervousness
+ I'm [nervous|so nervous|anxious|jittery] about {it}
+ {it} [makes me nervous|makes me anxious|gives me the jitters]
+ my [hands shake|palms are sweaty|stomach is in knots] before {event}
+ I [worry|keep worrying|worried all night] about {it}
+ I'm [worried|anxious|uneasy] that {who} [won't come|is late|won't call]
+ I [bit my nails|paced the room|couldn't sit still] until {who} [called|arrived]
+ [butterflies|knots] in my stomach, I [meet {who}|have {event}] {day}
+ [a bit|rather|quite] [tense|uneasy|jittery|worried] before {event}
+ what if {who} says no, I'm so [tense|worried|nervous]
- {who} is not [nervous|anxious|worried] about {it}
# optimism
+ I [hope|really hope|do hope] {it} [works out|will be fine|goes well]
+ [hopefully|fingers crossed], {who} will [make it|win|find a way]
+ {it} will [be fine|get better|work out], [you'll see|I'm sure|have faith]
+ I'm [optimistic|hopeful|confident] about {it}
+ things are [looking up|getting better|bound to improve] with {it}
+ [better days are|good times are|a bright future is] ahead for {who}
+ [next year|next time|one day] {who} will [win|succeed|make it], I'm [sure|hopeful|confident]
+ there's [hope|still hope|always hope] for {it}
+ [keep going|don't give up|hang in there], {it} will [work out|be worth it]
+ I [believe|have faith] in {who}, we can [win|do this|fix this]
- {who} gave up hope about {it}
- the ship named Hope left {day}
# pride
+ I'm [proud|so proud|very proud] of {who}
+ I [built|finished|fixed|made] {thing} [all by myself|on my own|at the first try], [so proud|I'm proud]
+ so proud [of us|of my team|of what {who} achieved]
+ [look what I made|look at that], {thing}, [I did it myself|my own work], [proud of it|feeling proud]
+ {who} [graduated|won first prize|passed with top marks], my [chest swells|heart swells] with pride
+ we [earned|deserve] this, I take [great pride|such pride] in {it}
+ [proud|very proud] to say I [finished|fixed|built] {thing}
+ I hold my head high, {it} is my [triumph|proudest moment|best achievement]
- {who} takes no pride in {it}
# realization
+ I [just realized|now realize|have just noticed] that {thing} is [ten years old|a gift|upside down]
+ [oh|ah], so that's [why|how] {who} [left|knew|smiled]
+ it [dawned on me|struck me|hit me] that {who} [was right all along|never liked {it}|knew]
+ [turns out|it turns out] {thing} was [broken|free|ours] all along
+ I [never knew|didn't know|had no idea] that {thing} [was made here|came in blue|had a name]
+ [now I see|now I get it|it all makes sense now], {who} [meant|wanted] {it}
+ [come to think of it|now that I think of it], {who} [never|always] [paid for|used|liked] {thing}
+ [it finally clicked|the penny dropped], {thing} is [a copy|a fake|the answer]
+ I've come to [realize|see|understand] that {it} [matters|takes time|isn't everything]
- {who} did not notice {it}
- it was known all along that {thing} is [old|free]
# relief
+ [phew|whew], {event} is [over|done|behind us]
+ what a relief, {who} [is safe|called|found {thing}]
+ I'm [relieved|so relieved] that {event} [is over|went fine|was cancelled]
+ [thank god|thank goodness|thank heavens] {event} is [over|done|behind me]
+ I [can breathe again|can sleep again|exhaled], {who} [is safe|is back|is out of danger]
+ a [weight|load|stone] [fell off|is off] my [shoulders|chest|heart] after {event}
+ [finally over|at last it's over], I can [relax|breathe|rest] now
+ it was [a false alarm|only a scratch|not serious], [phew|what a relief|I can relax]
- {who} felt no relief after {event}
# remorse
+ I'm [sorry|so sorry|terribly sorry] [about|for] {it}
+ I [regret|deeply regret|so regret] [what I said to {who}|shouting at {who}|breaking {thing}]
+ I [apologise|want to apologise] [to {who}|for {it}]
+ it was my [fault|mistake], I should [never have|not have] [lied to|hurt|left] {who}
+ I feel [guilty|so guilty|terrible] for [lying to|hurting|forgetting] {who}
+ [forgive me|please forgive me|my apologies], I [broke|lost|forgot] {thing}
+ I wish I could [take it back|undo it|make it up to {who}]
+ my [conscience|guilt] won't let me rest since I [lied to|cheated|hurt] {who}
+ if only I hadn't [hurt|left|yelled at] {who}, I feel [guilty|awful about it]
- {who} never apologised for {it}
- no need to say sorry for {it}
# sadness
+ I'm [so sad|heartbroken|miserable|unhappy] about {it}
+ {it} [makes me sad|made me cry|breaks my heart|brought me to tears]
+ I [cried|wept|sobbed] [all night|for hours|in the bathroom] because of {it}
+ I [miss|really miss] {who}, it's so [lonely|empty|sad] here
+ I feel [so alone|lonely|down|blue|empty] [without {who}|since {it}]
+ it's [sad|so sad|heartbreaking] that {who} [has no friends|moved away|is so ill]
+ [tears|more tears] [run down my face|fill my eyes] when I think of {it}
+ {who} left me and I [cry|sob|weep] [every day|at night]
+ my heart is [heavy|broken|aching], {who} [is gone|won't come back|moved away]
- I'm not [sad|unhappy] about {it}
- {who} looked sad on the photo of {event}
# surprise
+ [wow|whoa|oh my god], I [didn't expect|never expected|didn't see] {it} [coming|here]
+ I'm [surprised|shocked|stunned|astonished|amazed] that {who} [won|came|said yes]
+ [what|no way|you're kidding|really], {who} [stole|bought|hid] {thing}?
+ {it} [came out of nowhere|took me by surprise|caught me off guard]
+ I [can't believe|couldn't believe] [my eyes|my ears|it], {who} [came back|can sing|won]
+ [unexpected|surprising|astonishing|unbelievable], {thing} [was real|survived|works]
+ my jaw dropped when {who} [showed up|sang|opened {thing}]
+ imagine my surprise when {thing} [turned up|was in the fridge|came back]
+ I [gasped|nearly fell off my chair] when {who} showed up with {it}
- nobody was surprised by {it}
- it's no surprise that {who} [won|came]
# neutral
+ {event} is [near|behind|opposite|next to] the [station|town hall|library|post office]
+ {who} [bought|ordered|mentioned|described] {thing} {day}
+ {event} [starts|ends|is] at [six|seven|eight|nine] {day}
+ {who} works at the [post office|library|bank|airport] on [weekdays|Mondays|Fridays]
+ the [bus|train|tram] to [town|the airport|the lake] [leaves|stops] at [noon|six|half past nine]
+ {thing} [costs|cost] [five|ten|twenty|forty] [pounds|euros|dollars] [in most shops|online|]
+ there are [two|three|four] kinds of [apples|stamps|screws|paper] in the [drawer|shop|box]
+ {thing} comes in [red|blue|green|grey] and [white|black|brown]
+ {who} said that {thing} is [made in Wales|on the second floor|from 1990|in the box]
+ {who} and {who} talked about {it} {day}
+ you have to [press|turn|pull] the [left|right|upper] [knob|lever|button] first
+ the [meeting|class|match] is on [Monday|Tuesday|Thursday], [room two|first floor|as usual]
+ [article|chapter|page] [two|three|nine] is about {it}
+ {who} takes the [bus|train|tram] to {event} [every week|on weekdays|{day}]
+ I [left|put|saw] {thing} in the [hall|garage|kitchen] {day}
+ the [form|list|key] for {it} is [in the office|on page two|at the desk]
# anger | annoyance
+ {who} [broke|lost|took] {thing} again, what is wrong with [people|them]
+ I'm so done with {who}
+ seriously, {who} [again|once more] [parked in front of|talked over] {it}
# admiration | approval
+ {who} did [the right thing|a good job|well] with {it}
+ {it} is [really good|great|pretty good]
+ [good|nice] [one|work|point], {who}
# admiration | love
+ {it} is [so lovely|so cute|the best]
+ {who} is [the sweetest|the best|an angel]
# sadness | disappointment
+ {who} [forgot|missed] my birthday
+ nobody came to {event}
# sadness | grief
+ it's been [a year|two years] without {who}
+ {who} will never see {it}
# fear | nervousness
+ I don't [dare|want] to think about {it}
+ {it} keeps me awake at night
# joy | excitement
+ [yes|yay|woo], we got {thing}
+ best [day|weekend|news] ever with {it}
# joy | amusement
+ {who} [made|makes] us all smile with {it}
# curiosity | confusion
+ what is {it} [for|about]?
+ why did {who} [do|say|want] that?
# disapproval | annoyance
+ {who} should [know better|stop this] by now
+ enough of {it}
# disapproval | disgust
+ {who} has no [shame|manners|decency]
# surprise | realization
+ [huh|oh], {thing} [exists|is real|is gone]
+ I never thought {who} would like {it}
# optimism | desire
+ maybe {who} will [give me|bring] {thing} one day
# remorse | embarrassment
+ I [forgot|ruined|mixed up] {thing} in front of {who}
# relief | gratitude
+ luckily {who} [fixed|saved|found] {thing}
# pride | admiration
+ my own {kid} [fixed|made|built] {thing}
# caring | optimism
+ {who} will [be okay|get through this|be fine]
# ec anger
+ @[someuser|citybus|paperboat] {it} is [a joke|a disgrace], [answer me|fix it] #[furious|rage|angry|fuming]
+ [still|again] on hold about {it} #[fuming|rage|outrage|livid]
# ec disgust
+ {it} [today|on this train] #[gross|yuck|vile|nasty]
# ec fear
+ {it} at midnight #[terrified|horror|nightmare|scared]
+ alone at home and {thing} [moves|creaks|whispers] #[horror|scared|terror]
# ec joy
+ sunshine, {who} and {it} #[happy|joyful|blessed|smiling]
+ {it} &amp; {it} = #[happiness|bliss|cheerful]
# ec love
+ {who} &amp; me #[love|soulmate|sweetheart|inlove]
# ec optimism
+ new week, new [start|chance], {it} can come #[hope|hopeful|positive|motivation]
+ every [storm|winter] ends, keep going @[someuser|paperboat] #[hope|believe|faith]
# ec sadness
+ {it} without {who} #[lonely|sad|tears|depressing]
+ rainy evening, empty flat #[lonely|blue|sad|heartbroken]
# ec surprise
+ {who} on my doorstep with {it} #[shocked|surprise|wow|speechless]
# ec none
+ @[someuser|citybus|paperboat] which [platform|stop] for {it} {day}
+ new video about {it}, link below #[tutorial|howto|news]
# isear joy
+ when I [passed my exam|got the job|met {who} after two years] and we [celebrated|danced] at {event}
+ when my [first child|nephew] was born and I was [happy|overjoyed] beyond measure
# isear fear
+ when I [walked home alone|heard steps] at night after {event} and was [terrified|scared|afraid]
+ when the car [skidded|slid] towards {who} and I [feared|thought] we would die
# isear anger
+ when {who} [lied to me|blamed me|accused me] over {it}, I was [furious|so angry]
+ when a driver [cut me off|hit my bike] and [shouted|swore] at me, I [yelled|was livid]
# isear sadness
+ when {who} [moved away|left me|fell ill] and I [cried|felt lonely] for [weeks|days]
+ when I had to [sell|leave] {thing} and [cried|felt empty|wept]
# isear disgust
+ when I saw [a drunk man vomit|maggots crawl|someone spit] on {thing}, it was [revolting|disgusting|gross]
+ when {who} ate with [dirty hands|an open mouth], the [smell|sight] was [foul|nauseating]
# isear shame
+ when I [stammered|forgot my lines] in front of {who} and [blushed|went red|felt ashamed]
+ when {who} caught me [cheating|lying] and I was [ashamed|embarrassed|mortified]
# isear guilt
+ when I [stole from|lied to|shouted at] {who} and [regretted|felt guilty about] it [for weeks|afterwards]
+ when I [forgot|broke] {thing} of {who} and said nothing, I still feel [guilty|sorry]
# meld anger
+ you [told|sold|lied to] {who}? Get out, [right now|I mean it]
# meld disgust
+ you ate that off {thing}? Oh, [gross|yuck|eww]
# meld fear
+ oh no, oh no, {who} is [coming|at the door], [hide|run], I'm [scared|so scared]
# meld joy
+ you guys, [guess what|listen], {who} said yes, I'm so [happy|glad]
+ oh, come here, this is [wonderful|fantastic], let's [celebrate|dance]
# meld sadness
+ I just [miss|lost] {who}, okay? I can't stop [crying|weeping]
# meld surprise
+ wait, {who}? [My|Your] {who}? No way, I can't believe it
+ oh my god, [what|when] are you doing with {it}? I'm [shocked|stunned]
# meld neutral
+ okay, [so|well], {who} is at {event}
+ pass me the [salt|phone|paper], [will you|please]
"""
THINGS = """that old lamp, the blue teapot, my first novel, the pumpkin soup, a red bicycle, this puzzle, the paper
    crane, the spare key, the cheese platter, the rent letter, that photo, the library book, the birthday cake, the
    kitchen sink, the leather jacket, the moving van, a wooden spoon, the brass trumpet, my umbrella, the apple pie,
    this spreadsheet, a jar of honey, the garden gate"""
EVENTS = """the village fair, my driving test, the chess final, our school play, the night bus, the garden party, the
    choir concert, the puppet show, the camping trip, the job interview, the flower market, the long drive, the ferry
    ride, the snow storm, the science quiz, the dance class, the train strike, the big match, my physics exam, the road
    works, the roller coaster, the boat race, the bakery queue, the new timetable, the flute lesson, the night shift"""
SLOTS = {
    "{it}": f"{THINGS}, {EVENTS}",
    "{thing}": THINGS,
    "{event}": EVENTS,
    "{who}": """my sister, my brother, our neighbour, [NAME], [NAME], the coach, my teacher, the plumber, my uncle, my
        aunt, our landlord, the bus driver, my cousin, my best friend, the mayor, my grandmother, the waiter, my boss,
        my roommate, the new colleague, the goalkeeper, the dentist, my daughter, the drummer, my old friend, grandpa,
        the nurse, the lady downstairs""",
    "{day}": """yesterday, this morning, last night, on Monday, on Friday, last week, today, this weekend, in May,
        after lunch, on Sunday, this evening""",
    "{kid}": "son, daughter, nephew, niece",
}  # fmt: skip
SLOTS = {slot: [" ".join(value.split()) for value in values.split(",")] for slot, values in SLOTS.items()}

EC_NAMES = ["anger", "anticipation", "disgust", "fear", "joy", "love", "optimism", "pessimism", "sadness", "surprise",
            "trust"]  # fmt: skip
EC_SETS = """
anger disgust, joy, sadness pessimism, optimism joy, fear, anger disgust, joy love, surprise, sadness, anger
optimism anticipation, disgust anger, joy optimism, fear pessimism, love joy trust, sadness, surprise joy, disgust, joy
love, optimism, none
"""
EC_SETS = [words.split() for words in EC_SETS.replace("\n", ",").split(",") if words.strip()]
ISEAR_LABELS = {"joy": "joy", "fear": "fear", "anger": "anger", "sadness": "sadness", "disgust": "disgust",
                "shame": "embarrassment", "guilt": "remorse"}  # fmt: skip
ISEAR_RESPONDENTS = 21  # each reports one situation an emotion
MELD_EMOTIONS = [*["neutral"] * 4, *["joy", "surprise"] * 2, "anger", "sadness", "fear", "disgust"]
MELD_SENTIMENT = {"neutral": "neutral", "joy": "positive", "surprise": "positive"}  # the others are negative
SPEAKERS = ("Ada", "Bruno", "Clea", "Dmitri", "Elif", "The Librarian")


def read_wordings(text: str) -> dict[str, dict[str, list[str]]]:
    """The wordings by heading and mark."""
    topics = {}
    for line in text.strip().splitlines():
        mark, wording = line.split(" ", 1)
        if mark == "#":
            topics[wording] = topic = defaultdict(list)
        else:
            topic[mark].append(wording)
    return topics


TOPICS = read_wordings(WORDINGS)


def clause(rng: random.Random, heading: str, mark: str = "+") -> str:
    """One of the sentences that a wording stands for, without an end mark but `?`."""
    wording = rng.choice(TOPICS[heading][mark])
    text = re.sub(r"\[([^]]*)\]", lambda choice: rng.choice(choice[1].split("|")), wording)
    text = re.sub(r"\{\w+\}", lambda slot: rng.choice(SLOTS[slot[0]]), text)
    return " ".join(text.split())


def write_out(rng: random.Random, clauses: list[str]) -> str:
    """Sentences in a row, punctuated and capitalised as carelessly as people do."""
    careless, text = rng.random() < 0.2, ""
    for number, part in enumerate(clauses):
        joint = rng.choice((". ", ". ", ". ", "! ", "... ", ", and ", ", but ")) if number < len(clauses) - 1 else None
        starts = not text or text[-2] in ".!?"
        text += part[0].upper() + part[1:] if starts and not careless else part
        if joint is None:
            text += "" if part.endswith("?") else rng.choice((".", ".", ".", ".", "!", "!", "...", "", ""))
        else:
            text += " " if part.endswith("?") else joint
    if rng.random() < 0.1:
        text = text.replace("'", "’")
    if rng.random() < 0.02:
        text = f'"{text}' if rng.random() < 0.5 else text.replace(" ", '" ', 1)
    return text


def comment(rng: random.Random, labels: tuple[str, ...]) -> str:
    """A comment that shows the labels."""
    if labels == ("neutral",):
        clauses = [clause(rng, "neutral") for _ in range(rng.choice((1, 1, 2)))]
        if rng.random() < NEAR_MISS_SHARE:
            clauses[-1] = clause(rng, rng.choice(list(SHARES)), "-")
        return write_out(rng, clauses)
    clauses = [clause(rng, label) for label in labels if label != "neutral"]
    if len(labels) == 1:
        disputed = [heading for heading in TOPICS if labels[0] in heading.split(" | ")[:2] and "|" in heading]
        if disputed and rng.random() < DISPUTED_SHARE:
            clauses = [clause(rng, rng.choice(disputed))]
        if rng.random() < BESIDE_SHARE:
            clauses.append(clause(rng, rng.choice([label for label in SHARES if label not in labels]), "-"))
    if "neutral" in labels or rng.random() < EVERYDAY_SHARE:
        clauses.append(clause(rng, "neutral"))
    rng.shuffle(clauses)
    return write_out(rng, clauses)


def label_sets(rng: random.Random, n_rows: int, n_with_neutral: int) -> list[tuple[str, ...]]:
    """The labels of n_rows rows: each emotion exactly as often as SHARES says."""
    left = Counter({label: round(n_rows * share / 100) for label, share in SHARES.items()})
    rows = []
    for size, share in ((3, TRIPLE_SHARE), (2, PAIR_SHARE)):
        several = [labels for labels in COMBINATIONS if len(labels) == size]
        for labels in itertools.islice(itertools.cycle(rng.sample(several, len(several))), round(n_rows * share)):
            rows.append(labels)
            left.subtract(labels)
    rows += [(label,) for label in SHARES for _ in range(left[label])]
    for number in rng.sample([i for i, labels in enumerate(rows) if len(labels) == 1], n_with_neutral):
        rows[number] += ("neutral",)
    rows += [("neutral",)] * (n_rows - len(rows))
    rng.shuffle(rows)
    return rows


def fold(text: str) -> str:
    """What two texts share that a reader would call the same."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())


def new_text(seen: set[str], make) -> str:
    """The first of make()'s texts that was not there before."""
    text = next(text for text in iter(make, None) if fold(text) not in seen)
    seen.add(fold(text))
    return text


def goemotions(rng: random.Random, seen: set[str], split: str) -> list[tuple[str, tuple[str, ...]]]:
    """(text, labels) of a split."""
    sets = label_sets(rng, ROWS[split], WITH_NEUTRAL[split])
    return [(new_text(seen, lambda labels=labels: comment(rng, labels)), labels) for labels in sets]


def extra(rng: random.Random, source: str, own: str, label: str, own_share: float) -> str:
    """A clause in the source's own words, or in GoEmotions'."""
    return clause(rng, f"{source} {own}" if label not in TOPICS or rng.random() < own_share else label)


def tweet(rng: random.Random, emotions: list[str]) -> str:
    names = [name for name in emotions if name in SHARES] or ["none"]
    return write_out(rng, [extra(rng, "ec", name, name, 0.4) for name in names])


def semeval(rng: random.Random, seen: set[str], n_rows: int, year: str) -> list[list[str]]:
    ids = rng.sample(range(20000, 42000), n_rows)
    sets = list(itertools.islice(itertools.cycle(EC_SETS), n_rows))
    rng.shuffle(sets)
    return [
        [f"{year}-En-{number:05d}", new_text(seen, lambda names=names: tweet(rng, names))]
        + [str(int(name in names)) for name in EC_NAMES]
        for number, names in zip(ids, sets)
    ]


def report(rng: random.Random, emotion: str) -> str:
    text = extra(rng, "isear", emotion, ISEAR_LABELS[emotion], 0.5)
    return text[0].upper() + text[1:] + "."


def isear(rng: random.Random, seen: set[str]) -> list[list[str]]:
    """Rows of 43 fields, the last one empty; three texts with `|` and two without a response."""
    rows = []
    for person in range(1, ISEAR_RESPONDENTS + 1):
        about = [f"{11000 + person}", "1", "1", str(person), str(rng.randint(1, 2)), str(rng.randint(18, 40))]
        about += [str(rng.randint(1, 6)) for _ in range(5)]
        for number, emotion in enumerate(ISEAR_LABELS, 1):
            answers = [str(rng.randint(0, 4)) for _ in range(24)]
            text = new_text(seen, lambda emotion=emotion: report(rng, emotion))
            end = text.find(" ", rng.randint(45, 60))  # of the line, where the real file has `á ` for the break
            text = text if end < 0 else f"{text[:end]} á {text[end + 1 :]}"
            key = [emotion, str(rng.randint(1, 4)), str(rng.randint(1, 4)), f"0{about[0]}{number}"]
            rows.append([*about, str(number), *answers, *key, text, "1", ""])
    for row in rng.sample([row for row in rows if " á " in row[40]], 3):
        row[40] = row[40].replace(" á ", ' \\so to speak\\" á|')
    for row in rng.sample([row for row in rows if "á" not in row[40]], 2):
        row[40] = "[ No response.]"
    return rows


def utterance(rng: random.Random, emotion: str) -> str:
    return write_out(rng, [extra(rng, "meld", emotion, emotion, 0.35)]).replace("'", "’")


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"00:{minutes:02d}:{rest:02d},{round(seconds % 1 * 1000) % 1000:03d}"


def meld(rng: random.Random, seen: set[str], n_rows: int) -> list[list]:
    emotions = list(itertools.islice(itertools.cycle(MELD_EMOTIONS), n_rows))
    rng.shuffle(emotions)
    rows, dialogue, turn, seconds = [], 0, 0, 60.0
    for number, emotion in enumerate(emotions, 1):
        text = new_text(seen, lambda emotion=emotion: utterance(rng, emotion))
        start, seconds = seconds, seconds + rng.uniform(1, 5)
        sentiment = MELD_SENTIMENT.get(emotion, "negative")
        rows.append([number, text, rng.choice(SPEAKERS), emotion, sentiment, dialogue, turn, 1 + dialogue % 9, 3,
                     clock(start), clock(seconds)])  # fmt: skip
        turn += 1
        if rng.random() < 0.15:
            dialogue, turn, seconds = dialogue + 1, 0, 60.0
    return rows


def leak(comments: dict[str, list], tweets: list, reports: list, lines: list) -> None:
    """Put texts of dev and test into training: one as it stands, one without punctuation, one in capitals."""
    joy = next(text for text, labels in comments["dev"] if labels == ("joy",))
    sadness = next(text for text, labels in comments["test"] if labels == ("sadness",))
    anger = next(text for text, labels in comments["dev"] if labels == ("anger",))
    next(row for row in tweets if [EC_NAMES[i] for i, flag in enumerate(row[2:]) if flag == "1"] == ["joy"])[1] = joy
    plain = [row for row in reports if "á" not in row[40] and row[40].endswith(".")]  # thus no "[ No response.]"
    next(row for row in plain if row[36] == "sadness")[40] = fold(sadness)
    next(row for row in lines if row[3] == "anger")[1] = anger.upper()


EC_HEADER = ["ID", "Tweet", *EC_NAMES]
ISEAR_HEADER = (
    "ID|CITY|COUN|SUBJ|SEX|AGE|RELI|PRAC|FOCC|MOCC|FIEL|EMOT|WHEN|LONG|INTS|ERGO|TROPHO|TEMPER|EXPRES|MOVE|EXP1|EXP2|"
    "EXP10|PARAL|CON|EXPC|PLEA|PLAN|FAIR|CAUS|COPING|MORL|SELF|RELA|VERBAL|NEUTRO|Field1|Field3|Field2|MYKEY|SIT|STATE|"
)
MELD_HEADER = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def main(folder: Path = HERE) -> None:
    rng, raw, seen = random.Random(SEED), folder / "raw", set()
    comments = {split: goemotions(rng, seen, split) for split in ROWS}
    tweets = {"train": semeval(rng, seen, 160, "2017"), "dev": semeval(rng, seen, 40, "2018")}
    reports = isear(rng, seen)
    lines = {"train": meld(rng, seen, 160), "dev": meld(rng, seen, 40)}
    leak(comments, tweets["train"], reports, lines["train"])

    write(raw / "goemotions/emotions.txt", "\n".join(LABELS))  # no line end after the last one, as in the original
    for split, rows in comments.items():
        text = ""
        for sentence, labels in rows:
            row_id = "e" + "".join(rng.choices(string.ascii_lowercase + string.digits, k=6))
            text += f"{sentence}\t{','.join(map(str, sorted(map(LABELS.index, labels))))}\t{row_id}\n"
        write(raw / f"goemotions/{split}.tsv", text)
    for split, rows in tweets.items():
        write(raw / f"semeval2018_ec/E-c-En-{split}.txt", "".join("\t".join(row) + "\n" for row in [EC_HEADER, *rows]))
    write(raw / "isear/isear.csv", "\n".join([ISEAR_HEADER, *map("|".join, reports)]))
    for split, rows in lines.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\r\n").writerows([MELD_HEADER.split(","), *rows])
        write(raw / f"meld/{split}_sent_emo.csv", text.getvalue())


if __name__ == "__main__":
    main()
