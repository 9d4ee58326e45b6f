"""A tiny pair saved as a user would have it: a target with a tokenizer, and its drafter."""

import json
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny import VOCAB, tiny_drafter, tiny_target

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ 't' if enable_thinking else '' }}"


def letter_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one letter per token."""
    letters = string.ascii_lowercase[: VOCAB - 4]
    words = ["<bos>", "<eos>", "<pad>", "<mask>", *letters]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


def save_pair(folder: Path, chat_template: str | None = None) -> dict[str, str]:
    """Save target, drafter and prompts; return where, by name of the command-line option."""
    places = {name: str(folder / name) for name in ("target", "drafter", "prompts.json")}
    target = tiny_target()
    target.generation_config.eos_token_id = None  # every text has its full length
    target.save_pretrained(places["target"])
    letter_tokenizer(chat_template).save_pretrained(places["target"])
    drafter = tiny_drafter()
    drafter.generation_config.tree_budget = 8
    drafter.save_pretrained(places["drafter"])
    prompts = [{"source": "letters", "prompt": "abcde"}, {"source": "others", "prompt": "kjih"}]
    Path(places["prompts.json"]).write_text(json.dumps(prompts))
    return {"--target": places["target"], "--drafter": places["drafter"], "--prompts": places["prompts.json"]}
