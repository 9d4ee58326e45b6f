"""What can be known about a target and a drafter, as a table: the first thing to ask for when something is amiss.

Longer than 300 lines: one short function per thing that can be known of a pair.
"""

import platform
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoTokenizer
from transformers.utils import logging

from ..draft_head import home_of
from ..knobs import DraftingKnobs
from ..lengths import ENDLESS, Lengths
from ..memory import recall
from ..taps import decoder_layers, is_compiled, tapped_states
from ..validation import check_adapters, check_drafter, check_pair, check_target
from .pairs import encode_prompt

PROMPTS = (
    "def fibonacci(n):\n",
    "Explain in a few sentences why the sky is blue.",
    "Write a list of ten cities with the country each lies in.",
)
GOOD, FAIR, BAD = "ok", "look", "no"
WIDTH = 90  # of what is said, in characters


class Row(NamedTuple):
    """One line of a report: what was looked at, what was found, and whether that is right."""

    what: str
    found: str
    verdict: str = GOOD


class Report:
    """What was found of a pair; prints as a table.

    Args:
        rows (`list[Row]`):
            Line by line.
    """

    def __init__(self, rows: list[Row]):
        self.rows = rows

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way of drafting for this target with this drafter."""
        return all(row.verdict != BAD for row in self.rows)

    def __getitem__(self, what: str) -> Row:
        """Return the line of that name."""
        return next(row for row in self.rows if row.what == what)

    def __str__(self) -> str:
        names, verdicts = (max(map(len, column)) for column in list(zip(*self.rows, strict=True))[::2])
        margin = " " * (names + verdicts + 4)
        lines = []
        for what, found, verdict in self.rows:
            start, *more = textwrap.wrap(found, WIDTH) or [""]
            lines.append(f"{what:{names}}  {verdict:{verdicts}}  {start}".rstrip())
            lines += [margin + line for line in more]
        return "\n".join(lines)

    __repr__ = __str__


def check(
    target,
    drafter,
    tokenizer=None,
    *,
    max_new_tokens: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Look at a target and a drafter, and generate three texts with and without it.

    Nothing is changed, and nothing raised: what stands in the way is a line of the report.

    Args:
        target ([`PreTrainedModel`]), drafter ([`PreTrainedModel`]):
            The pair.
        tokenizer ([`PreTrainedTokenizerBase`], *optional*):
            The target's; by default the one that lies where the target came from.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Tokens of each text.
        progress (`Callable`, *optional*):
            Told after each text how many are done, and of how many.

    Returns:
        [`Report`]: Prints as a table.
    """
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(target)
    rows = [
        Row("versions", versions()),
        Row("target", said_of_target(target)),
        Row("drafter", said_of_drafter(drafter)),
    ]
    with quiet():
        rows += [
            tried("target can carry trees", lambda: check_target(target)),
            tried("adapters", lambda: check_adapters(target), adapters(target)),
            tried("drafter is whole", lambda: check_drafter(drafter), said_of_head(drafter)),
            tried("drafter fits target", lambda: check_pair(target, drafter)),
            tried("knobs", lambda: DraftingKnobs.read(drafter.generation_config), said_of_knobs(drafter)),
            *vocabulary(target, drafter, tokenizer),
            Row("lengths", *said_of_lengths(target)),
            Row("dtypes", *said_of_dtypes(target, drafter)),
            Row("devices", *said_of_devices(target, drafter)),
            Row("attention", *said_of_attention(target)),
        ]
        if all(row.verdict != BAD for row in rows):
            prompts = encoded(target, tokenizer)
            rows += [guarded("taps", lambda: taps(target, drafter, prompts[0]))]
            rows += measured(target, drafter, prompts, max_new_tokens, progress)
    return Report(rows)


def tried(what: str, test: Callable[[], Any], found: str = "yes") -> Row:
    """Return the line of a check that raises where something is wrong."""
    try:
        test()
    except Exception as error:
        return Row(what, " ".join(str(error).split()), BAD)
    return Row(what, found)


def guarded(what: str, look: Callable[[], tuple[str, str]]) -> Row:
    """Return the line of something that is run, and may fail."""
    try:
        return Row(what, *look())
    except Exception as error:
        return Row(what, f"{type(error).__name__}: {' '.join(str(error).split())}", BAD)


def versions() -> str:
    """Name the libraries that matter."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"


def said_of_target(target) -> str:
    """Describe a target in one line."""
    config = target.config.get_text_config(decoder=True)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    parts = [type(target).__name__, f"{config.num_hidden_layers} layers", f"width {config.hidden_size}", *kinds]
    quantiser = getattr(target, "hf_quantizer", None)
    marks = {
        "quantised": quantiser is not None,
        "compiled": is_compiled(target),
        "in training mode": target.training,
        "split by tensor parallelism": (getattr(target, "_tp_size", None) or 1) > 1,
    }
    return ", ".join([*parts, *(mark for mark, holds in marks.items() if holds)])


def said_of_drafter(drafter) -> str:
    """Describe a drafter in one line."""
    config = drafter.config
    taps = ", ".join(map(str, config.target_layer_ids))
    return f"{type(drafter).__name__}, {config.num_hidden_layers} layers, block of {config.block_size}, reads {taps}"


def said_of_head(drafter) -> str:
    """Say whether a drafter has a head, and whether that was ever trained."""
    head = getattr(drafter, "ar_head", None)
    if head is None:
        return "yes, without an AR head"
    last = getattr(head, "following", None) or head.down_proj  # zero in a fresh head
    trained = any(bool(weight.any()) for weight in last.parameters() if not weight.is_meta)
    return "yes, with an AR head" if trained else "yes, but its AR head is still zero, as before any training"


def said_of_knobs(drafter) -> str:
    """List the knobs that are not at their defaults."""
    defaults = DraftingKnobs()
    try:
        own = DraftingKnobs.read(drafter.generation_config)
    except ValueError:
        return ""
    changed = [f"{name} {value}" for name, value in own._asdict().items() if value != getattr(defaults, name)]
    return ", ".join(changed) or "defaults"


def adapters(target) -> str:
    """Name a target's PEFT adapters."""
    return ", ".join(getattr(target, "peft_config", None) or ()) or "none"


def vocabulary(target, drafter, tokenizer) -> list[Row]:
    """Compare the vocabularies of target, drafter and tokenizer."""
    size, own = target.config.get_text_config(decoder=True).vocab_size, drafter.config.vocab_size
    rows = [Row("vocabulary", f"target {size}, drafter {own}", GOOD if own in (None, size) else FAIR)]
    if tokenizer is None:
        return [*rows, Row("tokenizer", "none found: pass `tokenizer`, or tau says nothing", FAIR)]
    mask = drafter.config.mask_token_id
    token = tokenizer.convert_ids_to_tokens(mask) if mask < len(tokenizer) else None
    used = f"{len(tokenizer)} tokens; the drafter's mask token {mask} is {'unused' if token is None else repr(token)}"
    template = "none: prompts are plain text" if tokenizer.chat_template is None else "yes; thinking mode off"
    return [*rows, Row("tokenizer", used, GOOD if len(tokenizer) <= size else BAD), Row("chat template", template)]


def said_of_lengths(target) -> tuple[str, str]:
    """Say at which lengths a target changes."""
    lengths = Lengths.of(target)
    found = f"the config names {', '.join(map(str, lengths.named)) or 'none'}"
    if lengths.one_by_one < ENDLESS:
        return f"{found}; behind {lengths.one_by_one} tokens the text is decoded token by token", FAIR
    if lengths.switches:
        return (
            f"{found}; changes behind {lengths.switches[0]}, so batches that may get there are not drafted for",
            FAIR,
        )
    return found, GOOD


def said_of_dtypes(target, drafter) -> tuple[str, str]:
    """Name the dtypes of both models."""
    names = [
        "/".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}))
        for model in (target, drafter)
    ]
    exact = "float32" in names[0] or "float64" in names[0]
    rounds = "" if exact else "; near-ties may fall either way, as between batch sizes"
    return f"target {names[0]}, drafter {names[1]}{rounds}", GOOD


def said_of_devices(target, drafter) -> tuple[str, str]:
    """Name the devices of both models."""
    spread = sorted({str(place) for place in getattr(target, "hf_device_map", {}).values()})
    places = ", ".join(spread) or str(target.device)
    far = home_of(target.get_output_embeddings()).type != drafter.device.type
    return f"target {places}, drafter {drafter.device}", FAIR if far else GOOD


def said_of_attention(target) -> tuple[str, str]:
    """Name a target's attention, and how many layers it has."""
    config = target.config.get_text_config(decoder=True)
    own = config._attn_implementation or "eager"
    masks = "flash" not in own and own != "flex_attention"
    return own if masks else f"{own}; passes over trees use another, as it takes no masks", GOOD


def taps(target, drafter, ids: torch.Tensor) -> tuple[str, str]:
    """Compare the states that reach the drafter with those the target gives when asked."""
    layers = drafter.config.target_layer_ids
    with torch.no_grad():
        with tapped_states(target, layers) as tapped:
            reached = tapped.take(target(input_ids=ids, **tapped.model_kwargs))
        states = target(input_ids=ids, output_hidden_states=True).hidden_states or ()
    count = len(decoder_layers(target) or ())
    if len(states) != count + 1:
        return f"read {tuple(reached.shape)}; the target itself gives {len(states)} states for {count} layers", FAIR
    asked = torch.cat([states[layer + 1].to(reached.device) for layer in layers], dim=-1)
    apart = float((reached - asked).abs().max() / asked.std())
    return f"states of layers {layers} arrive, {apart:.0e} from those asked for", GOOD if apart < 0.1 else BAD


def encoded(target, tokenizer) -> list[torch.Tensor]:
    """Return three prompts; random tokens where there is no tokenizer."""
    if tokenizer is not None:
        return [encode_prompt(tokenizer, prompt).to(target.device) for prompt in PROMPTS]
    size = target.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(size, (3, 16), generator=torch.Generator().manual_seed(0))
    return [row[None].to(target.device) for row in ids]


def measured(
    target, drafter, prompts: list[torch.Tensor], max_new_tokens: int, progress: Callable[[int, int], None]
) -> Iterator[Row]:
    """Generate each text plainly and with the drafter, and yield what was seen."""
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    pairs: list[tuple] = []
    for prompt in prompts:
        call = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **settings}
        plain = target.generate(**call)
        progress(2 * len(pairs) + 1, 2 * len(prompts))
        try:
            pairs.append((plain, target.generate(**call, assistant_model=drafter)))
        except Exception as error:
            yield Row("trees are exact", " ".join(str(error).split()), BAD)
            return
        progress(2 * len(pairs), 2 * len(prompts))
    look = next(iter((recall("exactness", target) or {}).values()), None)
    if look is not None:
        found = (
            f"{look.apart:.0e} of the logits' spread from single steps, where rounding explains {look.tolerance:.0e}"
        )
        yield Row("trees are exact", look.fault or found, GOOD if look.fault is None else FAIR)
    same = sum(torch.equal(plain.sequences, drafted.sequences) for plain, drafted in pairs)
    exact = target.dtype in (torch.float32, torch.float64)
    yield Row(
        "same text", f"{same} of {len(pairs)} greedy texts", GOOD if same == len(pairs) else BAD if exact else FAIR
    )
    taus = [drafted.block_efficiency for _, drafted in pairs]
    helps = sum(taus) / len(taus) >= 1.2
    found = " / ".join(f"{tau:.2f}" for tau in taus)
    hint = "" if helps else ": was it trained for this target, chat template and thinking mode?"
    yield Row("tau", f"{found} tokens per target pass on {len(pairs)} prompts{hint}", GOOD if helps else FAIR)


def tokenizer_of(target) -> Any:
    """Return the tokenizer that lies where a target came from, None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(target.config.name_or_path)
    except Exception:
        return None


@contextmanager
def quiet() -> Iterator[None]:
    """Say nothing of what the report says itself."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


__all__ = ["Report", "Row", "check"]
