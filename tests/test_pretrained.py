"""The tokenizer and the shape of a pretrained model: what no reader of its folder would see, in all projects."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from launch import LINE, PROJECTS, ROOT, answering, config_of, module, run_here
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from common.checkpoint import UserError
from common.checkpoint.pretrained import check_texts, load_shape, load_tokenizer, save_tokenizer
from common.checkpoint.probe import check_architecture

BERT = ROOT / "afqmc" / "sample" / "model"  # WordPiece, lower case
PAIRS = ("afqmc", "evidence_spans")
ENCODERS = (*PAIRS, "emotions", "embeddings")
every_encoder = pytest.mark.parametrize("project", ENCODERS)
MIXED = "Ünïcode  café 12345, it's… 北京市 서울 कमी 👩‍🚀\u00a0a\u200bb ﬁne Ａ"


def model_folder(folder: Path, shape: dict, settings: dict | None, tokenizer: Path | None = BERT) -> Path:
    """BERT's tokenizer.json, or other files, under another config.json and tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    if tokenizer:
        shutil.copy(tokenizer / "tokenizer.json", folder)
    size = json.loads((BERT / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(size | shape), encoding="utf-8")
    if settings is not None:
        names = json.loads((BERT / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps(names | settings), encoding="utf-8")
    return folder


def find_tokenizer(project: str, folder: Path):
    pooling = {"pooling": "mean"} if project == "embeddings" else {}
    return module(project, "model").find_tokenizer(config_of(project, model=str(folder), **pooling))


def unigram(folder: Path, name: str, **changes) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model with DeBERTa's special tokens, trained on a few lines."""
    lines = [f"{a} {b} {c}" for a in ("the cat", "a dog", "le café") for b in ("sat", "ran…") for c in "北京市"] * 20
    (folder / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    sizes = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2}
    special = {"pad_id": 0, "unk_id": 3, "bos_id": -1, "eos_id": -1, "control_symbols": "[CLS],[SEP]"}
    files = {"input": str(folder / "lines.txt"), "model_prefix": str(folder / "unigram")}
    special |= {"pad_piece": "[PAD]", "unk_piece": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(**files, **sizes | special | changes)
    (folder / "unigram.model").rename(folder / name)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / name))


@pytest.mark.parametrize("tokenizer_class", ["BertTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("project", PAIRS)
def test_two_texts_are_told_by_types_whatever_the_tokenizers_class_says(project, tokenizer_class, tmp_path):
    folder = model_folder(tmp_path / "model", {}, {"tokenizer_class": tokenizer_class})
    tokenizer = find_tokenizer(project, folder)
    save_tokenizer(tmp_path, tokenizer)
    pair = dict(tokenizer("a b", "c"))
    assert (
        pair["token_type_ids"] == [0, 0, 0, 0, 1, 1]
        and dict(AutoTokenizer.from_pretrained(tmp_path)("a b", "c")) == pair
    )


@pytest.mark.parametrize("project", PAIRS)
def test_types_that_a_tokenizer_cannot_tell_end_the_run_where_the_model_has_two(project, tmp_path):
    backend = Tokenizer.from_file(str(BERT / "tokenizer.json"))
    state = json.loads(backend.to_str())
    for piece in state["post_processor"]["pair"]:
        next(iter(piece.values()))["type_id"] = 0
    folder = model_folder(tmp_path / "model", {}, {"tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(UserError, match="token types 0 and 1"):
        find_tokenizer(project, folder)
    assert find_tokenizer("emotions", folder)("a b")["token_type_ids"] == [0] * 4  # of single texts all are 0


@pytest.mark.parametrize("project", ["afqmc", "emotions"])
def test_a_roberta_with_berts_tokenizer_works_in_the_readmes_snippet(project, tmp_path):
    shape = {"model_type": "roberta", "type_vocab_size": 1, "max_position_embeddings": 80, "pad_token_id": 1}
    folder = model_folder(tmp_path / "model", shape, {})
    parts, config = module(project, "model"), config_of(project, model=str(folder), init="random", max_length=64)
    tokenizer = parts.find_tokenizer(config)
    (tmp_path / "best").mkdir()
    if project == "afqmc":
        parts.save_model(parts.build_model(config), tokenizer, 0.5, tmp_path / "best")
    else:
        model = parts.build_model(config, torch.zeros(2), ("a", "b"))
        parts.save_model(model.state_dict(), model.config, tokenizer, {}, tmp_path / "best")
    answer = pipeline("text-classification", model=str(tmp_path / "best"))({"text": "a ☃ b", "text_pair": "c"})
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "best")
    assert "token_type_ids" not in reloaded("a", "b") and "label" in str(answer)
    if project == "afqmc":  # [UNK] has the number of RoBERTa's padding, which has a position of its own
        batch = dict(reloaded(["a ☃ b", "a"], ["c", "b c d"], padding=True, return_tensors="pt"))
        library = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best").eval()
        torch.testing.assert_close(parts.load_model(tmp_path / "best")(**batch), library(**batch).logits)


@pytest.mark.parametrize("name", ["RobertaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "AlbertTokenizer"])
@every_encoder
def test_a_class_that_splits_otherwise_than_the_tokenizers_own_file_ends_the_run(project, name, tmp_path):
    folder = model_folder(tmp_path / "model", {}, {"tokenizer_class": name})
    with pytest.raises(UserError, match="tokenizer"):
        find_tokenizer(project, folder)


def test_the_texts_of_a_file_are_compared_as_well(tmp_path):
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "ก": 4}, unk_token="[UNK]"))
    folder = model_folder(tmp_path / "model", {}, {"tokenizer_class": "PreTrainedTokenizerFast"}, None)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder, load_shape(folder), 64)
    check_texts(tokenizer, ["a", "ก"] * 300)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("ก", "a")  # a script that no line of ours holds
    check_texts(tokenizer, ["a"] * 300)
    with pytest.raises(UserError, match=r"PreTrainedTokenizerFast|TokenizersBackend"):
        check_texts(tokenizer, ["a"] * 300 + ["ก"] * 100)


@every_encoder
def test_a_cased_vocabulary_is_loaded_cased_and_said_unless_its_folder_asks_for_lower_case(project, tmp_path, capsys):
    words = [f"{start}{letter}" for start in ("", "##", "W") for letter in "abcdefgh"]
    folder = model_folder(tmp_path / "model", {}, None, None)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = find_tokenizer(project, folder)
    assert tokenizer.tokenize("Wa wa") == ["Wa", "[UNK]"] and "cased" in capsys.readouterr().out
    model_folder(folder, {}, {"do_lower_case": True}, None)
    with pytest.raises(UserError, match="capitals"):
        find_tokenizer(project, folder)


def test_capitals_behind_a_mark_of_a_words_start_are_no_lower_case(tmp_path):
    """Llama 2's normalizer puts ▁ before a text, and lowers nothing."""
    backend = Tokenizer.from_file(str(ROOT / "embeddings" / "sample" / "model" / "tokenizer.json"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    folder = model_folder(
        tmp_path / "model", {"model_type": "llama"}, {"tokenizer_class": "PreTrainedTokenizerFast"}, None
    )
    backend.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder, load_shape(folder), 64, decoder=True).tokenize("A") != ["▁", "a"]


def test_a_decoders_padding_without_an_embedding_gives_way_to_its_end_of_text(tmp_path):
    sample = ROOT / "embeddings" / "sample" / "model"
    folder = Path(shutil.copytree(sample, tmp_path / "model"))
    size = load_shape(sample).vocab_size
    backend = Tokenizer.from_file(str(sample / "tokenizer.json"))
    backend.add_special_tokens([f"<new{number}>" for number in range(size - backend.get_vocab_size() + 1)])
    backend.save(str(folder / "tokenizer.json"))
    settings = json.loads((sample / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["pad_token"] = backend.id_to_token(size)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load_tokenizer(folder, load_shape(folder), 64, decoder=True)
    assert tokenizer.pad_token == tokenizer.eos_token
    with pytest.raises(UserError, match="the padding"):
        load_tokenizer(folder, load_shape(folder), 64)


@pytest.mark.parametrize("project", ["afqmc", "emotions"])
@pytest.mark.parametrize("fault, words", [("unk", "fails at"), ("nopost", "special tokens"), ("type 2", "token type")])
def test_a_tokenizer_that_cannot_do_its_models_work_is_refused_when_it_is_loaded(project, fault, words, tmp_path):
    folder = model_folder(tmp_path / "model", {}, {"tokenizer_class": "PreTrainedTokenizerFast"})
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if fault == "unk":  # of a name that the vocabulary lacks
        state["model"]["unk_token"] = "<none>"
    elif fault == "nopost":
        state["post_processor"] = None
    else:
        for form in ("single", "pair"):
            state["post_processor"][form][-1]["SpecialToken"]["type_id"] = 2
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        find_tokenizer(project, folder)


def test_a_single_texts_token_types_are_all_0_as_its_batches_have_them(tmp_path):
    folder = model_folder(tmp_path / "model", {}, {"tokenizer_class": "PreTrainedTokenizerFast"})
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    state["post_processor"]["single"][-1]["SpecialToken"]["type_id"] = 1  # which the model has
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    find_tokenizer("afqmc", folder)  # of pairs
    with pytest.raises(UserError, match="token type 1, which no batch holds"):
        find_tokenizer("emotions", folder)


OTHER_KINDS = {
    "bpe": {"model_type": "bpe"},
    "no dummy prefix": {"add_dummy_prefix": False},
    "suffix": {"treat_whitespace_as_suffix": True},
    "bytes": {"byte_fallback": True, "vocab_size": 320},
    "blanks": {"remove_extra_whitespaces": False},
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_sentencepiece_model_of_another_kind_is_refused(kind, tmp_path):
    folder = model_folder(tmp_path / "model", {"type_vocab_size": 0}, None, None)
    unigram(folder, "spm.model", **OTHER_KINDS[kind])
    with pytest.raises(UserError, match=r"spm\.model itself"):
        find_tokenizer("emotions", folder)


@every_encoder
def test_debertas_sentencepiece_model_alone_is_read_as_sentencepiece_reads_it(project, tmp_path):
    folder = model_folder(tmp_path / "model", {} if project in PAIRS else {"type_vocab_size": 0}, None, None)
    reference = unigram(folder, "spm.model")
    tokenizer = find_tokenizer(project, folder)
    for text in (MIXED, "the\u00a0cat\u2003sat…", "\u200bthe \u200b dog\ufeff", "ｃａｔ ①", " a  dog\t\nran ", "ﬃ ½ Å"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), text


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.bpe.model", "tokenizer.model"])
def test_other_sentencepiece_models_alone_are_refused_by_what_they_need(name, tmp_path):
    folder = model_folder(tmp_path / "model", {}, None, None)
    unigram(folder, name)
    with pytest.raises(UserError, match=rf"tokenizer\.json.*{name}"):
        find_tokenizer("emotions", folder)


TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": 90}
POSITIONS = {  # which of 40 are a text's: RoBERTa's begin behind the padding's, XLNet and Llama have no end
    "bert": 40,
    "roberta": 38,
    "data2vec-text": 38,
    "mpnet": 38,
    "distilbert": 40,
    "opt": 40,
    "gpt2": 40,
    "xlnet": None,
    "llama": None,
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_the_limit_is_the_one_at_which_the_whole_model_breaks(kind, capsys):
    own = {"n_inner": 48} if kind == "gpt2" else {"ffn_dim": 48, "word_embed_proj_dim": 32} if kind == "opt" else {}
    xlnet = {"d_model": 32, "n_head": 2, "n_layer": 3, "d_inner": 48, "vocab_size": 90}
    shape = AutoConfig.for_model(kind, **xlnet if kind == "xlnet" else TINY | own | {"max_position_embeddings": 40})
    limit, model = POSITIONS[kind], AutoModel.from_config(shape).eval()
    before = torch.random.get_rng_state()
    for length in (limit or 200, (limit or 200) + 1):
        ids = torch.full((1, length), 7)
        if limit is None or length == limit:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            check_architecture("m", shape, length)
            continue
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        with pytest.raises(UserError, match=f"max_length {length} is more than the {limit} positions"):
            check_architecture("m", shape, length)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert ("beyond the 40" in capsys.readouterr().out) == (kind == "llama")


@pytest.mark.parametrize("kind, padding, limit", [("roberta", 32, 67), ("roberta", 50, 49), ("mpnet", 0, 98)])
def test_the_limit_is_true_whatever_the_paddings_number(kind, padding, limit):
    own = {"max_position_embeddings": 100, "pad_token_id": padding}
    shape = AutoConfig.for_model(kind, **TINY | own)
    check_architecture("m", shape, limit)
    with pytest.raises(UserError, match=f"more than the {limit} positions"):
        check_architecture("m", shape, limit + 1)


def test_a_config_without_a_padding_that_its_model_needs_is_refused():
    with pytest.raises(UserError, match="roberta model"):
        check_architecture("m", AutoConfig.for_model("roberta", **TINY | {"pad_token_id": None}), 64)


def test_an_architecture_that_mixes_padding_in_is_refused_by_name():
    shape = AutoConfig.for_model("fnet", **TINY | {"type_vocab_size": 4})
    model = AutoModel.from_config(shape).eval()
    alone, padded = torch.full((1, 5), 7), torch.tensor([[7] * 5 + [3] * 7])
    assert not torch.allclose(model(alone).last_hidden_state, model(padded).last_hidden_state[:, :5], atol=1e-3)
    with pytest.raises(UserError, match=r"a fnet model.*other texts of its batch"):
        check_architecture("m", shape, 64)
    check_architecture("m", AutoConfig.for_model("bert", **TINY), 64)


@pytest.mark.slow
@pytest.mark.parametrize("project", PROJECTS)
def test_a_token_without_an_embedding_is_refused_only_where_it_occurs(project, short_run, tmp_path):
    run = Path(shutil.copytree(short_run(project), tmp_path / "run"))
    saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
    folder = run / "best"
    if not (folder / "tokenizer.json").exists():  # redsm5_nli's is the base model's
        folder = Path(shutil.copytree(ROOT / saved["config"]["model"], tmp_path / "model"))
        saved["config"]["model"] = str(folder)
        del saved["environment"]["model"]  # which another tokenizer would not be
        (run / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    backend.add_special_tokens([f"<new{number}>" for number in range(size - backend.get_vocab_size() + 1)])
    backend.save(str(folder / "tokenizer.json"))
    last = backend.id_to_token(size)

    code, answer, said = run_here(answering(project), "--run_dir", run, text=LINE)
    assert code == 0 and answer, said
    _, _, said = run_here(answering(project), "--run_dir", run, text=LINE.replace("sleep", last).replace("款", last))
    assert last in said and said.count("\n") == 1 and "embeddings" in said
