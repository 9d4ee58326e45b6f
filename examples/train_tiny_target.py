"""Train a small target on the Python standard library's sources, on a CPU.

    python examples/train_tiny_target.py --work build/tiny

With `--family qwen3_5` three of four layers are recurrent, and there are fewer of them.
"""

import argparse
import json
import math
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3_5TextConfig, Qwen3Config

END, MASK = "<|endoftext|>", "<|mask|>"
# Tests and tables of characters teach repetition; the rest is not installed everywhere.
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "encodings", "pydoc_data", "idlelib", "lib2to3"}
SKIPPED |= {"ensurepip", "turtledemo", "idle_test", "__pycache__"}
WINDOWS = (256, 512)  # tokens per training row, at first and in the decay


def standard_library() -> tuple[list[Path], list[Path]]:
    """Return the standard library's source files: those to train on, and one in twenty held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if not SKIPPED & set(file.relative_to(root).parts)]
    held_out = {file for file in files if zlib.crc32(file.relative_to(root).as_posix().encode()) % 20 == 0}
    return [file for file in files if file not in held_out], [file for file in files if file in held_out]


def read(files: list[Path]) -> list[str]:
    """Return the texts of files."""
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; id 0 ends a text, id 1 is the drafter's mask."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, padding_side="left"
    )


def encode(tokenizer, texts: list[str]) -> torch.Tensor:
    """Return all texts as one stream of token ids, each followed by the end token; `(length,)`, int64."""
    ids = [np.array([*encoded, tokenizer.eos_token_id]) for encoded in tokenizer(texts)["input_ids"]]
    return torch.from_numpy(np.concatenate(ids))


def new_target(tokenizer, family: str = "qwen3"):
    """Build the untrained target: as deep as Qwen3-4B, since depth is what a one-shot drafter saves, and thin.

    Args:
        family (`str`, *optional*, defaults to `"qwen3"`):
            `"qwen3_5"` for a shallow hybrid of gated delta layers and attention.
    """
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "qwen3":
        return AutoModelForCausalLM.from_config(Qwen3Config(num_hidden_layers=36, **shape))
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    return AutoModelForCausalLM.from_config(Qwen3_5TextConfig(num_hidden_layers=4, **shape, **heads, **sizes))


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=6e-3, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Return the factor of the learning rates: a short warm-up, constant, then linear decay over the last 40 %."""
    return min(1.0, (step + 1) / 20, 2.5 * (1 - step / steps) + 0.01)


def language_loss(model, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross-entropy of rows of tokens, in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


def unlikelihood_loss(model, prompts: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, float]:
    """Penalise the repeated 4-grams of the model's own greedy text (sequence-level unlikelihood, arXiv 1908.04319).

    Args:
        prompts (`torch.LongTensor` of shape `(batch, length)`):
            Starts of rows to continue.
        new_tokens (`int`):
            Tokens to continue them by.

    Returns:
        `tuple[torch.Tensor, float]`: The loss, and the fraction of tokens that end a repeated 4-gram.
    """
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        ids = model.generate(
            prompts, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
        )
        model.train()
        logits = model(input_ids=ids[:, :-1]).logits[:, prompts.shape[1] - 1 :]
    written = ids[:, prompts.shape[1] :]
    repeated = torch.tensor([ends_repeated_gram(row) for row in written.tolist()])
    log_probs = logits.float().log_softmax(dim=-1).gather(-1, written[..., None])[..., 0]
    penalty = -torch.log1p(-log_probs.exp().clamp(max=1 - 1e-4))
    return (penalty * repeated).sum() / repeated.sum().clamp(min=1), repeated.float().mean().item()


def ends_repeated_gram(tokens: list[int]) -> list[bool]:
    """Tell for each token whether the four tokens it ends stood earlier in the sequence."""
    seen, repeated = set(), []
    for end in range(1, len(tokens) + 1):
        gram = tuple(tokens[max(0, end - 4) : end])
        repeated.append(len(gram) == 4 and gram in seen)
        seen.add(gram)
    return repeated


def distinct_fraction(rows: list[list[int]]) -> float:
    """Return the distinct 4-grams of all rows together over their number."""
    grams = [tuple(row[i : i + 4]) for row in rows for i in range(len(row) - 3)]
    return len(set(grams)) / len(grams)


@torch.no_grad()
def perplexity(model, stream: torch.Tensor, window: int = WINDOWS[-1]) -> float:
    """Return the perplexity of a token stream read in windows, each token given those before it in its window."""
    rows = stream[: len(stream) // window * window].view(-1, window)
    return math.exp(sum(language_loss(model, row[None]).item() for row in rows) / len(rows))


def train(model, stream: torch.Tensor, work: Path, args) -> dict:
    """Train the target, resuming from `work/target_state.pt`; return what there is to record."""
    state_file = work / "target_state.pt"
    opts = optimizers(model)
    bases = [[group["lr"] for group in opt.param_groups] for opt in opts]
    first, seconds, log, runs = 0, 0.0, [], []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        first, seconds, log, runs = state["step"], state["seconds"], state["log"], state["runs"]
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
    # The schedule depends on these, and a resumed run may have been given others.
    runs.append({"from_step": first, "steps": args.target_steps, "unlikelihood_steps": args.unlikelihood_steps})
    model.train()
    started = time.perf_counter() - seconds
    for step in (bar := tqdm(range(first, args.target_steps), initial=first, total=args.target_steps, desc="target")):
        torch.manual_seed(args.seed + step)
        factor = rate(step, args.target_steps)
        for opt, base in zip(opts, bases, strict=True):
            for group, lr in zip(opt.param_groups, base, strict=True):
                group["lr"] = lr * factor
        window = WINDOWS[step >= 0.6 * args.target_steps]
        starts = torch.randint(len(stream) - window, (args.batch_tokens // window,))
        rows = torch.stack([stream[start : start + window] for start in starts])
        loss = language_loss(model, rows)
        loss.backward()
        record = {"step": step, "loss": round(loss.item(), 4)}
        if step >= args.target_steps - args.unlikelihood_steps:
            penalty, repeated = unlikelihood_loss(model, rows.view(-1, 256)[:8, :64], new_tokens=96)
            (args.unlikelihood_weight * penalty).backward()
            record |= {"unlikelihood": round(penalty.item(), 4), "repeated": round(repeated, 4)}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        bar.set_postfix(record)
        seconds = time.perf_counter() - started
        if step % 20 == 0 or step == args.target_steps - 1:
            log.append(record)
        if step % 50 == 49:
            states = {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts]}
            torch.save({"step": step + 1, "seconds": seconds, "log": log, "runs": runs, **states}, state_file)
    totals = {"steps": args.target_steps, "tokens": args.target_steps * args.batch_tokens}
    return {"seconds": round(seconds, 1), **totals, "runs": runs, "log": log}


def main(argv: list[str] | None = None) -> Path:
    """Train tokenizer and target; return the folder that holds both."""
    return run(add_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0])).parse_args(argv))


def run(args: argparse.Namespace) -> Path:
    """Train as parsed arguments say, unless an earlier run finished."""
    folder = args.work / "target"
    if (args.work / "target.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    training_files, held_out_files = standard_library()
    texts = read(training_files)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    tokenizer.save_pretrained(folder)
    stream = encode(tokenizer, texts)
    model = new_target(tokenizer, args.family)
    record = train(model, stream, args.work, args)
    model.eval()
    record |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "stream_tokens": len(stream),
        "files": len(training_files),
        "held_out_files": len(held_out_files),
        "held_out_perplexity": round(perplexity(model, encode(tokenizer, read(held_out_files))), 3),
    }
    model.to(torch.bfloat16).save_pretrained(folder)
    (args.work / "target.json").write_text(json.dumps(record, indent=1))
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of the target's training."""
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="folder for checkpoints and results")
    parser.add_argument("--family", choices=["qwen3", "qwen3_5"], default="qwen3", help="architecture of the target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--target-steps", type=int, default=1100)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--unlikelihood-steps", type=int, default=80, help="last steps, with the repetition penalty")
    parser.add_argument("--unlikelihood-weight", type=float, default=1.0)
    return parser


if __name__ == "__main__":
    main()
