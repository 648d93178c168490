"""A tokenizer that ends every text in EOS, where the last token's state is the vector."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError, pretrained
from common.checkpoint.files import read_json, write_json


def ends_in_eos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether EOS, once, is the last token of a text, short or truncated. OPT's is its first one too."""
    texts = [tokenizer(text, truncation=True, max_length=8)["input_ids"] for text in ("a", "a b c d " * 8)]
    return all(ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[1:-1] for ids in texts)


def end_in_eos(tokenizer: PreTrainedTokenizerFast, model: str) -> None:
    """Let the tokenizer's own post-processor add EOS, so that truncation keeps it and every later loader has it.

    Raises UserError where there is no EOS; tokenize raises it where a text does not end in it.
    """
    if tokenizer.eos_token is None:
        raise UserError(f"{model}: its tokenizer has no EOS token, which pooling last needs: mean or cls do not")
    if not ends_in_eos(tokenizer):
        append_to_template(tokenizer.backend_tokenizer, tokenizer.eos_token, tokenizer.eos_token_id)


def append_to_template(backend: Tokenizer, token: str, token_id: int) -> None:
    """Let the post-processor put a token after each text: in the template that is there, or in a new one.

    Two templates in a row would not do: the second one would treat the first one's special tokens as texts.
    """
    state = json.loads(backend.to_str())
    processor = state["post_processor"]
    is_sequence = processor and processor["type"] == "Sequence"
    steps = processor["processors"] if is_sequence else [processor] if processor else []
    template = next((step for step in steps if step["type"] == "TemplateProcessing"), None)
    if template is None:
        texts = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
        template = {"type": "TemplateProcessing", "single": texts[:1], "pair": texts, "special_tokens": {}}
        steps.append(template)
    template["special_tokens"][token] = {"id": token, "ids": [token_id], "tokens": [token]}
    for form in ("single", "pair"):
        pieces = []
        for piece in template[form]:
            pieces.append(piece)
            if "Sequence" in piece:
                pieces.append({"SpecialToken": {"id": token, "type_id": piece["Sequence"]["type_id"]}})
        template[form] = pieces
    state["post_processor"] = {"type": "Sequence", "processors": steps}
    backend.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the tokenizer so that every loader takes it as it is.

    Under the name of its own class one might make it anew: Llama's did its post-processor, from add_eos_token, before
    transformers 5, and does the rest since.
    """
    pretrained.save_tokenizer(folder, tokenizer)
    path = folder / "tokenizer_config.json"
    write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})
