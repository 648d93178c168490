"""Train a sentence embedder; started again after a stop of any kind, it goes on where it was.

    python embeddings/train.py --sample             # offline, the bundled triplets, about a minute on 2 cores
    python embeddings/train.py --check              # read all data, run one batch, write nothing
    python embeddings/train.py                      # the real run, after prepare.py and minicpm.py
    torchrun --nproc_per_node 2 embeddings/train.py
"""

import math
import signal
import sys
import time
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from common.checkpoint import Best, Run, RunError, StopSignal, environment, peak_memory_bytes, read_last, run_results
from common.seed import seed_everything, seed_micro_batch
from embeddings.config import Config, UserError, parse_dims, run_config, run_path, run_script, shown
from embeddings.batching import Tokens, epoch_batches, make_chunks, pad, tokenize, tokenize_rows
from embeddings.dataset import Pair, Triplet, fingerprint, load_splits
from embeddings.evaluate import check_data, correlation, evaluate_run, pair_texts
from embeddings.grad_cache import cached_backward
from embeddings.loss import info_nce
from embeddings.model import (
    Embedder,
    autocast_dtype,
    build_model,
    embed_tokens,
    save_merged,
    save_trained,
)
from embeddings.parallel import (
    Processes,
    end_processes,
    broadcast,
    start_processes,
    all_reduce_gradients,
    all_reduce,
    barrier,
)
from embeddings.report import print_summary
from embeddings.tokenizer import load_tokenizer


def make_optimizer(
    model: Embedder, config: Config, device: torch.device
) -> tuple[Optimizer, LRScheduler, torch.amp.GradScaler]:
    """AdamW on the low-rank matrices alone; warm-up, then decay; the scaler for fp16."""
    parameters = list(model.trained_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    schedules = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    scheduler = schedules[config.schedule](optimizer, config.warmup_steps, config.max_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype(config.amp, device) == torch.float16)
    return optimizer, scheduler, scaler


def batch_gradient(
    model: Embedder,
    tokens: Tokens,
    texts: np.ndarray,
    pad_token_id: int,
    scaler: torch.amp.GradScaler,
    config: Config,
    step: int,
    processes: Processes,
) -> float:
    """Put the gradient of one batch, of all processes, into the adapters; this process's part of the mean loss.

    texts: (b, 3 or 2), the texts of this process's rows; anchors, positives and negatives go through the model
    together, in chunks of at most chunk_tokens padded tokens, each with a dropout of its own (step, chunk, rank).
    """
    rank, _, device = processes
    dtype = autocast_dtype(config.amp, device)
    flat = texts.T.flatten()  # anchors, then positives, then negatives
    chunks = make_chunks(tokens.lengths_of(flat), config.chunk_tokens)
    places = torch.from_numpy(np.argsort(np.concatenate(chunks))).to(device)  # of each text among the chunks' vectors
    margin = config.false_negative_margin if config.mask_false_negatives else None

    def embed(number: int) -> Tensor:
        seed_micro_batch(config.seed, step, number, rank)
        batch = pad(tokens, flat[chunks[number]], pad_token_id)
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(**batch)

    def loss(vectors: Tensor) -> Tensor:
        vectors = vectors[places].view(texts.shape[1], len(texts), -1)
        total = info_nce(vectors, config.temperature, parse_dims(config.matryoshka_dims), margin)
        return scaler.scale(total / config.batch_size)

    model.train()
    scaled = cached_backward(embed, loss, len(chunks))
    all_reduce_gradients(model.trained_parameters().values(), processes)
    return scaled.item() / scaler.get_scale()


def refuse_non_finite(what: str, value: float, batch: np.ndarray, triplets: list[Triplet], step: int) -> None:
    """End the run, naming the batch, before a loss or gradient that is no number reaches the weights."""
    if not math.isfinite(value):
        lines = ", ".join(str(triplets[place].line) for place in batch)
        raise UserError(
            f"the {what} is {value} at step {step + 1}, in the batch of train.jsonl lines {lines}; best/ is untouched. "
            "A lower learning_rate or amp off may help"
        )


def clip_gradient(model: Embedder, optimizer: Optimizer, scaler: torch.amp.GradScaler, config: Config) -> float:
    """Take the loss scale out of the gradient and clip it; its norm before clipping."""
    scaler.unscale_(optimizer)
    trained = model.trained_parameters().values()
    return torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf).item()


def update(optimizer: Optimizer, scheduler: LRScheduler, scaler: torch.amp.GradScaler) -> None:
    """One optimizer step, unless the scaler found an overflow. The schedule moves only if the optimizer did."""
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if scaler.get_scale() >= scale:  # the scaler lowers its scale when it skips a step
        scheduler.step()


def validate(
    model: Embedder, tokens: Tokens, pairs: list[Pair], pad_token_id: int, config: Config, processes: Processes
) -> dict:
    """The correlations on sts-dev.csv; each process embeds its share of the texts."""
    vectors = torch.zeros(2 * len(pairs), model.encoder.config.hidden_size)
    own = np.arange(len(vectors))[processes.rank :: processes.world]
    vectors[own] = embed_tokens(model, tokens, own, pad_token_id, config)
    return correlation(all_reduce(vectors, processes), pairs)[0]


def refuse_another_machine(run: Run, dtype: torch.dtype | None, world: int) -> None:
    """A run goes on with the autocast type and the number of processes that it was begun with, or not at all."""
    if (begun := run.environment.get("autocast")) != str(dtype):
        now = f"amp {run.config['amp']} means {dtype} on this machine"
        raise UserError(f"{run.path} was begun with autocast {begun}, {now}")
    if (begun := run.environment.get("processes")) != world:
        raise UserError(
            f"{run.path} was begun with {begun} processes, these are {world}: dropout would be another. "
            "Start as many, or give another --run_dir"
        )


def last_line(results: dict, path: Path) -> str:
    parts = [f"done | {results['split']} {results['metric']} {results['best']:.4f} (step {results['step']})"]
    parts.append(f"{results['base']:.4f} without adapter")
    parts += [f"test spearman {results['test']['spearman']:.4f}"] if results["test"] else []
    return " | ".join([*parts, f"{results['seconds']:.0f} s", f"results in {shown(path)}"])


def main(config: Config, check: bool = False) -> int | None:
    # Setup
    path = run_path(config)
    processes = start_processes()
    rank, world, device = processes
    if not check and (results := run_results(path, run_config(config))):
        print(f"finished before\n{last_line(results, path)}")
        end_processes()
        return None
    seed_everything(config.seed, config.deterministic)
    info = environment(torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    dtype = autocast_dtype(config.amp, device)
    print(" | ".join(f"{name} {value}" for name, value in (info | {"amp": dtype or "off", "processes": world}).items()))
    if config.batch_size % world:
        raise UserError(f"batch_size {config.batch_size} cannot be shared evenly by {world} processes")

    # Data
    tokenizer = load_tokenizer(config)
    splits = load_splits(config)
    tokens, rows = tokenize_rows(splits.train, tokenizer, config)
    dev_tokens = tokenize(pair_texts(splits.validation), tokenizer, config)
    print_summary(splits, tokens.lengths, rows.identities[:, 0], config)
    batches = epoch_batches(rows, config.batch_size, config.seed, 0)
    if not batches:
        raise UserError(
            f"no batch of {config.batch_size} rows without a repeated text can be made of the {len(splits.train)} rows "
            "of train.jsonl: lower batch_size"
        )

    # Model
    model = build_model(config, tokenizer, device, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.trained_parameters().values())
    share = f"{trained:,} trained ({trained / parameters:.2%})"
    print(f"{parameters:,} parameters, {share} | {len(batches)} batches in epoch 1 | {config.max_steps} steps")
    if config.max_steps <= config.warmup_steps:
        print(f"warning: the learning rate never reaches its peak: warmup_steps {config.warmup_steps} are all steps")

    # Optimizer
    optimizer, scheduler, scaler = make_optimizer(model, config, device)
    gradient = partial(batch_gradient, model, tokens, pad_token_id=tokenizer.pad_token_id, scaler=scaler, config=config)
    if check:
        texts = rows.texts[batches[0][rank::world]]
        loss = gradient(texts, step=0, processes=processes)
        refuse_non_finite("loss", loss, batches[0], splits.train, step=0)
        print(f"check passed | loss of one batch {all_reduce(torch.tensor(loss), processes):.4f} | nothing was written")
        end_processes()
        return None

    # Resume
    best = Best("max", config.patience)
    run, state, outcome = None, None, "to be trained"
    if rank == 0:
        try:
            begun = {"data_sha256": fingerprint(splits), "autocast": str(dtype), "processes": world}
            run = Run(path, run_config(config), info | begun)
            if run.results is None:
                check_data(run, splits, config)
                refuse_another_machine(run, dtype, world)
                state = run.load_last(best)
            else:  # another process finished it meanwhile
                outcome = "finished"
        except (UserError, RunError, OSError):  # what run_script says in one line
            broadcast("refused", processes)  # the others wait for a word
            raise
    outcome = broadcast(outcome, processes)
    if outcome == "refused":
        return 1
    if outcome == "finished":
        if run:
            run.close()
            print(f"finished before\n{last_line(run.results, path)}")
        end_processes()
        return None
    if rank:
        state, _ = read_last(path / "last.pt", run_config(config), best) or (None, 0)
    step, epoch, position = 0, 0, 0
    totals = {"seconds": 0.0, "train_seconds": 0.0, "tokens": 0, "base": None, "peak_memory_bytes": None}
    if state:
        try:
            model.load_trained(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path / 'last.pt'} does not fit {config.model}: {error}") from error
        step, epoch, position, totals = (state[name] for name in ("step", "epoch", "position", "totals"))
        batches = epoch_batches(rows, config.batch_size, config.seed, epoch)
        print(f"resuming from step {step} of {config.max_steps} in {shown(path)}")
    else:
        print(f"starting in {shown(path)}")
    del state

    # Loop
    score_dev = partial(validate, model, dev_tokens, splits.validation, tokenizer.pad_token_id, config, processes)
    if totals["base"] is None:
        scores = score_dev()
        totals["base"] = scores["spearman"]
        if run:
            run.log({"event": "evaluation", "epoch": 0, "step": 0, **scores})
        print(f"step 0 | validation spearman {totals['base']:.4f} without adapter")
    hidden = True if rank else None  # None: shown on a terminal
    with StopSignal() as stop, tqdm(total=config.max_steps, initial=step, disable=hidden) as bar:
        while step < config.max_steps and not best.exhausted:
            began = time.perf_counter()
            if position == len(batches):
                epoch, position = epoch + 1, 0
                batches = epoch_batches(rows, config.batch_size, config.seed, epoch)
                if not batches:
                    raise UserError(f"epoch {epoch + 1} has no batch without a repeated text: lower batch_size")
            batch = batches[position]
            loss = gradient(rows.texts[batch[rank::world]], step=step, processes=processes)
            loss, stopped = all_reduce(torch.tensor([loss, stop.number], dtype=torch.float64), processes).tolist()
            refuse_non_finite("loss", loss, batch, splits.train, step)
            grad_norm = clip_gradient(model, optimizer, scaler, config)
            if not scaler.is_enabled():  # the scaler skips such a step by itself
                refuse_non_finite("gradient norm", grad_norm, batch, splits.train, step)
            learning_rate = scheduler.get_last_lr()[0]
            update(optimizer, scheduler, scaler)
            step, position = step + 1, position + 1
            bar.update()

            totals["tokens"] += int(tokens.lengths_of(rows.texts[batch]).sum())
            totals["train_seconds"] += time.perf_counter() - began
            if step % config.logging_steps == 0:
                record = {"event": "step", "step": step, "epoch": round(epoch + position / len(batches), 4)}
                record |= {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
                record |= {"tokens_per_second": totals["tokens"] / totals["train_seconds"]}
                if run:
                    run.log(record)
                bar.write(
                    f"step {step}/{config.max_steps} | epoch {record['epoch']:.2f} | loss {loss:.4f} | "
                    f"lr {learning_rate:.2e} | grad norm {grad_norm:.2f} | {record['tokens_per_second']:.0f} tokens/s"
                )
            evaluated = step % config.eval_steps == 0 or step == config.max_steps
            better = False
            if evaluated:
                scores = score_dev()
                better = best.update(scores["spearman"], epoch + 1, step)
                if run:
                    run.log({"event": "evaluation", "epoch": epoch + 1, "step": step, **scores})
                bar.write(
                    f"step {step} | validation spearman {scores['spearman']:.4f} | pearson {scores['pearson']:.4f}"
                    f"{' | best' * better}"
                )
            totals["seconds"] += time.perf_counter() - began
            totals["peak_memory_bytes"] = peak_memory_bytes(device.type, totals["peak_memory_bytes"])
            if evaluated or step % config.save_steps == 0 or stopped:
                if run:
                    adapters = {name: parameter.detach() for name, parameter in model.trained_parameters().items()}
                    state = {"model": adapters, "optimizer": optimizer.state_dict()}
                    state |= {"scheduler": scheduler.state_dict(), "scaler": scaler.state_dict()}
                    state |= {"step": step, "epoch": epoch, "position": position, "totals": totals}
                    if better:
                        run.save_best(partial(save_trained, model, config))
                    run.save_last(state, best)
                barrier(processes)
            if stopped:
                bar.write(f"stopped at step {step} of {config.max_steps}: the same command goes on from here")
                end_processes()
                return 128 + (stop.number or signal.SIGTERM)  # the signal may have gone to another process
    if best.exhausted and step < config.max_steps:
        print(f"stopped by patience: {best.stale_evaluations} evaluations without a better spearman")
    if best.score <= totals["base"]:
        print(f"warning: no step's spearman is above the {totals['base']:.4f} without adapter: it does not pay here")
    end_processes()
    if run is None:
        return None

    # Final evaluation
    del model, optimizer, gradient, score_dev  # all that holds the weights: the merged model takes their room
    run.save_best(partial(save_merged, config, tokenizer, path / "best"))
    scores = evaluate_run(run, splits, config)
    results = {"metric": "spearman", "best": best.score, "split": "validation", "epoch": best.epoch}
    results |= {"step": best.step, "seconds": totals["seconds"], "base": totals["base"]}
    results |= {"tokens_per_second": totals["tokens"] / totals["train_seconds"]}
    results |= {"peak_memory_bytes": peak_memory_bytes(device.type, totals["peak_memory_bytes"])}
    results |= {"validation": scores["validation"], "test": scores.get("test")}
    run.finish(results)
    run.close()
    print(last_line(results, path))
    return None


if __name__ == "__main__":
    flag = {"action": "store_true", "help": "read all data, run one batch, write nothing"}
    sys.exit(run_script(main, __doc__, check=flag))
