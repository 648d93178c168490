"""Pretrain a small BERT on the training pairs themselves, by MacBERT's objective (arXiv 2004.13922, section 3).

    python afqmc/pretrain.py --preset pretrain --data_dir ... --model ...    # a BERT's config.json and tokenizer
    python afqmc/train.py --preset scratch --data_dir ... --model afqmc/runs/pretrained/.../best

One to four words in a row are masked, 80 % by a similar word, 10 % by any word, 10 % stay as they are, and the model
says what stood there. There is no [MASK], which fine-tuning would never see; masking.py finds words and similar ones.
Both sentences of a pair are read at once, in either order: what is masked in one can be found in the other. Pairs with
a sentence of validation or test are left out. MacBERT's order of sentences is not predicted: a pair has none. Killed
and started again, it goes on where it was. best/ is a BertForMaskedLM. What --help shows are the settings that count.
"""

import math
import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForMaskedLM, BertForMaskedLM, PreTrainedTokenizerFast

from afqmc.cli import displayed, run_path, run_script, run_settings
from afqmc.config import Config
from afqmc.dataset import Split, collate, data_digests, epoch_batches, load_splits, make_split
from afqmc.masking import find_similar, find_words, mask_words, segment
from afqmc.model import find_model, find_tokenizer
from afqmc.train import make_optimizer, update
from common.checkpoint import UserError
from common.checkpoint.attention import take_faster_attention
from common.checkpoint.environment import autocast_dtype, environment, pick_device
from common.checkpoint.pretrained import load_part, load_shape, save_tokenizer
from common.checkpoint.progress import Best, Progress, StopSignal
from common.checkpoint.run import Run, read_results
from common.checkpoint.texts import same_text
from common.seed import mix, seed_everything, seed_micro_batch

SETTINGS = ("data_dir", "model", "init", "run_dir", "test_fraction", "validation_fraction", "split_seed", "max_length")
SETTINGS += ("learning_rate", "weight_decay", "warmup_ratio", "max_grad_norm", "batch_size", "epochs", "max_steps")
SETTINGS += ("seed", "deterministic", "amp", "logging_steps", "save_steps")


def read_pairs(config: Config, tokenizer: PreTrainedTokenizerFast) -> Split:
    """The training pairs in both orders, without those that have a sentence of another split. Raises UserError."""
    splits = load_splits(config, tokenizer)
    train = splits.pop("train")
    held = {same_text(text) for split in splits.values() for pair in split.pairs for text in pair[:2]}
    pairs = [pair for pair in train.pairs if held.isdisjoint(map(same_text, pair[:2]))]
    print(f"{len(pairs)} pairs; left out, with a sentence of validation or test: {len(train.pairs) - len(pairs)}")
    if not pairs:
        raise UserError("no pair is left to pretrain on: each has a sentence that stands in validation or test")
    pairs += [pair._replace(sentence1=pair.sentence2, sentence2=pair.sentence1) for pair in pairs]
    return make_split(pairs, tokenizer, train.names)


def masked_losses(model: BertForMaskedLM, rows: list[int], splits: tuple[Split, ...], max_length: int) -> Tensor:
    """The loss of each masked token of a batch. splits: as it is, with masked words, and the marks of these."""
    batch, inputs, marks = (collate(rows, split, max_length) for split in splits)
    inputs, masked = {name: column.to(model.device) for name, column in inputs.items()}, marks["input_ids"].bool()
    states = model.bert(**inputs).last_hidden_state[masked.to(model.device)]  # all tokens' logits would cost more
    targets = batch["input_ids"][masked].to(model.device)
    return F.cross_entropy(model.cls(states).float(), targets, reduction="none")


def main(config: Config) -> int | None:
    # Setup
    path, data = run_path(config), data_digests(config)
    path = path if config.run_dir else path.parent / "pretrained" / path.name
    if results := read_results(path, run_settings(config), data):
        print(f"finished before | loss {results['best']:.4f} | {displayed(path / 'best')}")
        return None
    seed_everything(config.seed, config.deterministic)
    device = pick_device()
    dtype = autocast_dtype(config.amp, device)

    # Data
    tokenizer, source = find_tokenizer(config), find_model(config)
    split = read_pairs(config, tokenizer)
    rows = [split.tokens[number].tolist() for number in range(len(split.tokens))]
    words = find_words(rows[: len(rows) // 2])  # the other half is the same in the other order
    sentences = [segment(row, words) for row in rows]
    similar = find_similar(sentences[: len(rows) // 2])
    print(f"{sum(len(word) > 1 for word in words)} words of several tokens, {len(similar)} with neighbours")
    lengths = split.lengths.clip(max=config.max_length)
    steps_per_epoch = math.ceil(len(lengths) / config.batch_size)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)

    # Model and optimizer
    if (shape := load_shape(source)).model_type != "bert":
        raise UserError(f"{config.model} is a {shape.model_type} model: only BERT is pretrained here")
    if config.init == "random":
        model = AutoModelForMaskedLM.from_config(shape, dtype=torch.float32)
    else:
        model = load_part(source, "model", AutoModelForMaskedLM.from_pretrained, dtype=torch.float32)
    take_faster_attention(model.to(device))
    optimizer, scheduler = make_optimizer(model, total_steps, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Resume
    best, progress = Best("min", 0), Progress()
    state = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, best=best, progress=progress)
    run = Run(path, run_settings(config), {"autocast": str(dtype)}, environment(device), data=data)
    print(f"{'resuming' if run.restore(state) else 'starting'} at step {progress.step} in {displayed(path)}")

    # Loop
    model.train()
    with StopSignal() as stop:
        progress.start()
        for epoch in range(progress.epoch, math.ceil(total_steps / steps_per_epoch)):
            splits = (split, *mask_words(split, sentences, similar, mix(config.seed, epoch)))
            batches = epoch_batches(lengths, config.batch_size, config.seed, epoch)
            batches = batches[progress.step_in_epoch : total_steps - epoch * steps_per_epoch]
            for rows in batches:
                seed_micro_batch(config.seed, progress.step, 0)
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    losses = masked_losses(model, rows, splits, config.max_length)
                scaler.scale(losses.mean()).backward()
                scaler.unscale_(optimizer)
                grad_norm = clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf).item()
                loss, norm = losses.mean().item(), 0.0 if scaler.is_enabled() else grad_norm
                if not math.isfinite(loss + norm):
                    what = f"the loss is {loss}, the gradient's norm {norm} at step {progress.step + 1}"
                    raise UserError(f"{what}: a lower learning_rate may help")
                rate, skipped = scheduler.get_last_lr()[0], not update(optimizer, scheduler, scaler)
                progress.add_step(loss * len(losses), len(losses), int(lengths[rows].sum()), skipped)
                if progress.step % config.logging_steps == 0:
                    epochs = progress.step / steps_per_epoch
                    print(run.log_step(progress, total_steps, epochs, loss, rate, grad_norm))
                if epoch_ended := rows is batches[-1]:
                    progress.end_epoch()
                    best.update(progress.mean_loss(), epoch + 1, progress.step)
                if (stopped := stop.number) or epoch_ended or progress.step % config.save_steps == 0:
                    run.save_last(state)
                if stopped:
                    print(f"stopped at step {progress.step} of {total_steps}: the same command goes on from here")
                    return 128 + stopped
    run.save_best(lambda folder: (model.save_pretrained(folder), save_tokenizer(folder, tokenizer)))
    progress.note_memory(device)
    results = run.finish("loss", best, progress, split="train")
    print(f"done | loss {results['best']:.4f} | {results['seconds']:.0f} s | {displayed(path / 'best')}")


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__, resumes=True, shown=SETTINGS))
