"""Train the span model; started again after a stop of any kind, it goes on where it was.

    python evidence_spans/train.py --sample          # offline, the bundled posts, about a minute on 2 cores
    python evidence_spans/train.py --check           # read all data, run one batch, write nothing
    python evidence_spans/train.py                   # the real run: SpanBERT on evidence_spans/data
"""

import json
import math
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from common.checkpoint import Best, Run, StopSignal, environment, peak_memory_bytes, run_results, write_text
from common.metrics import span_metrics
from common.seed import seed_everything, seed_micro_batch
from evidence_spans.answers import Decoding
from evidence_spans.config import Config, UnfitSettings, UserError, run_config, run_path, run_script, shown
from evidence_spans.dataset import (
    Split,
    draw_windows,
    epoch_batches,
    fingerprint,
    load_splits,
    longest_answer,
    make_loader,
    tokenize,
)
from evidence_spans.evaluate import check_data, evaluate, predict, write_report
from evidence_spans.formats import Example
from evidence_spans.loss import span_loss
from evidence_spans.model import (
    MODEL_INPUTS,
    SpanModel,
    autocast_dtype,
    build_model,
    load_tokenizer,
    pick_device,
    save_model,
)
from evidence_spans.report import print_summary
from evidence_spans.thresholds import answer_texts, tune


def steps_of_epochs(train: Split, config: Config) -> np.ndarray:
    """(epochs,) the optimizer step at which each epoch ends: the drawn examples, and so the steps, differ."""
    sizes = [len(draw_windows(train, config, epoch)) for epoch in range(config.epochs)]
    per_step = config.batch_size * config.gradient_accumulation_steps
    return np.cumsum([math.ceil(size / per_step) for size in sizes])


def evaluation_steps(ends: np.ndarray, total_steps: int, config: Config) -> set[int]:
    """The steps after which is evaluated: so many, evenly spaced, in each epoch, and the last one."""
    parts = config.evaluations_per_epoch
    starts = [0, *ends[:-1].tolist()]
    spaced = {a + round((b - a) * k / parts) for a, b in zip(starts, ends.tolist()) for k in range(1, parts + 1)}
    return {step for step in spaced if 0 < step <= total_steps} | {total_steps}


def epoch_rows(train: Split, config: Config, epoch: int) -> list[list[int]]:
    """The numbers of the windows in each batch of one epoch."""
    chosen = draw_windows(train, config, epoch)
    batches = epoch_batches(train.lengths[chosen], config.batch_size, config.seed, epoch)
    return [chosen[rows].tolist() for rows in batches]


def make_optimizer(
    model: SpanModel, total_steps: int, config: Config
) -> tuple[Optimizer, LRScheduler, torch.amp.GradScaler]:
    """AdamW without decay on biases and norms, linear warm-up then linear decay, and the loss scaler for fp16."""
    device = next(model.parameters()).device
    decayed = [p for p in model.parameters() if p.ndim >= 2]  # biases and norm weights are vectors
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(config.warmup_ratio * total_steps), total_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype(config.amp, device) == torch.float16)
    return optimizer, scheduler, scaler


def accumulate_gradients(
    model: SpanModel,
    micro_batches: list[dict[str, Tensor]],
    scaler: torch.amp.GradScaler,
    config: Config,
    step: int,
) -> list[float]:
    """Add the gradient of one optimizer step; the summed loss of each micro-batch.

    Losses are summed over windows and divided by the windows of the whole step, so that k micro-batches of b give the
    gradient of one batch of k * b.
    """
    device = next(model.parameters()).device
    dtype = autocast_dtype(config.amp, device)
    windows = sum(len(batch["input_ids"]) for batch in micro_batches)
    losses = []
    model.train()
    for micro_step, batch in enumerate(micro_batches):
        seed_micro_batch(config.seed, step, micro_step)
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        inputs = {name: tensor for name, tensor in batch.items() if name in MODEL_INPUTS}
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            start_logits, end_logits = model(**inputs)
        loss = span_loss(start_logits, end_logits, batch).sum()
        scaler.scale(loss / windows).backward()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def refuse_non_finite(
    what: str, values: list[float], batches: list[list[int]], examples: list[Example], step: int
) -> None:
    """End the run, naming the batch, before a loss or gradient that is no number reaches the weights."""
    for value, rows in zip(values, batches):
        if not math.isfinite(value):
            names = ", ".join(dict.fromkeys(examples[row].id for row in rows))
            raise UnfitSettings(
                f"the {what} is {value} at step {step + 1}, in the batch of examples {names}; best/ is untouched. "
                "A lower learning_rate or amp off may help"
            )


def clip_gradient(model: SpanModel, optimizer: Optimizer, scaler: torch.amp.GradScaler, config: Config) -> float:
    """Take the loss scale out of the gradient and clip it; its norm before clipping."""
    scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf).item()


def update(optimizer: Optimizer, scheduler: LRScheduler, scaler: torch.amp.GradScaler) -> None:
    """One optimizer step, unless the scaler found an overflow. The schedule moves only if the optimizer did."""
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if scaler.get_scale() >= scale:  # the scaler lowers its scale when it skips a step
        scheduler.step()


def validate(
    model: SpanModel,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    max_answer_length: int,
    questions: dict[str, str],
    config: Config,
) -> tuple[dict, Decoding]:
    """Validation scores at the threshold that is best on these examples, and what was tuned on them."""
    predictions, loss = predict(model, split, tokenizer, config, max_answer_length)
    examples = split.examples
    if not math.isfinite(loss):
        raise UnfitSettings("the validation loss is not finite; best/ is untouched. A lower learning_rate may help")
    decoding = tune(predictions, examples, max_answer_length, questions, config)
    texts = answer_texts(examples, predictions, decoding.threshold)
    scores = span_metrics(texts, [example.texts for example in examples])
    at_threshold = {name: scores[name] for name in ("f1", "exact_match", "f1_balanced")}
    return {"loss": loss, **at_threshold, "f1_has_answer": scores["has_answer"]["f1"]}, decoding


def last_line(results: dict, path: Path) -> str:
    parts = [f"done | {results['split']} {results['metric']} {results['best']:.4f} (epoch {results['epoch']:g})"]
    for split in ("validation", "test"):
        found = results[split]["at_threshold"]
        line = f"{split} f1 {found['f1']:.4f}, exact match {found['exact_match']:.4f}"
        if found["no_answer"]["rows"]:
            line += f", f1 of those with an answer {found['has_answer']['f1']:.4f}"
        parts.append(line)
    return " | ".join([*parts, f"{results['seconds']:.0f} s", f"results in {shown(path)}"])


def main(config: Config, check: bool = False, pause_after: int = 0) -> int | None:
    """pause_after: return after so many epochs, without a final evaluation; the schedule is the whole run's."""
    # Setup
    path = run_path(config)
    if not check and (results := run_results(path, run_config(config))):
        print(f"finished before\n{last_line(results, path)}")
        return None
    seed_everything(config.seed, config.deterministic)
    device = pick_device()
    info = environment(torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    dtype = autocast_dtype(config.amp, device)
    print(" | ".join(f"{name} {value}" for name, value in info.items()) + f" | amp {dtype or 'off'}")

    # Data
    tokenizer = load_tokenizer(config)
    examples, source = load_splits(config)
    splits = {name: tokenize(rows, tokenizer, config) for name, rows in examples.items()}
    train = splits["train"]
    print_summary(splits, source)
    max_answer_length = longest_answer(train, config)
    ends = steps_of_epochs(train, config)
    accumulation = config.gradient_accumulation_steps
    total_steps = min(int(ends[-1]), config.max_steps or math.inf)
    evaluate_after = evaluation_steps(ends, total_steps, config)

    # Model
    model = build_model(config, tokenizer).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters | answers of at most {max_answer_length} tokens | {total_steps} steps")

    # Optimizer
    optimizer, scheduler, scaler = make_optimizer(model, total_steps, config)
    if check:
        rows = epoch_rows(train, config, epoch=0)[:1]
        batches = list(make_loader(train.windows, rows, tokenizer, config))
        losses = accumulate_gradients(model, batches, scaler, config, step=0)
        refuse_non_finite("loss", losses, [[train.owners[row] for row in rows[0]]], train.examples, step=0)
        print(f"check passed | loss of one batch {losses[0] / len(rows[0]):.4f} | nothing was written")
        return None

    # Resume
    run = Run(path, run_config(config), info | {"data_sha256": fingerprint(examples), "autocast": str(dtype)})
    if run.results:  # another process finished it meanwhile
        run.close()
        return main(config)
    check_data(run, examples, config)
    if source.not_found:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in source.not_found]
        write_text(path / "not_found.jsonl", "".join(lines))
    if (begun := run.environment.get("autocast")) != str(dtype):
        raise UserError(f"{path} was begun with autocast {begun}, amp {config.amp} means {dtype} on this machine")
    best = Best("max", config.patience)
    step = 0
    totals = {"seconds": 0.0, "train_seconds": 0.0, "tokens": 0, "loss": 0.0, "examples": 0}
    totals |= {"peak_memory_bytes": None}
    stateful = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if state := run.load_last(best):
        try:
            for name, part in stateful.items():
                part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path / 'last.pt'} does not fit {config.model}: {error}") from error
        step, totals = state["step"], state["totals"]
        print(f"resuming from step {step} of {total_steps} in {shown(path)}")
    else:
        print(f"starting in {shown(path)}")

    # Loop
    loader, batches = None, []
    data_loader = make_loader(train.windows, batches, tokenizer, config)  # reads batches whenever it is started
    stop_step = min(int(ends[pause_after - 1]), total_steps) if pause_after else total_steps
    with StopSignal() as stop, tqdm(total=total_steps, initial=step, disable=None) as bar:
        while step < stop_step and not best.exhausted:
            began = time.perf_counter()
            epoch = int(np.searchsorted(ends, step, side="right"))
            first = int(ends[epoch - 1]) if epoch else 0
            if loader is None:
                rows = epoch_rows(train, config, epoch)
                batches[:] = rows[(step - first) * accumulation :]
                loader = iter(data_loader)
            group = rows[(step - first) * accumulation : (step - first + 1) * accumulation]
            asked = [[train.owners[row] for row in batch] for batch in group]
            micro_batches = [next(loader) for _ in group]
            losses = accumulate_gradients(model, micro_batches, scaler, config, step)
            refuse_non_finite("loss", losses, asked, train.examples, step)
            grad_norm = clip_gradient(model, optimizer, scaler, config)
            if not scaler.is_enabled():  # the scaler skips such a step by itself
                refuse_non_finite("gradient norm", [grad_norm], [list(chain(*asked))], train.examples, step)
            learning_rate = scheduler.get_last_lr()[0]
            update(optimizer, scheduler, scaler)
            step += 1
            bar.update()

            seen = sum(map(len, group))
            in_epochs = epoch + (step - first) / int(ends[epoch] - first)
            totals["tokens"] += sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
            totals["loss"] += sum(losses)
            totals["examples"] += seen
            totals["train_seconds"] += time.perf_counter() - began
            if step % config.logging_steps == 0:
                record = {"event": "step", "step": step, "epoch": round(in_epochs, 4)}
                record |= {"loss": sum(losses) / seen, "learning_rate": learning_rate, "grad_norm": grad_norm}
                record |= {"tokens_per_second": totals["tokens"] / totals["train_seconds"]}
                run.log(record)
                bar.write(
                    f"step {step}/{total_steps} | epoch {record['epoch']:.2f} | loss {record['loss']:.4f} | "
                    f"lr {learning_rate:.2e} | grad norm {grad_norm:.2f} | {record['tokens_per_second']:.0f} tokens/s"
                )
            if step == ends[epoch]:
                loader = None
            if step in evaluate_after:
                scores, decoding = validate(
                    model,
                    splits["validation"],
                    tokenizer,
                    max_answer_length,
                    source.questions,
                    config,
                )
                record = {"event": "evaluation", "epoch": round(in_epochs, 2), "step": step}
                record |= {"train_loss": totals["loss"] / totals["examples"], **scores}
                totals |= {"loss": 0.0, "examples": 0}
                run.log(record)
                if better := best.update(scores[config.metric], record["epoch"], step):
                    run.save_best(partial(save_model, model, tokenizer, asdict(decoding)))
                bar.write(
                    f"epoch {record['epoch']:g} | train loss {record['train_loss']:.4f} | validation loss "
                    f"{scores['loss']:.4f} | f1 {scores['f1']:.4f} | exact match {scores['exact_match']:.4f} | "
                    f"f1 with answer {scores['f1_has_answer']:.4f}{' | best' * better}"
                )
            totals["seconds"] += time.perf_counter() - began
            totals["peak_memory_bytes"] = peak_memory_bytes(device.type, totals["peak_memory_bytes"])
            stopped = stop.number  # read once: a signal during the save counts at the next step
            if step in evaluate_after or step % config.save_steps == 0 or stopped:
                state = {name: part.state_dict() for name, part in stateful.items()}
                run.save_last(state | {"step": step, "totals": totals}, best)
            if stopped:
                bar.write(f"stopped at step {step} of {total_steps}: the same command goes on from here")
                return 128 + stopped

    if best.exhausted and step < stop_step:
        print(f"stopped by patience: {best.stale_evaluations} evaluations without a better {config.metric}")
    if pause_after:
        run.close()
        return None

    # Final evaluation
    scored = {name: splits[name] for name in ("validation", "test")}
    scores, predictions = evaluate(run.path / "best", scored, tokenizer, config, device)
    write_report(run, scored, scores, predictions, config)
    results = {"metric": config.metric, "best": best.score, "split": "validation", "epoch": best.epoch}
    results |= {"step": best.step, "seconds": totals["seconds"], "decoding": scores["decoding"]}
    results |= {"tokens_per_second": totals["tokens"] / totals["train_seconds"]}
    results |= {"peak_memory_bytes": peak_memory_bytes(device.type, totals["peak_memory_bytes"])}
    results |= {"not_found": len(source.not_found)} | {name: scores[name] for name in ("validation", "test")}
    run.finish(results)
    run.close()
    print(last_line(results, path))
    return None


if __name__ == "__main__":
    flag = {"action": "store_true", "help": "read all data, run one batch, write nothing"}
    sys.exit(run_script(main, __doc__, check=flag))
