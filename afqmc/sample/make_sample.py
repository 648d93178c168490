"""Make the sample beside this file: a small data set and a tiny BERT, both in the format of the real thing.

The data set has the format of CLUE's AFQMC (do two customer questions about a loan product mean the same?), but every
sentence in it is original and the product, 纸船贷, is made up. Two sentences of one row get the label "1" if they have
the same intent, else "0", and then their intents stand beside each other in INTENTS. The intents come equally often
under both labels and on both sides, so that neither sentence tells the label alone; a model has to compare the two.
As real files do, train.json has a few repeated rows (some with the sentences swapped), blank lines, typos and masked
figures (***).

The model folder holds a BERT's config and tokenizer without weights. Its vocabulary is made for Chinese text in
general (GB2312 level 1, punctuation, ASCII), so the same tiny model can be trained from scratch on the real AFQMC.

    python afqmc/sample/make_sample.py

writes train.json, dev.json, test.json and model/ next to this file, the same bytes every time.
"""

import itertools
import json
import random
import re
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).resolve().parent
SEED = 20
SHARE_OF_ONES = 0.31
TRAIN_ROWS, DEV_ROWS, TEST_ROWS = 2500, 420, 100  # TRAIN_ROWS includes the repeated rows
REPEATED_ROWS = ((40, False), (377, False), (901, True), (1502, True), (2044, True))  # (which row, swapped?)
BLANK_LINES_BEFORE = (613, 1780)
LONG_ROWS = 8  # how many rows of train.json start with one of LONG_OPENERS

# Wordings by intent. [a|b|c] is a choice, {p} the product; a {p} that starts the wording may be left out.
# "ask" holds questions; "say" holds wishes, which take other openers and endings.
INTENTS = {
    "raise the credit limit": {
        "ask": [
            "{p}[怎么|如何|怎样才能]提高额度",
            "[怎么|咋|如何]给{p}提额",
            "{p}额度[太低了|太少了|不够用|只有***元]，能[调高|提高|涨]一点吗",
            "{p}[可以|能]申请提额吗",
            "{p}[能不能|可不可以]多借[点|一些]，额度不够",
            "{p}额度[在哪里|怎么|如何]提升",
        ],
        "say": ["我想[提升|增加|提高]{p}的额度", "想把{p}额度[调高|提高|涨][一点|一些]"],
    },
    "close the product": {
        "ask": [
            "{p}[怎么|如何|在哪里|咋]注销",
            "{p}[可以|能][关闭|注销]吗",
            "不想用{p}了，[怎么|如何|在哪里][关掉|关闭|注销]",
            "[怎么|如何]关闭{p}[服务|功能|]",
            "{p}以后不用了，[怎么|如何]取消",
            "{p}[能不能|可不可以][取消|关掉]，不想用了",
        ],
        "say": ["我想[关掉|注销|取消]{p}", "想把{p}[账户|账号|][注销|关闭]"],
    },
    "consequences of late payment": {
        "ask": [
            "{p}逾期[会怎么样|会怎样|有什么后果|有什么影响]",
            "{p}晚还[几天|两天|一天][会怎么样|有什么后果|有影响吗]",
            "{p}没按时还款[会怎么样|有什么后果|会有影响吗]",
            "{p}忘记还款[会怎么样|有什么后果|会影响征信吗]",
            "{p}逾期[几天|一天|***天][会不会|是不是会]上征信",
            "{p}过了还款日没还[会怎么样|有什么后果|会影响征信吗]",
        ],
    },
    "change the repayment day": {
        "ask": [
            "{p}[怎么|如何|在哪里]修改还款日",
            "{p}[可以|能][改|换]还款日[期|]吗",
            "{p}还款日[能不能|可不可以]换[一天|个日子]",
            "{p}还款日能[改到|换到|调到]发工资[那天|以后]吗",
            "{p}还款日期[怎么|如何|在哪里][更改|变更|调整]",
            "{p}[能不能|可不可以]改成[月底|月初|15号|20号|***号]还款",
        ],
        "say": ["我想[换|改|调整]一下{p}的还款日", "想把{p}的还款日往后[挪|推|调]几天"],
    },
    "repay early": {
        "ask": [
            "{p}[怎么|如何|在哪里]提前还款",
            "{p}[可以|能]提前还[款|清|完]吗",
            "{p}没到期[可以|能]先[还清|结清]吗",
            "{p}剩下的钱[能不能|可不可以]一次性[还清|还完|结清]",
            "{p}[能不能|可不可以]全部提前结清",
            "[怎么|如何]一次性[还清|结清]{p}",
        ],
        "say": ["我想[提前|一次性][结清|还清]{p}", "手里有钱了，想把{p}[提前|一次性]还[完|清]"],
    },
    "instalment fees": {
        "ask": [
            "{p}分期[的手续费|手续费]是多少",
            "{p}分[3|6|12|***]期[手续费|利息]怎么算",
            "{p}分期[有|要|收]手续费吗",
            "{p}分期的利息[高吗|高不高|怎么算|是多少]",
            "{p}账单分期[怎么收费|收多少手续费|利息多少]",
            "{p}分期每[期|个月]要[交|付]多少[手续费|利息]",
        ],
    },
}
PRODUCTS = ("纸船贷", "纸船贷", "纸船贷", "纸船")
OPENERS = {
    "ask": ("", "", "", "", "", "", "", "请问", "请问", "你好，", "客服，"),
    "say": ("", "", "", "", "", "你好，", "客服，"),
}
ENDINGS = {
    "ask": ("", "", "", "", "", "", "？", "？", "?", "，谢谢", "呢", "啊"),
    "say": ("", "", "", "", "。", "，可以吗", "，谢谢"),
}
LONG_OPENERS = (
    "你好，我是去年朋友推荐来的老用户，最近遇到一个问题，",
    "打了好几次电话都没有人接，只好在这里问一下，",
    "我在手机上找了半天也没有找到在哪里看，想请教一下，",
    "最近换了新工作，手头的事情比较多，一直没来得及问，",
)
TYPOS = (("额度", "额渡"), ("还款", "还宽"), ("提前", "题前"), ("逾期", "预期"), ("注销", "注消"), ("手续费", "手续废"),
         ("账单", "帐单"), ("怎么", "怎末"), ("可以", "可已"), ("请问", "清问"))  # fmt: skip
TYPO_SHARE = 0.02

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are 0 to 4
PUNCTUATION = "，。？！、；：“”‘’（）《》〈〉【】「」…—～·￥％＋"
# particles and traditional characters that people type and GB2312 level 1 lacks
MORE_CHARACTERS = "呗喽喔咧嘞咔嗨嗯咯哒啵吖沒麼麽嗎為還額請個開錢時給兩幫"
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.05,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}


def sentence(rng: random.Random, intent: str, long: bool = False) -> str:
    """One wording of an intent, with an opener, an ending and now and then a typo."""
    kind, core = rng.choice([(kind, core) for kind, cores in INTENTS[intent].items() for core in cores])
    if core.startswith("{p}") and rng.random() < 0.4:
        core = core.removeprefix("{p}")
    core = re.sub(r"\[([^]]*)\]", lambda choice: rng.choice(choice[1].split("|")), core)
    core = core.replace("{p}", rng.choice(PRODUCTS))
    opener = rng.choice(LONG_OPENERS if long else OPENERS[kind])
    ending = rng.choice(ENDINGS[kind])
    if core.endswith(("吗", "了")) and ending in ("呢", "啊"):
        ending = ""
    text = opener + core + ending
    if rng.random() < TYPO_SHARE:
        right, wrong = rng.choice([typo for typo in TYPOS if typo[0] in text] or [("", "")])
        text = text.replace(right, wrong, 1) if right else text
    return text


def labelled_intents(n_rows: int) -> list[tuple[str, str, str]]:
    """n_rows of (label, intent 1, intent 2): the share of ones as set, every intent as often under either label."""
    intents = list(INTENTS)
    neighbours = [(intents[i - 1], intent) for i, intent in enumerate(intents)]  # the first one follows the last one
    same = itertools.cycle([("1", intent, intent) for intent in intents])
    different = itertools.cycle([("0", *pair) for one, other in neighbours for pair in ((one, other), (other, one))])
    n_ones = round(n_rows * SHARE_OF_ONES)
    return [*itertools.islice(same, n_ones), *itertools.islice(different, n_rows - n_ones)]


def make_rows(rng: random.Random, n_rows: int, seen: set[frozenset], n_long: int = 0) -> list[dict]:
    """n_rows of unlike sentences in random order; `seen` holds the unordered pairs that may not come again."""
    plan = labelled_intents(n_rows)
    rng.shuffle(plan)
    rows = []
    for label, intent1, intent2 in plan:
        pair = {""}
        while len(pair) < 2 or pair in seen:
            texts = sentence(rng, intent1, long=len(rows) < n_long), sentence(rng, intent2)
            pair = frozenset(texts)
        seen.add(pair)
        rows.append({"sentence1": texts[0], "sentence2": texts[1], "label": label})
    rng.shuffle(rows)
    return rows


def repeat_some(rng: random.Random, rows: list[dict]) -> None:
    """Put the REPEATED_ROWS in once more, at random places."""
    again = [{**rows[i], "sentence1": rows[i]["sentence2"], "sentence2": rows[i]["sentence1"]} if swapped else rows[i]
             for i, swapped in REPEATED_ROWS]  # fmt: skip
    for row in again:
        rows.insert(rng.randrange(len(rows) + 1), row)


def vocabulary(sample_text: str) -> list[str]:
    """The tokens in order of their ids."""
    ascii_characters = string.digits + string.ascii_lowercase + string.punctuation  # the tokenizer lower-cases
    cells = itertools.product(range(16, 56), range(1, 95))  # GB2312 level 1 fills rows 16 to 55 but for five cells
    hanzi = [bytes((0xA0 + row, 0xA0 + cell)).decode("gb2312", "ignore") for row, cell in cells]
    characters = [*ascii_characters, *PUNCTUATION, *hanzi, *MORE_CHARACTERS, *sorted(set(sample_text.lower()))]
    continuations = ["##" + character for character in string.digits + string.ascii_lowercase]
    return list(dict.fromkeys([*SPECIAL_TOKENS, *filter(str.strip, characters), *continuations]))


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


def write_rows(path: Path, rows: list[dict], blank_lines_before: tuple[int, ...] = ()) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(rows):
            file.write("\n" * (number in blank_lines_before) + json.dumps(row, ensure_ascii=False) + "\n")


def write_model(folder: Path, tokens: list[str]) -> None:
    """The config of a tiny BERT and the files of its tokenizer."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {**CONFIG, "vocab_size": len(tokens)})
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer.decoder = decoders.WordPiece()
    (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8", newline="\n")
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 128, **names},
    )


def main(folder: Path = HERE) -> None:
    rng = random.Random(SEED)
    seen = set()
    train = make_rows(rng, TRAIN_ROWS - len(REPEATED_ROWS), seen, LONG_ROWS)
    dev = make_rows(rng, DEV_ROWS, seen)
    test = make_rows(rng, TEST_ROWS, seen)
    repeat_some(rng, train)
    for number, row in enumerate(test):
        test[number] = {"id": number, "sentence1": row["sentence1"], "sentence2": row["sentence2"]}
    write_rows(folder / "train.json", train, BLANK_LINES_BEFORE)
    write_rows(folder / "dev.json", dev)
    write_rows(folder / "test.json", test)
    text = "".join(row["sentence1"] + row["sentence2"] for row in train + dev + test)
    write_model(folder / "model", vocabulary(text))


if __name__ == "__main__":
    main()
