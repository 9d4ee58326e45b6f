"""The walkers over trees against the plainly written recurrences, in float64 and one node after another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_treeflash.recurrent.convolution import convolution
from hf_treeflash.recurrent.gated_delta import gated_delta
from hf_treeflash.recurrent.kimi_delta import kimi_delta
from hf_treeflash.recurrent.levels import levels_of, reached_columns
from hf_treeflash.recurrent.mamba1 import mamba1
from hf_treeflash.recurrent.mamba2 import mamba2
from tests.kernels.trees import ancestor_mask
from tests.recurrent import recurrences
from tests.recurrent.trees import paths_of, random_trees, shaped_tree

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SHAPES = ["chain", "star", "comb", "random"]
OUTPUT = {"atol": 5e-7, "rtol": 1e-6}  # outputs are 0.1 to 0.5 in size
STATE = {"atol": 4e-6, "rtol": 1e-6}  # states are up to 5


@st.composite
def trees(draw):
    """Parents of a batch of trees, different in every row, and the generator of what their nodes are given."""
    nodes, batch = draw(st.integers(1, 128)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return random_trees(batch, nodes, generator), generator


def randn(generator, *shape):
    return torch.randn(shape, generator=generator)


def decays(generator, strength, *shape):
    """Log decays between 0 and `-strength`."""
    return -strength * torch.rand(shape, generator=generator)


def check(outputs, terms, state, parents, expected, output_close=OUTPUT, state_close=STATE):
    """Compare a walker's outputs, `(batch, nodes, ...)`, and states behind a path of each row with a recurrence's."""
    before, paths = state.clone(), paths_of(parents)
    references = [expected(row) for row in range(len(parents))]
    for row, (output, _) in enumerate(references):
        torch.testing.assert_close(outputs[row].double(), output, **output_close)
    for path in (paths, torch.zeros(len(parents), 1, dtype=torch.long)):  # the root alone
        moved = state.clone()
        terms.add_path(moved, path)
        for row, (_, states) in enumerate(references):
            torch.testing.assert_close(moved[row].double(), states[int(path[row].max())], **state_close)
    assert torch.equal(state, before), "a pass leaves the state as it is"


def check_delta(parents, generator, strength, parallel=False, beta=None, sizes=(2, 16, 16), channels=False, **close):
    """Check a delta rule; parallel keys with strong updates are its hard case."""
    batch, nodes = parents.shape
    heads, key_size, value_size = sizes
    query, key = randn(generator, batch, nodes, heads, key_size), randn(generator, batch, nodes, heads, key_size)
    if parallel:
        key = key[:, :1] + 0.01 * key
    groups = 1 if channels else 2
    value = randn(generator, batch, nodes, heads * groups, value_size)
    beta = torch.rand(value.shape[:3], generator=generator) if beta is None else torch.full(value.shape[:3], beta)
    log_decay = decays(generator, strength, *value.shape[:3], *([key_size] if channels else []))
    state = randn(generator, batch, heads * groups, key_size, value_size)
    walker = kimi_delta if channels else gated_delta
    output, terms = walker(query, key, value, log_decay, beta, state, ancestor_mask(parents))
    repeated = [part.repeat_interleave(groups, dim=2) for part in (query, key)]

    def expected(row):
        inputs = [part[row] for part in (*repeated, value, log_decay, beta, state)]
        return recurrences.delta_rule(*inputs, parents[row])

    check(output, terms, state, parents, expected, **close)


@pytest.mark.parametrize("channels", [False, True], ids=["gated", "kimi"])
@pytest.mark.parametrize("strength", [0.0, 1.0, 8.0])
@QUICK
@given(case=trees(), parallel=st.booleans())
def test_delta_rules(channels, strength, case, parallel):
    check_delta(*case, strength, parallel=parallel, beta=0.999 if parallel else None, channels=channels)


@pytest.mark.parametrize("channels", [False, True], ids=["gated", "kimi"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nodes", [1, 2, 16, 64, 128])
def test_delta_rules_at_full_size(channels, shape, nodes):
    """The shapes of Qwen3.5 and Kimi-Linear, four heads of them."""
    generator = torch.Generator().manual_seed(nodes)
    parents = shaped_tree(shape, nodes, generator)[None]
    for parallel, strength in ((False, 1.0), (True, 0.0)):
        beta = 0.999 if parallel else None
        sizes = (4, 128, 128) if channels else (2, 128, 128)
        check_delta(parents, generator, strength, parallel, beta, sizes, channels)


@QUICK
@given(case=trees())
def test_updates_beyond_one(case):
    """OLMo-hybrid lets an update go past its target, up to twice the way."""
    check_delta(*case, 0.5, beta=1.9)


@pytest.mark.parametrize("shape", SHAPES)
def test_kimi_with_decays_that_forget_everything(shape):
    """Sums of up to 60 per step and channel: what differences of them lose is what such tokens forget."""
    generator = torch.Generator().manual_seed(3)
    parents = shaped_tree(shape, 64, generator)[None]
    close = {"output_close": {"atol": 2e-5, "rtol": 1e-5}, "state_close": {"atol": 2e-5, "rtol": 1e-5}}
    check_delta(parents, generator, 60.0, sizes=(2, 64, 64), channels=True, **close)


@pytest.mark.parametrize("strength", [0.0, 1.0, 8.0])
@QUICK
@given(case=trees())
def test_mamba2(strength, case):
    parents, generator = case
    batch, nodes = parents.shape
    heads, groups, head_dim, state_size = 4, 2, 8, 16
    hidden = randn(generator, batch, nodes, heads, head_dim)
    dt = 0.3 * torch.rand(batch, nodes, heads, generator=generator)
    rate, skip = -strength / 0.3 * torch.rand(heads, generator=generator), randn(generator, heads)
    b, c = (randn(generator, batch, nodes, groups, state_size) * state_size**-0.5 for _ in range(2))
    state = randn(generator, batch, heads, head_dim, state_size)
    output, terms = mamba2(hidden, dt, rate, b, c, skip, state, ancestor_mask(parents))
    repeated = [part.repeat_interleave(heads // groups, dim=2) for part in (b, c)]

    def expected(row):
        b, c = (part[row] for part in repeated)
        return recurrences.mamba2(hidden[row], dt[row], rate, b, c, skip, state[row], parents[row])

    check(output, terms, state, parents, expected, output_close={"atol": 4e-6, "rtol": 1e-5})


@pytest.mark.parametrize("strength", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("elements", [1, 1 << 21], ids=["a channel at a time", "all channels at once"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(case=trees())
def test_mamba1(strength, elements, case):
    parents, generator = case
    batch, nodes = parents.shape
    channels, state_size = 6, 8
    hidden = randn(generator, batch, channels, nodes)
    dt = 0.3 * torch.rand(batch, channels, nodes, generator=generator)
    rate, skip = -strength / 0.3 * torch.rand(channels, state_size, generator=generator), randn(generator, channels)
    b, c = (randn(generator, batch, state_size, nodes) * state_size**-0.5 for _ in range(2))
    state = randn(generator, batch, channels, state_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_treeflash.recurrent.mamba1.ELEMENTS", elements)
        output, terms = mamba1(hidden, dt, rate, b, c, skip, state, levels_of(parents))

    def expected(row):
        own = [part[row].T for part in (hidden, dt)]
        return recurrences.mamba1(*own, rate, b[row].T, c[row].T, skip, state[row], parents[row])

    check(output.mT, terms, state, parents, expected, output_close={"atol": 4e-6, "rtol": 1e-5})


@QUICK
@given(case=trees(), kernel=st.integers(2, 5), spare=st.integers(0, 2))
def test_convolution(case, kernel, spare):
    parents, generator = case
    batch, nodes = parents.shape
    columns = randn(generator, batch, 6, kernel + spare + nodes)
    weight, bias = randn(generator, 6, kernel), randn(generator, 6)
    output = convolution(columns, weight, bias, reached_columns(parents, kernel))
    for row in range(batch):
        expected, _ = recurrences.convolution(columns[row], kernel + spare, weight, bias, parents[row])
        torch.testing.assert_close(output[row].T.double(), expected, atol=4e-6, rtol=1e-5)


def test_a_chain_is_a_causal_convolution():
    columns, weight = torch.randn(2, 6, 4 + 9), torch.randn(6, 4)
    reached = reached_columns(torch.arange(-1, 8).expand(2, -1), 4)
    expected = F.conv1d(columns, weight[:, None], groups=6)[:, :, -9:]
    torch.testing.assert_close(convolution(columns, weight, None, reached), expected)


def test_kimi_in_blocks_is_kimi_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    parents = random_trees(2, 40, generator)
    inputs = [randn(generator, 2, 40, 3, 8) for _ in range(3)]
    inputs += [decays(generator, 1.0, 2, 40, 3, 8), torch.rand(2, 40, 3), randn(generator, 2, 3, 8, 8)]
    whole, _ = kimi_delta(*inputs, ancestor_mask(parents))
    monkeypatch.setattr("hf_treeflash.recurrent.kimi_delta.ELEMENTS", 2 * 3 * 40 * 8 * 7)
    blocks, _ = kimi_delta(*inputs, ancestor_mask(parents))
    torch.testing.assert_close(blocks, whole)


def test_levels():
    parents = torch.tensor([[-1, 0, 0, 1, 3, -1], [-1, 0, 1, 2, 2, 0]])
    levels = levels_of(parents)
    assert [level.slots.tolist() for level in levels] == [
        [[0], [0]],
        [[1, 2], [1, 5]],
        [[3], [2]],
        [[4, 6], [3, 4]],
    ]
    assert [level.nodes.tolist() for level in levels][3] == [[4, 0], [3, 4]]
    assert [level.parents.tolist() for level in levels] == [[[0], [0]], [[0, 0], [0, 0]], [[0], [0]], [[0, 0], [0, 0]]]
