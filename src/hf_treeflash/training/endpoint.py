"""Responses of a server that already runs the target, by OpenAI's API: vLLM, SGLang, `transformers serve`."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .data import Prompt
from .responses import answer_all

TIMEOUT = 3600  # seconds for an answer


def ask_endpoint(
    url: str,
    tokenizer,
    prompts: Sequence[Prompt],
    output_file: str | os.PathLike,
    *,
    model: str,
    enable_thinking: bool,
    batch_size: int = 64,
    **request,
) -> list[dict]:
    """Have a server answer chats, `batch_size` at a time; an interrupted call goes on where it stopped.

    Answers come as text and are tokenised here. Where a text has several spellings in tokens these may differ from
    those that the server drew.

    Args:
        url (`str`):
            Of the API, such as `http://localhost:8000/v1`. An `OPENAI_API_KEY` of the environment is sent along.
        tokenizer ([`PreTrainedTokenizerBase`]):
            The target's.
        prompts (`Sequence[Prompt]`):
            From [`chat_prompts`].
        output_file (`str` or `os.PathLike`):
            As [`regenerate`] writes it.
        model (`str`):
            What the server calls the target.
        enable_thinking (`bool`):
            Passed to the server's chat template, see [`chat_prompts`].
        batch_size (`int`, *optional*, defaults to 64):
            Requests in flight.
        request:
            More fields of each request: `max_tokens`, `temperature`, `seed`, ...

    Returns:
        `list[dict]`: Samples as from [`regenerate`].

    Raises:
        ValueError: If a prompt is no chat, or the file was begun with other settings.
        RuntimeError: If the server cannot be reached, refuses, or keeps part of an answer to itself.
    """
    for prompt in prompts:
        if prompt.messages is None:
            raise ValueError(f"{prompt.source}: a server answers chats; this prompt is plain text.")
    request = {"model": model, **request}
    if "enable_thinking" in tokenizer.chat_template:
        request["chat_template_kwargs"] = {"enable_thinking": enable_thinking}
    made = {"endpoint": url, "request": request, "prompts": len(prompts), "batch_size": batch_size}

    def respond(batch: Sequence[Prompt], number: int) -> Iterator[dict]:
        with ThreadPoolExecutor(len(batch)) as pool:
            choices = list(pool.map(lambda prompt: ask(url, {**request, "messages": prompt.messages}), batch))
        return (sample_of(tokenizer, prompt, choice) for prompt, choice in zip(batch, choices, strict=True))

    return answer_all(prompts, output_file, made, batch_size, respond)


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send one chat; return the first choice.

    Raises:
        RuntimeError: With what the server said.
    """
    headers = {"Content-Type": "application/json"}
    if "OPENAI_API_KEY" in os.environ:
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    address = url.rstrip("/") + "/chat/completions"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, json.dumps(body).encode(), headers), timeout=TIMEOUT
        ) as answer:
            return json.load(answer)["choices"][0]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{address} refused: {error.code} {error.read().decode(errors='replace')}") from error
    except OSError as error:
        raise RuntimeError(f"{address} cannot be reached ({error}). Is the server running?") from error


def sample_of(tokenizer, prompt: Prompt, choice: dict[str, Any]) -> dict:
    """Turn an answer into a sample.

    Raises:
        RuntimeError: If the server took the reasoning out of the text.
    """
    message = choice["message"]
    if message.get("reasoning_content") or message.get("reasoning"):
        raise RuntimeError(
            "The server cuts the reasoning out of its answers, so their text is not what the target wrote. Start it "
            "without its reasoning parser."
        )
    answer = tokenizer(message["content"] or "", add_special_tokens=False)["input_ids"]
    if choice["finish_reason"] == "stop":
        answer = [*answer, tokenizer.eos_token_id]
    return {
        "input_ids": prompt.input_ids + answer,
        "prompt_length": len(prompt.input_ids),
        "source": prompt.source,
    }
