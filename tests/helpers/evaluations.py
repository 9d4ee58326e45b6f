"""What an evaluation writes, made by hand."""

from tests.helpers.tiny import tiny_drafter


def arm(name: str, **fields) -> dict:
    spread = {"median": 1.5, "min": 1.0, "max": 2.0, "all": [1.0, 1.5, 2.0]}
    arm = {"name": name, "knobs": {"tree_budget": 8}, "tau": 2.5, "tokens_per_second": spread, "speedup": spread}
    arm |= {"identical": True, "acceptance_rates": [0.5, 0.25], "distinct_4grams": 0.9, "tokens": 5, "passes": 2}
    return arm | fields


def make_evaluation(**target) -> dict:
    settings = {"prompts": 1, "repeats": 3, "seed": 0, "max_new_tokens": 8, "do_sample": False}
    environment = {"device": "cpu", "threads": 2, "dtype": "float32", "attention": "sdpa"}
    arms = [arm("plain", knobs={}, tau=1.0), arm("tree")]
    return {
        "target": {"id": "acme/target", "revision": None, "dtype": "float32", **target},
        "drafter": {"id": "drafter", "revision": None, "parameters": tiny_drafter().num_parameters()},
        "chat_template_sha256": None,
        "enable_thinking": None,
        "results": [{"task": "letters", "settings": settings, "environment": environment, "arms": arms}],
    }
