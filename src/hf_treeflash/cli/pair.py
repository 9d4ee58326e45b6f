"""Loading what a command was named: a target and its drafter, or the embedded pair."""

from pathlib import Path
from typing import Any

from .options import Dtype
from .terminal import note, quiet_off_a_terminal

EMBEDDED = Path(__file__).parents[1] / "tiny"


def named_pair(target: str | None, drafter: str | None) -> tuple[str, str]:
    """Return the names of a pair: both that were given, or the embedded one."""
    if target is not None and drafter is not None:
        return target, drafter
    if target is not None or drafter is not None:
        raise ValueError("Give both --target and --drafter, or neither for the embedded pair.")
    if not (EMBEDDED / "target").is_dir():
        raise ValueError("This installation has no embedded pair: give --target and --drafter.")
    note("no --target and --drafter: this is the embedded pair, a small model of Python code")
    return str(EMBEDDED / "target"), str(EMBEDDED / "drafter")


def load(
    target: str | None, drafter: str | None, device: str | None = None, dtype: Dtype | None = None, **knobs: Any
) -> tuple[Any, Any, Any]:
    """Load a pair for `generate`, with the drafting knobs that are not None; see [`load_pair`]."""
    names = named_pair(target, drafter)
    check_device(device)
    quiet_off_a_terminal()
    from ..bench.pairs import load_pair
    from ..generation import install_hook
    from ..hub.inspection import check_names

    check_names(*names)
    install_hook()
    model, tokenizer, draft_model = load_pair(*names, device=device, dtype=dtype and dtype.value)
    for knob, value in knobs.items():
        if value is not None:
            setattr(draft_model.generation_config, knob, value)
    return model, tokenizer, draft_model


def check_device(device: str | None) -> None:
    """Refuse a device that is no device, or not here."""
    if device is None:
        return
    import torch

    try:
        kind = torch.device(device)
        torch.empty(0, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cuda = torch.cuda.device_count()
        here = f"cpu{', cuda:0' if cuda else ''}{f' to cuda:{cuda - 1}' if cuda > 1 else ''}"
        raise ValueError(f"{device!r} is no device of this machine, which has {here}.") from error


def check_length(target: Any, tokens: int, new_tokens: int) -> None:
    """Refuse a text that goes on where the target knows no positions."""
    longest = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and tokens + new_tokens > longest:
        raise ValueError(
            f"The prompt of {tokens} tokens and {new_tokens} new ones are more than the {longest} that the target "
            "knows positions for: shorten it, or lower --max-new-tokens."
        )


def encoded(target: Any, tokenizer: Any, text: str, system: str | None, thinking: bool, new_tokens: int) -> Any:
    """Return the ids of a user's text, `(1, length)`, which must leave room for the new tokens."""
    from ..bench.pairs import encode_messages

    messages = [] if system is None else [{"role": "system", "content": system}]
    ids = encode_messages(tokenizer, [*messages, {"role": "user", "content": text}], thinking)
    check_length(target, ids.shape[1], new_tokens)
    return ids
