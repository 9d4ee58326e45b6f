"""The random draws of the coming tokens, known before they are made: drafts rank tokens by what will be drawn."""

from typing import Any

import torch

from .compat import on_cpu


class Noise:
    """The exponential noise of a call's draws; the token with the largest `probability / noise` is drawn.

    That is how `torch.multinomial` draws one token. Plain `generate` makes noise of shape `(batch, vocab)` per step,
    and row `r` draws its token `t` with row `r` of the noise of step `t`. So it does here, however far rows are apart,
    and the same seed gives the same text.

    Noise is made ahead by a generator of our own, from the states that the device's default generator will be in. That
    one stands at every time where plain `generate` would have left it after the longest text so far. If something else
    moves it between two tokens (a processor, a layer in training mode), the noise that was made ahead is forgotten.

    Args:
        batch (`int`):
            Rows of the call.
        capacity (`int`):
            Tokens per row whose noise is kept.
        device (`torch.device`):
            Where plain `generate` draws.
        overruns (`bool`, *optional*, defaults to `False`):
            Whether rows may be written beyond where all end, so that the generator has to go back.

    Attributes:
        buffer (`torch.FloatTensor` of shape `(rows, capacity, vocab_size)`):
            What is kept: the noise of token `t` of a row stands at `t % capacity`. It is made with the first draw.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device, overruns: bool = False):
        self.batch, self.capacity, self.device, self.overruns = batch, capacity, device, overruns
        self.buffer: Any = None
        self.places = {row: row for row in range(batch)}  # in the buffer, of the rows still being written
        self.taken, self.made = [0] * batch, [0] * batch  # tokens drawn, and tokens whose noise was made
        self.default, self.own = default_generator(device), torch.Generator(device)
        self.default_state = self.default.get_state()
        self.stands_at = -1  # the step whose noise `own` would make next
        self.longest = 0  # tokens of the longest text
        self._start(0)

    def ahead(self, rows: list[int], tokens: int) -> torch.Tensor:
        """Return the noise of each row's next tokens, of shape `(rows, tokens, vocab_size)`; none is used up.

        Args:
            rows (`list[int]`):
                Rows of the call.
            tokens (`int`):
                At most `capacity`.
        """
        self.make(rows, tokens)
        if len(rows) == 1:  # without the host's lists on their way to the device
            first = self.taken[rows[0]] % self.capacity
            if first + tokens <= self.capacity:
                return self.buffer[None, self.places[rows[0]], first : first + tokens]
        index = torch.tensor([[(self.taken[row] + step) % self.capacity for step in range(tokens)] for row in rows])
        places = torch.tensor([[self.places[row]] for row in rows])
        return self.buffer[places.to(self.device), index.to(self.device)]

    def draw(self, rows: list[int], scores: torch.Tensor) -> torch.Tensor:
        """Draw the next token of some rows as plain `generate` would.

        Args:
            rows (`list[int]`):
                Rows of the call.
            scores (`torch.FloatTensor` of shape `(rows, vocab_size)`):
                Their processed logits.

        Returns:
            `torch.LongTensor` of shape `(rows,)`.

        Raises:
            RuntimeError: As plain `generate` does, where scores are no distribution.
        """
        if not torch.equal(self.default.get_state(), self.default_state):
            self._restart()
        if self.buffer is None:
            self.buffer = scores.new_empty(self.batch, self.capacity, scores.shape[1])
        probabilities = scores.softmax(dim=-1)
        best, tokens = (probabilities / self.ahead(rows, 1)[:, 0]).max(dim=-1)
        if on_cpu(self.device) and bool(best.isnan().any()):
            torch.multinomial(probabilities, num_samples=1)  # says what is wrong
        self.use(rows)
        return tokens

    def use(self, rows: list[int]) -> None:
        """Count the next token of some rows as drawn."""
        for row in rows:
            self.taken[row] += 1
        self.leave(max(self.taken))

    def leave(self, steps: int) -> None:
        """Put the default generator where plain `generate` leaves it after so many steps, unless it stands there."""
        if steps != self.longest:
            self.longest, self.default_state = steps, self._state_before(steps)
            self.default.set_state(self.default_state)

    def finish(self, rows: list[int]) -> None:
        """Forget rows that are written to their end."""
        for row in rows:
            del self.places[row]

    def make(self, rows: list[int], tokens: int) -> None:
        """Make sure of the noise of each row's next tokens."""
        for row in rows:
            while self.made[row] < self.taken[row] + tokens:
                self._make(self.made[row])

    def move(self, buffer: torch.Tensor, rows: list[int]) -> None:
        """Keep noise elsewhere from here on.

        Args:
            buffer (`torch.FloatTensor` of shape `(rows, capacity, vocab_size)`):
                Where to.
            rows (`list[int]`):
                Rows of the call that it has room for, in its order.
        """
        self.buffer, self.capacity = buffer, buffer.shape[1]
        self.places, self.made = {row: place for place, row in enumerate(rows)}, [*self.taken]

    def _make(self, step: int) -> None:
        """Make the noise of a step, and give it to all rows that wait for it and have room."""
        state = self._state_before(step)
        if self.stands_at != step:
            self.own.set_state(state)
        block = torch.empty(self.batch, self.buffer.shape[2], device=self.device)
        block.exponential_(generator=self.own)
        self.stands_at = step + 1
        if step + 1 == self.first + len(self.states):
            self.states.append(self.own.get_state())
        takers = [row for row in self.places if self.made[row] == step < self.taken[row] + self.capacity]
        if len(takers) == self.batch == len(self.buffer):
            self.buffer[:, step % self.capacity] = block
        else:
            for row in takers:
                self.buffer[self.places[row], step % self.capacity] = block[row]
        for row in takers:
            self.made[row] += 1
        waiting = range(self.batch) if self.overruns else self.places
        passed = min((self.taken[row] for row in waiting), default=self.first) - self.first
        if passed > 0:
            self.first += passed
            del self.states[:passed]

    def _state_before(self, step: int) -> torch.Tensor:
        while step >= self.first + len(self.states):
            self._make(self.first + len(self.states) - 1)
        return self.states[step - self.first]

    def _start(self, step: int) -> None:
        """Go on from the default generator's state, which is that before a step."""
        self.first, self.states = step, [self.default_state]
        self.stands_at = -1
        self.longest = step

    def _restart(self) -> None:
        """Forget what was made ahead: something else has used the numbers."""
        self.default_state = self.default.get_state()
        self.made = [*self.taken]
        self._start(min(self.taken[row] for row in self.places))
        self.leave(max(self.taken))


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that a device draws from by default."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]


__all__ = ["Noise"]
