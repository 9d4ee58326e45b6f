"""`hf-treeflash chat`: a conversation, its drafts, and what they bring."""

import sys
from typing import Any

from rich.markup import escape

from . import options
from .pair import check_length, load
from .terminal import errors, note, output
from .writing import LEGEND, Writer, reached

HELP = "/reset begins anew, /plain answers once more without the drafter, /quit ends (or Ctrl-D)"


def chat(
    target: options.Target = None,
    drafter: options.Drafter = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    max_new_tokens: options.Tokens = 512,
    system: options.System = None,
    thinking: options.Thinking = False,
    seed: options.Seed = 0,
    show_draft: options.ShowDraft = False,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    tree_budget: options.TreeBudget = None,
    num_candidates: options.Candidates = None,
    lookup: options.Lookup = None,
) -> None:
    """Talk with a target; both models keep what they have read from turn to turn.

    /reset begins anew, /plain answers once more without the drafter, to compare, /quit ends. Without --target and
    --drafter it is SmolLM2-135M-Instruct where the repository holds its drafter, else the embedded pair.
    """
    settings = {
        **options.sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p),
        **options.given(repetition_penalty=repetition_penalty),
    }
    if target is None and drafter is None:
        target, drafter = chat_model()
    model, tokenizer, draft_model = load(
        target, drafter, device, dtype, tree_budget=tree_budget, num_candidates=num_candidates
    )
    from ..bench.conversation import Conversation

    conversation = Conversation(
        model,
        tokenizer,
        draft_model,
        system=system,
        enable_thinking=thinking,
        seed=seed,
        lookup=lookup,
        max_new_tokens=max_new_tokens,
        **settings,
    )
    if tokenizer.chat_template is None:
        note("the target has no chat template: it goes on with what you write, as it stands")
    note(HELP)
    if show_draft:
        output().print(LEGEND)
    talk(conversation, show_draft)


def chat_model() -> tuple[str | None, str | None]:
    """Return a chat model and its drafter where they are at hand."""
    from ..bench.demo import chat_pair

    return chat_pair(errors()) or (None, None)


def talk(conversation: Any, show_draft: bool) -> None:
    """Read and answer until the end of input; what goes wrong in a turn is said, and the conversation goes on."""
    while (said := ask()) is not None:
        if not said.strip():
            continue
        try:
            if not obey(conversation, said, show_draft):
                return
        except KeyboardInterrupt:
            note("\ninterrupted; the conversation is as it was before this turn")
        except (ValueError, OSError) as error:
            errors().print(f"[red]{escape(' '.join(str(error).split()))}[/red]", soft_wrap=True)


def ask() -> str | None:
    """Return the next line of the user, None at the end."""
    if not sys.stdin.isatty():  # a script's lines
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def obey(conversation: Any, said: str, show_draft: bool) -> bool:
    """Answer a line, or do what it commands; return whether to go on."""
    command = said.strip()
    if command == "/quit":
        return False
    if command == "/reset":
        conversation.reset()
        note("a new conversation")
    elif command == "/plain":
        compare(conversation)
    elif command.startswith("/") and " " not in command:
        raise ValueError(f"There is no command {command}: {HELP}.")
    else:
        length = conversation.encode(said).shape[1]
        check_length(conversation.target, length, conversation.generate_kwargs["max_new_tokens"])
        with Writer(conversation.tokenizer, show_draft) as writer:
            result = conversation.say(said, writer.round)
        note(reached(result.block_efficiency, result.tokens_per_second, len(result.token_ids)))
    return True


def compare(conversation: Any) -> None:
    """Answer the latest message without the drafter, and say whether text and speed differ."""
    if (drafted := conversation.latest) is None:
        raise ValueError("There is nothing to compare with yet: say something first.")
    with Writer(conversation.tokenizer) as writer:
        plain = conversation.say_plainly(writer.round)
    same = "the same text" if plain.token_ids == drafted.token_ids else "another text"
    note(f"plain decoding: {same}, {reached(None, plain.tokens_per_second, len(plain.token_ids))}")
    if plain.tokens_per_second and drafted.tokens_per_second:
        note(f"the drafter was {drafted.tokens_per_second / plain.tokens_per_second:.2f} times as fast (one run each)")
