"""A conversation over several turns, whose caches stay from one to the next."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .answering import Answer, OnRound, answer
from .pairs import encode_messages


class Conversation:
    """Turns with a pair of models; each answer is what plain `generate` gives for the whole conversation.

    Args:
        target ([`PreTrainedModel`]), tokenizer ([`PreTrainedTokenizerBase`]), drafter ([`PreTrainedModel`]):
            The pair. Without a chat template what the user says goes on from the text, as it is.
        system (`str`, *optional*):
            The first message.
        enable_thinking (`bool`, *optional*, defaults to `False`):
            Passed to the chat template.
        seed (`int`, *optional*, defaults to 0):
            Turn `i` is drawn with `seed + i`.
        lookup (`int`, *optional*):
            Tokens to draft from what was said before, too.
        generate_kwargs:
            Further arguments of `generate`.

    Raises:
        ValueError: If there is a system message, but no chat template.
    """

    def __init__(
        self,
        target,
        tokenizer,
        drafter,
        *,
        system: str | None = None,
        enable_thinking: bool = False,
        seed: int = 0,
        lookup: int | None = None,
        **generate_kwargs,
    ):
        if system is not None and tokenizer.chat_template is None:
            raise ValueError("The target's tokenizer has no chat template, so there is no place for a system message.")
        self.target, self.tokenizer, self.drafter = target, tokenizer, drafter
        self.system, self.enable_thinking, self.seed = system, enable_thinking, seed
        self.generate_kwargs = generate_kwargs
        self.drafting = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.text = torch.zeros(1, 0, dtype=torch.long)  # what was read and written so far, (1, length)
        self.cache: Any = None
        self.turns = 0
        self.prompt = self.text  # of the latest turn
        self.latest: Answer | None = None

    def encode(self, said: str) -> torch.Tensor:
        """Return the ids `(1, length)` of the whole conversation with what the user says next."""
        if self.tokenizer.chat_template is not None:
            messages = [*self.messages, {"role": "user", "content": said}]
            return encode_messages(self.tokenizer, messages, self.enable_thinking)
        special = {} if self.turns == 0 else {"add_special_tokens": False}
        new = self.tokenizer(said, return_tensors="pt", **special).input_ids
        return torch.cat([self.text, new], dim=1)  # (1, length + new)

    def say(self, said: str, on_round: OnRound = lambda *_: None) -> Answer:
        """Answer what the user says; a turn that fails or is interrupted leaves the conversation as it was.

        Args:
            said (`str`):
                The user's next message.
            on_round (`Callable`, *optional*):
                See [`TimedRounds`].
        """
        prompt = self.encode(said)
        cache, self.cache = self._cache_for(prompt), None  # a broken turn leaves a cache that nobody may go on from
        result = answer(
            self.target,
            self.drafter,
            prompt,
            on_round=on_round,
            cache=cache,
            seed=self.seed + self.turns,
            **self.drafting,
            **self.generate_kwargs,
        )
        self.cache, self.prompt, self.latest = result.cache, prompt, result
        self.text = torch.cat([prompt, torch.tensor([result.token_ids])], dim=1)  # (1, length)
        said_back = self.tokenizer.decode(result.token_ids, skip_special_tokens=True)
        self.messages += [{"role": "user", "content": said}, {"role": "assistant", "content": said_back}]
        self.turns += 1
        return result

    def say_plainly(self, on_round: OnRound = lambda *_: None) -> Answer:
        """Answer the latest message once more without the drafter, to compare; the conversation stays as it is."""
        seed = self.seed + self.turns - 1
        return answer(self.target, None, self.prompt, on_round=on_round, seed=seed, **self.generate_kwargs)

    def _cache_for(self, prompt: torch.Tensor) -> Any:
        """Return the cache as far as it holds the beginning of a prompt; templates may write a turn in another way."""
        if self.cache is None:
            return None
        held = self.cache.get_seq_length()
        length = min(held, prompt.shape[1] - 1)
        differs = (self.text[0, :length] != prompt[0, :length]).nonzero()
        common = int(differs[0]) if len(differs) else length
        if common == held:
            return self.cache
        # Windows and recurrent states have forgotten what they would have to go back to.
        if common == 0 or not all(type(layer) is DynamicLayer for layer in self.cache.layers):
            return None
        self.cache.crop(common - held)
        return self.cache


__all__ = ["Conversation"]
