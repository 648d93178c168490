"""Train a sentence embedder; started again after a stop of any kind, it goes on where it was.

    python embeddings/train.py --sample             # offline, the bundled triplets, about a minute on 2 cores
    python embeddings/train.py --check              # read all data, run one batch, write nothing
    python embeddings/train.py                      # the real run, after prepare.py and minicpm.py
    torchrun --nproc_per_node 2 embeddings/train.py
"""

import math
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, environment
from common.checkpoint.progress import Best, Progress, StopSignal, TrainedParameters
from common.checkpoint.run import Run, read_results
from common.checkpoint.tokens import Tokens
from common.seed import seed_everything, seed_micro_batch
from embeddings.batching import (
    chunk_texts,
    draw_epochs,
    forward_tokens,
    lengths_of,
    make_chunks,
    pad,
    rows_missed,
    tokenize,
    tokenize_rows,
)
from embeddings.cli import displayed, run_path, run_script, run_settings
from embeddings.config import Config
from embeddings.dataset import data_digests, load_splits
from embeddings.evaluate import evaluate_run, validate
from embeddings.grad_cache import cached_backward
from embeddings.lora import save_adapter
from embeddings.loss import info_nce, parse_dims
from embeddings.model import Embedder, build_model, find_tokenizer, save_merged
from embeddings.parallel import all_reduce, all_reduce_gradients, barrier, end_processes, rank_0_first, start_processes
from embeddings.report import epoch_line, evaluation_line, last_line, print_summary
from embeddings.rows import Triplet


def make_optimizer(model: Embedder, config: Config) -> tuple[Optimizer, LRScheduler]:
    """AdamW on the low-rank matrices alone; warm-up, then decay."""
    adamw = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(model.trained_parameters(), **adamw)

    def share_of_peak(step: int) -> float:  # not 0 at the first step, which would train nothing
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        return 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2

    return optimizer, LambdaLR(optimizer, share_of_peak)


def update(optimizer: Optimizer, scheduler: LRScheduler, scaler: torch.amp.GradScaler) -> bool:
    """One optimizer step, unless the scaler finds an overflow; the schedule moves only if the optimizer did.

    Returns whether it did.
    """
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if moved := scaler.get_scale() >= scale:  # the scaler lowers its scale when it skips a step
        scheduler.step()
    return moved


def refuse_non_finite(loss: float, grad_norm: float, batch: np.ndarray, triplets: list[Triplet], step: int) -> None:
    """End the run, naming the batch, before a loss or gradient that is not a number reaches the weights."""
    for what, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            lines = ", ".join(str(triplets[row].line) for row in batch)
            raise UserError(
                f"the {what} is {value} at step {step + 1}, in the batch of training lines {lines}; best/ is "
                "untouched. A lower learning_rate or amp off may help"
            )


def embed_chunk(
    model: Embedder,
    tokens: Tokens,
    chunks: list[np.ndarray],
    autocast: Callable,
    seeds: tuple[int, int, int],
    number: int,
) -> Tensor:
    """The vectors (S, D) of a chunk's texts, with the dropout that belongs to its number.

    They pass through the model in parts of like length, all with their graphs: on a CPU a batch hardly pads.
    """
    seed, step, rank = seeds
    seed_micro_batch(seed, step, number, rank)
    texts, device, vectors = chunks[number], model.encoder.device, []
    for part in make_chunks(lengths_of(tokens, texts), forward_tokens(device)):  # longest first, as the texts are
        batch = pad(tokens, texts[part])
        with autocast():
            vectors.append(model(**{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}))
    return torch.cat(vectors)


def batch_loss(order: np.ndarray, scaler: torch.amp.GradScaler, config: Config, vectors: Tensor) -> Tensor:
    """This process's part of the batch's mean loss, scaled: the gradients of all parts are summed.

    order: (2 + K, b), where each text of its rows is among the vectors, -1 where it has fewer than K negatives.
    """
    margin = config.false_negative_margin if config.mask_false_negatives else None
    dims = parse_dims(config.matryoshka_dims)
    places = torch.from_numpy(order).to(vectors.device)
    loss = info_nce(vectors[places], config.temperature, dims, margin, places >= 0)  # vectors (2 + K, b, D)
    return scaler.scale(loss / config.batch_size)


def main(config: Config, check: bool = False) -> int | None:
    # Setup
    path = run_path(config)
    processes = start_processes()
    rank, world, device = processes
    data = data_digests(config)
    if not check and (results := read_results(path, run_settings(config), data)):
        print(f"finished before\n{last_line(results, displayed(path))}")
        return end_processes()
    seed_everything(config.seed, config.deterministic)
    dtype = autocast_dtype(config.amp, device)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    info = environment(device)
    print(" | ".join(f"{name} {value}" for name, value in (info | {"amp": dtype or "off", "processes": world}).items()))
    if config.batch_size % world:
        raise UserError(f"batch_size {config.batch_size} cannot be shared evenly by {world} processes")

    # Data
    tokenizer = find_tokenizer(config)
    splits = load_splits(config)
    tokens, rows = tokenize_rows(splits.train, tokenizer, config)
    dev = splits.validation
    dev_tokens = tokenize(dev.texts, tokenizer, config, True, dev.place)
    if splits.test:  # a text that cannot be scored is said now
        tokenize(splits.test.texts, tokenizer, config, True, splits.test.place)
    missed = rows_missed(rows, config.batch_size, config.seed, config.max_steps)
    print_summary(splits, tokens, dev_tokens, rows, missed, config)

    # Model
    model = build_model(config, device, dtype)
    sizes = [sum(p.numel() for p in some) for some in (model.parameters(), model.trained_parameters())]
    total_steps = config.max_steps
    print("{:,} parameters, {:,} trained ({:.2%})".format(*sizes, sizes[1] / sizes[0]))

    # Optimizer
    optimizer, scheduler = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Resume
    best, progress, trained = Best("max", config.patience), Progress(), TrainedParameters(model)
    state = dict(model=trained, optimizer=optimizer, scheduler=scheduler, scaler=scaler, best=best, progress=progress)
    score_dev = partial(validate, model, dev_tokens, dev, config, processes)
    if not check:
        same = {"autocast": str(dtype), "processes": world}
        run = rank_0_first(partial(Run, path, run_settings(config), same, info, rank == 0, data), processes)
        start = f"resuming from step {progress.step} of {total_steps}" if run.restore(state) else "starting"
        print(f"{start} in {displayed(path)}")
        if progress.step == 0:
            progress.start()
            base = score_dev()
            run.log({"event": "evaluation", "epoch": 0, "step": 0, **base})
            print(evaluation_line(0, dev.metric, base, progress.add_time(), "without adapter"))

    # Loop
    with StopSignal() as stop, tqdm(total=total_steps, initial=progress.step, disable=rank > 0 or None) as bar:
        progress.start()
        epochs = islice(draw_epochs(rows, config.batch_size, config.seed), progress.epoch, None)
        while progress.step < total_steps and not best.exhausted:
            epoch, drawn = progress.epoch, next(epochs)
            batches = drawn.batches
            bar.write(epoch_line(epoch + 1, drawn, total_steps - progress.step + progress.step_in_epoch))
            for batch in batches[progress.step_in_epoch :][: total_steps - progress.step]:
                # Anchors, positives and negatives of this process's rows, in chunks of like length
                model.train()
                texts = rows.texts[batch[rank::world]].T  # (2 + K, b)
                chunks, order = chunk_texts(tokens, texts, config.chunk_tokens)

                # GradCache: all vectors, the gradient of the loss on them, and each chunk again to take its part of it
                seeds = config.seed, progress.step, rank
                embed = partial(embed_chunk, model, tokens, chunks, autocast, seeds)
                scaled = cached_backward(embed, partial(batch_loss, order, scaler, config), len(chunks))
                all_reduce_gradients(model.trained_parameters(), processes)
                parts = torch.tensor([scaled.item() / scaler.get_scale(), stop.number], dtype=torch.float64)
                loss, stopped = all_reduce(parts, processes).tolist()  # each process must hear of a stop

                # Clip the true gradient and step; where losses are scaled, the scaler skips a step that overflows
                scaler.unscale_(optimizer)
                grad_norm = clip_grad_norm_(model.trained_parameters(), config.max_grad_norm or math.inf).item()
                refuse_non_finite(loss, 0.0 if scaler.is_enabled() else grad_norm, batch, splits.train, progress.step)
                if check:
                    print(f"check passed | loss of one batch {loss:.4f} | nothing was written")
                    return end_processes()
                learning_rate = scheduler.get_last_lr()[0]
                skipped = not update(optimizer, scheduler, scaler)

                # Log
                texts = rows.texts[batch]  # of all processes
                seen_tokens = int(lengths_of(tokens, texts[texts >= 0]).sum())
                progress.add_step(loss * len(batch), len(batch), seen_tokens, skipped)
                bar.update()
                if progress.step % config.logging_steps == 0:
                    now = epoch + progress.step_in_epoch / len(batches)
                    bar.write(run.log_step(progress, total_steps, now, loss, learning_rate, grad_norm))
                if progress.step_in_epoch == len(batches):
                    progress.end_epoch()

                # Evaluate
                if evaluated := progress.step % config.eval_steps == 0 or progress.step == total_steps:
                    scores = score_dev()
                    run.log({"event": "evaluation", "epoch": epoch + 1, "step": progress.step, **scores})
                    if better := best.update(scores[dev.metric], epoch + 1, progress.step):
                        run.save_best(lambda folder: save_adapter(model.encoder, folder / "adapter", config.model))
                    seconds = progress.add_time()
                    bar.write(evaluation_line(progress.step, dev.metric, scores, seconds, "best" * better))

                # Save
                if evaluated or stopped or progress.step % config.save_steps == 0:
                    progress.note_memory(device)
                    run.save_last(state)
                    barrier(processes)
                    progress.start()
                if stopped:
                    bar.write(f"stopped at step {progress.step} of {total_steps}: the same command goes on from here")
                    end_processes()
                    return 128 + (stop.number or signal.SIGTERM)  # the signal may have gone to another process
                if best.exhausted and progress.step < total_steps:
                    stale = f"{best.stale_evaluations} evaluations without a better {dev.metric}"
                    bar.write(f"stopped by patience: {stale}")
                    break
    end_processes()
    if rank:
        return None

    # Final evaluation, of the merged model, which takes the room of this one
    model.to("meta")
    base = run.evaluations()[0][dev.metric]
    if best.score <= base:
        print(f"warning: no step's {dev.metric} is above the {base:.4f} without adapter: it does not pay here")
    run.save_best(partial(save_merged, config, tokenizer, path / "best"))
    scores = evaluate_run(run, splits, config)
    progress.note_memory(device)
    print(last_line(run.finish(dev.metric, best, progress, base=base, chosen_on=dev.data, **scores), displayed(path)))
    return None


if __name__ == "__main__":
    flag = {"action": "store_true", "help": "read all data, run one batch, write nothing"}
    sys.exit(run_script(main, __doc__, resumes=True, check=flag))
