"""The walk through a round's trees: the target's choice at each node becomes text, record and stream."""

import functools

import torch

from .logits_process import TreeLogitsProcessor
from .noise import Noise
from .outputs import Recorder
from .sequences import Sequences
from .tree import DraftTree
from .verify import Verdict, walk


class Walker:
    """Chooses tokens as plain decoding does, one node after another.

    Args:
        processor ([`TreeLogitsProcessor`]):
            The call's processors.
        sequences ([`Sequences`]):
            The texts, which grow by what is chosen.
        recorder ([`Recorder`]):
            What the call asked to keep of each token.
        streamer ([`BaseStreamer`], *optional*):
            The call's; where a text has other rows beside it, [`LockstepWalker`] serves it.
        noise ([`Noise`], *optional*):
            Draws each token; without it the most likely is taken.
        device (`torch.device`):
            Where the texts are, and processors run.
    """

    def __init__(
        self,
        processor: TreeLogitsProcessor,
        sequences: Sequences,
        recorder: Recorder,
        streamer,
        noise: Noise | None,
        device: torch.device,
    ):
        self.processor, self.sequences, self.recorder = processor, sequences, recorder
        self.streamer, self.noise, self.device = streamer, noise, device

    def __call__(
        self, rows: list[int], children: list[dict[tuple[int, int], int]], logits: torch.Tensor
    ) -> list[Verdict]:
        """Follow the target's choices through each row's tree.

        Args:
            rows (`list[int]`):
                Rows of the call.
            children (`list[dict[tuple[int, int], int]]`):
                Of each row's tree, see [`DraftTree.children`].
            logits (`torch.Tensor` of shape `(rows, nodes, vocab)`):
                The target's at the nodes.
        """
        choices = self.at_all_nodes(logits)
        verdicts = []
        for index, row in enumerate(rows):

            def choose(node: int, index=index, row=row) -> int:
                return self.at_node(row, logits[index, node]) if choices is None else choices[index][node]

            verdicts.append(walk(children[index], choose, functools.partial(self.emit, row)))
        return verdicts

    def emit(self, row: int, token: int) -> bool:
        """Add a row's next token to its text and stream it; return whether that ends the text."""
        finished = self.sequences.append(row, token, self.recorder.scores_of(row))
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        return finished

    def prepared(self, tree: DraftTree) -> DraftTree:
        """Return the trees as the walk wants them verified."""
        return tree

    def at_all_nodes(self, logits: torch.Tensor) -> list[list[int]] | None:
        """Return the choices at all nodes where one look at the device gives them, else None: each is asked for.

        Args:
            logits (`torch.Tensor` of shape `(rows, nodes, vocab)`):
                The target's.
        """
        if self.noise is not None or self.recorder.needs_scores or not self.processor.prefix_independent:
            return None
        return self.processor.whole_tree(logits).argmax(dim=-1).tolist()

    def at_node(self, row: int, logits: torch.Tensor) -> int:
        """Choose the token after a row's text so far.

        Args:
            row (`int`):
                Row of the call.
            logits (`torch.Tensor` of shape `(vocab,)`):
                The target's.
        """
        raw = logits[None].to(self.device, torch.float32, copy=True)  # (1, vocab)
        scores = self.processor.node(row, self.sequences.prefix(row), raw)
        self.recorder.token(row, scores, raw)
        return int(scores.argmax(dim=-1) if self.noise is None else self.noise.draw([row], scores))


__all__ = ["Walker"]
