"""DeBERTa-v3's tokenizer from the sentencepiece model that its checkpoints hold instead of a tokenizer.json.

transformers converts spm.model only where protobuf is installed, and since its version 5 leaves out the model's own
normalisation (nmt_nfkc: full-width letters, ligatures, odd spaces), with which the checkpoints were trained. Here the
few fields that matter are read from the file itself; the ids are sentencepiece's own.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

UNKNOWN, USER_DEFINED = 2, 4  # a piece's type, in sentencepiece_model.proto


def protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message of the protobuf wire format: (number, value), a nested message as its bytes.

    Raises ValueError or IndexError where data is none.
    """
    place = 0

    def varint() -> int:  # seven bits a byte, the lowest first; the eighth says that another follows
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {place}")
        size = {1: 8, 5: 4}.get(wire) or varint()
        if place + size > len(data):
            raise ValueError("the file is cut off")
        yield number, data[place : place + size]
        place += size


def read_spm(data: bytes) -> tuple[list[tuple[str, float, int]], bytes]:
    """The pieces of a sentencepiece model as (text, score, type), and its character map, empty where it has none."""
    pieces, charsmap = [], b""
    for number, value in protobuf_fields(data):
        if number == 1:  # ModelProto.pieces: text 1, score 2, type 3 (1 where it is left out)
            piece = dict(protobuf_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, 1)))
        elif number == 3:  # ModelProto.normalizer_spec: precompiled_charsmap 2
            charsmap = dict(protobuf_fields(value)).get(2, b"")
    return pieces, charsmap


def spm_tokenizer(path: Path, lower_case: bool = False) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Unigram sentencepiece model with DeBERTa-v3's special tokens: [CLS] text [SEP].

    [MASK], which the model does not hold, follows its pieces, as in the checkpoints. Raises ValueError or LookupError
    where the file is damaged or has no such tokens.
    """
    pieces, charsmap = read_spm(path.read_bytes())
    unknown = next(index for index, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN)
    tokenizer = Tokenizer(models.Unigram([(text, score) for text, score, _ in pieces], unknown, byte_fallback=False))
    steps = [normalizers.Lowercase()] if lower_case else []
    steps += [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text, _, kind in pieces if kind == USER_DEFINED])
    ids = {text: index for index, (text, _, _) in enumerate(pieces)}
    ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ends
    )
    special = {"bos_token": "[CLS]", "eos_token": "[SEP]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special |= {"pad_token": "[PAD]", "unk_token": pieces[unknown][0], "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
