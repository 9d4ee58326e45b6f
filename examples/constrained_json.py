"""Write JSON that obeys a schema, with a drafter whose trees obey it too.

    pip install xgrammar
    python examples/constrained_json.py --target Qwen/Qwen3-4B --drafter peerrh/treeflash-qwen3-4b \
        --prompt "Describe Ada Lovelace as JSON."

The grammar is an ordinary logits processor of `generate`. It rules tokens out, so no node of a tree is spent on what
the schema forbids; the text is the one plain `generate` writes under the same grammar. Folders work in place of
repository ids, and without arguments the small embedded pair runs offline: its JSON is valid, and says nothing.
"""

import argparse
import json
from pathlib import Path

import torch
import xgrammar
from transformers.utils import logging
from xgrammar.contrib.hf import LogitsProcessor

from hf_treeflash.bench.compare import RoundRecorder
from hf_treeflash.bench.demo import EMBEDDED
from hf_treeflash.bench.pairs import encode_prompt, load_pair

FIELDS = ["mathematics", "computing", "physics", "poetry"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "born": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "fields": {"type": "array", "items": {"enum": FIELDS}, "maxItems": 3},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "born", "fields", "alive"],
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(EMBEDDED / "target"))
    parser.add_argument("--drafter", default=str(EMBEDDED / "drafter"))
    parser.add_argument("--prompt", default="person = ")
    parser.add_argument("--schema", type=Path, help="file with a JSON schema; a person by default")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--dtype", help="such as bfloat16; as stored by default, float32 on a CPU")
    return parser.parse_args(argv)


def compile_schema(schema: dict, tokenizer, vocab_size: int) -> xgrammar.CompiledGrammar:
    """Compile a schema for a tokenizer; whitespace is fixed, as models otherwise lose themselves in it."""
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    return xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema), any_whitespace=False)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable_progress_bar()
    target, tokenizer, drafter = load_pair(args.target, args.drafter, device=args.device, dtype=args.dtype)
    schema = json.loads(args.schema.read_text(encoding="utf-8")) if args.schema else PERSON
    grammar = compile_schema(schema, tokenizer, target.config.get_text_config().vocab_size)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    ids = encode_prompt(tokenizer, args.prompt).to(target.device)
    texts = {}
    for name, assistant in (("plain", None), ("tree", drafter)):
        recorder = RoundRecorder()
        torch.manual_seed(args.seed)
        with recorder.watching(target):
            out = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                assistant_model=assistant,
                logits_processor=[LogitsProcessor(grammar)],  # it keeps the place in the grammar: a new one per call
                streamer=recorder,
                max_new_tokens=args.max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,  # what the grammar ends the text with
                pad_token_id=tokenizer.eos_token_id,
                **sampling,
            )
        texts[name] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"{name}: {out.shape[1] - ids.shape[1]} tokens in {len(recorder.rounds)} target passes")
    print(f"identical: {'yes' if texts['plain'] == texts['tree'] else 'no'}\n\n{texts['tree']}")


if __name__ == "__main__":
    main()
